"""The graphs of one variant, and what every way through them has in common."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_device.features import Batch, ComputedFeatures, Features
from lance_device.graphs import load_graph, load_projections, missing_names
from lance_device.numerics import check_gradients, finite_loss
from lance_device.session import Array, Graph
from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError
from lance_edge.manifest import Variant
from lance_edge.names import LOGITS, LOSS, SCALE, TARGET_ON, gradient_name
from lance_edge.targets import Targets

Float = NDArray[np.float32]


@dataclass(frozen=True)
class StepOutcome:
    """What a batch gave.

    Attributes:
        loss: mean cross-entropy over the batch, by the weights of its samples.
        correct: samples whose largest logit was the right one, before the update.
        gradients: of the batch's mean loss, by parameter.
        saved_bytes: measured: the most that was alive between forward and backward (tensors that cross,
            statistics, cores, projections or factors).
        activation_bytes: measured, where ranks differ from step to step: cores and factors.
    """

    loss: float
    correct: int
    gradients: dict[str, Float]
    saved_bytes: int
    activation_bytes: int | None = None


class StepGraphs:
    """Graphs, projections, and the trainable tensors that an optimiser updates in place."""

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant,
        parameters: dict[str, Float],
        threads: int,
        features: Features | None,
        targets: Targets | None,
    ) -> None:
        """Load.

        Raises:
            ArtifactError: if graphs and manifest do not fit together.
        """

        def optional(role: str) -> Graph | None:
            return load_graph(bundle, variant, role, threads) if role in variant.graphs else None

        self.variant = variant
        self._where = str(bundle.path)
        self._targets = targets or Targets.plain(len(bundle.manifest.classes))
        self.features = features or ComputedFeatures(load_graph(bundle, variant, "prefix", threads))
        self.forward = [load_graph(bundle, variant, role, threads) for role in variant.forward_roles]
        self.backward = load_graph(bundle, variant, "backward", threads)
        self._prepare, self._gradient = optional("prepare"), optional("gradient")
        self._parameters = parameters
        self._projections = load_projections(bundle, variant)
        self._statistics = tuple(spec.name for spec in variant.statistics)
        made = [name for graph in self.forward for name in graph.outputs]
        produced = {*self.features.names, *made} - set(self._statistics)
        self.crossing = tuple(name for name in self.backward.inputs if name in produced)
        self._check_wiring(made)

    @property
    def projection_bytes(self) -> int:
        """Of all projections that the package gives."""
        return sum(projection.nbytes for projection in self._projections.values())

    def constants(self, batch: Batch) -> dict[str, Array]:
        """What is the same for all micro-batches: weights, what is prepared from them, projections."""
        values: dict[str, Array] = {name: self._projections[name] for name in self.variant.projections}
        scale = np.array(1 / self.total_weight(batch), dtype=np.float32)
        values |= {**self._parameters, **self._targets.arrays(), SCALE: scale}
        return values | (self._prepare.run(values) if self._prepare is not None else {})

    def total_weight(self, batch: Batch) -> float:
        """What makes the sum of a batch's losses their mean."""
        return self._targets.total_weight(batch.labels(slice(None)))

    def own_rows(self, rows: slice) -> dict[str, Array]:
        """Of a projection of the batch mode, the rows of these samples."""
        return {name: self._projections[name][rows] for name in self.variant.batch_projections}

    def accumulate(self, totals: dict[str, Array], values: dict[str, Array]) -> None:
        """Move the statistics among `values` into their sums over the batch.

        Raises:
            ArtifactError: if a graph gives another shape for every micro-batch.
        """
        for name in self._statistics:
            if name in values and name in totals:
                addend = values.pop(name)
                if addend.shape != totals[name].shape:
                    raise ArtifactError(
                        f"{self._where}: statistic {name} is {list(addend.shape)} after"
                        f" {list(totals[name].shape)} of another micro-batch; rebuild the package with"
                        " lance-host"
                    )
                totals[name] += addend
            elif name in values:
                totals[name] = values.pop(name)

    def gradients(self, totals: dict[str, Array], constants: Mapping[str, Array]) -> dict[str, Float]:
        """Of every parameter, from the complete statistics.

        Raises:
            NumericalError: if one is not finite, naming the layer.
        """
        values: dict[str, Array] = dict(totals)
        if self._gradient is not None:
            values |= self._gradient.run({**constants, **totals})
        gradients = {name: values[gradient_name(name)] for name in self.variant.parameters}
        check_gradients(gradients)
        return gradients

    def finite_loss(self, values: Mapping[str, Array]) -> float:
        """The loss, summed over samples, among what forward read and gave.

        Raises:
            NumericalError: if it is not finite, naming where that begins.
        """
        return finite_loss(values, self.features.names, self._parameters)

    def _check_wiring(self, made: list[str]) -> None:
        """Every statistic and every gradient comes from some graph."""
        gradient_outputs = self._gradient.outputs if self._gradient is not None else ()
        gradients = [gradient_name(name) for name in self.variant.parameters]
        lacking = missing_names(self._statistics, made, self.backward.outputs)
        lacking += missing_names(gradients, self._statistics, gradient_outputs)
        lacking += missing_names((LOSS, LOGITS), made)
        lacking += missing_names((spec.name for spec in self.variant.activations), made, self.features.names)
        if TARGET_ON not in self.forward[-1].inputs and not self._targets.is_plain:
            raise ArtifactError(
                f"{self._where}: its graphs know no class weights or label smoothing; rebuild the package with"
                " lance-host, or train without --class-weights and --label-smoothing"
            )
        if lacking:
            raise ArtifactError(
                f"{self._where}: no graph of method {self.variant.method} gives {', '.join(lacking)};"
                " rebuild the package with lance-host"
            )


@dataclass(frozen=True)
class Kept:
    """Tensors on their way from forward to backward; masks are packed to a bit a value."""

    arrays: dict[str, Array]
    mask_shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Array]) -> "Kept":
        """Take over tensors."""
        masks = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype == np.bool_}
        arrays = {name: np.packbits(x) if name in masks else x for name, x in tensors.items()}
        return cls(arrays, masks)

    def plus(self, tensors: Mapping[str, Array]) -> "Kept":
        """These and more."""
        more = Kept.of(tensors)
        return Kept(self.arrays | more.arrays, self.mask_shapes | more.mask_shapes)

    def tensors(self) -> dict[str, Array]:
        """The tensors as forward gave them."""
        return {name: self._unpacked(name, array) for name, array in self.arrays.items()}

    def _unpacked(self, name: str, array: Array) -> Array:
        if name not in self.mask_shapes:
            return array
        shape = self.mask_shapes[name]
        return np.unpackbits(array, count=math.prod(shape)).view(np.bool_).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(array.nbytes for array in self.arrays.values())


def total_bytes(arrays: Mapping[str, Array]) -> int:
    """Of all arrays."""
    return sum(array.nbytes for array in arrays.values())


def micro_batches(samples: int, size: int) -> Iterator[slice]:
    """Rows of a batch, `size` at a time; the last slice may be shorter."""
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))


def count_correct(logits: Array, labels: Array) -> int:
    """Samples whose largest logit is the right one."""
    return int((logits.argmax(axis=1) == labels).sum())
