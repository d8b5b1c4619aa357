"""Second moments of the trained layers' inputs, measured on this board, within a bound on its memory.

A pass takes all calibration batches through the frozen prefix and the package's `inputs` graph, and measures
some of the layers: as many as fit the limit together, or one.  So beside the runtime and one micro-batch there
are, at a time, one batch of these layers' inputs and their moments in float64:

    sum over the layers of a pass of  4 B |input| + 8 (groups D D + B B + L L)  bytes  <=  max(limit, one layer)

and beside them what one layer takes to add a batch (`moments.work_bytes`: a batch with its padding, and some 40
MiB of patches).  While a layer's moments are used, those of the pass's later layers are still there: what the
user takes comes on top.  Layers that do not fit together cost passes instead of memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_device.graphs import load_graph, run_prefix
from lance_device.session import Array, Graph
from lance_device.step_graphs import micro_batches
from lance_edge.bundle import Bundle
from lance_edge.calibration_order import calibration_batches
from lance_edge.errors import ArtifactError
from lance_edge.images import Part, load_batch
from lance_edge.manifest import Layer, Mode, Variant
from lance_edge.memory import LayerMemory
from lance_edge.moments import LayerMoments, Moments, kept_bytes
from lance_edge.names import INPUTS_ROLE, activation_name

Float = NDArray[np.float32]
DEFAULT_LIMIT = 128 << 20
NO_MEMORY: Mapping[str, LayerMemory] = {}


@dataclass(frozen=True)
class PassOptions:
    """How to measure.

    Attributes:
        mode: which modes a convolution's input has; by default as in the package.
        limit_bytes: for batches of inputs and moments together.
        progress: told the batches done and to do, over all passes.
    """

    threads: int
    micro_batch: int
    limit_bytes: int = DEFAULT_LIMIT
    mode: Mode | None = None
    progress: Callable[[int, int], None] = lambda done, of: None


class MomentsPass:
    """The layers of a variant with some weights, ready to be measured on any images."""

    def __init__(
        self, bundle: Bundle, variant: Variant, parameters: dict[str, Float], options: PassOptions
    ) -> None:
        """Load the graphs.

        Raises:
            ArtifactError: if the package has no graph to its layers' inputs, or the variant trains no layer.
        """
        if not variant.layers or INPUTS_ROLE not in variant.graphs:
            raise ArtifactError(
                f"{bundle.path}: has no graph to the inputs of its layers, so nothing can be protected;"
                " calibrate it again with this version of lance-edge, and with --layers"
            )
        self._prefix = load_graph(bundle, variant, "prefix", options.threads)
        self._inputs: Graph = load_graph(bundle, variant, INPUTS_ROLE, options.threads)
        self._parameters, self._options, self._manifest = parameters, options, bundle.manifest
        self.mode: Mode = options.mode or bundle.manifest.mode
        by_name = {layer.name: layer for layer in bundle.manifest.layers}
        self.layers = tuple(by_name[plan.layer] for plan in variant.layers)

    def batches(self, part: Part, wanted: int) -> int:
        """How many batches a pass takes."""
        return min(wanted, len(part) // self._manifest.batch_size)

    def run(
        self,
        part: Part,
        batches: int,
        seed: int,
        memory: Mapping[str, LayerMemory] = NO_MEMORY,
        protected_only: bool = False,
    ) -> Iterator[tuple[Layer, Moments]]:
        """Each layer with its moments; only those of one pass are alive.

        Args:
            part: the images to choose from.
            batches: at most; no image is used twice.
            seed: of the choice: the host's calibration takes the same images.
            memory: what the modes beside the protected one are without, by layer.
            protected_only: the moments of the protected mode alone, from which a memory is made.

        Raises:
            DataError: if there are fewer images than a batch, or one cannot be read.
            NumericalError: if an input is not finite.
        """
        size = self._manifest.batch_size
        order = calibration_batches(len(part), size, batches, seed)
        passes = plan_passes(self.layers, self.mode, size, protected_only, self._options.limit_bytes)
        for number, layers in enumerate(passes):
            found = {
                layer.name: LayerMoments(layer, self.mode, size, memory.get(layer.name), protected_only)
                for layer in layers
            }
            self._measure(part, order, found, (number * len(order), len(passes) * len(order)))
            for layer in layers:
                yield layer, found.pop(layer.name).moments()

    def _measure(
        self, part: Part, order: NDArray[np.int64], found: Mapping[str, LayerMoments], done: tuple[int, int]
    ) -> None:
        """Take all batches to some layers."""
        shapes = {layer.name: layer.input_shape for layer in self.layers}
        whole = {name: np.empty((order.shape[1], *shapes[name]), np.float32) for name in found}
        for number, indices in enumerate(order, start=1):
            for rows in micro_batches(len(indices), self._options.micro_batch):
                for name, inputs in self._layer_inputs(part, indices[rows], list(found)).items():
                    whole[name][rows] = inputs
            for name, moments in found.items():
                moments.add(whole[name])
            self._options.progress(done[0] + number, done[1])

    def _layer_inputs(self, part: Part, indices: NDArray[np.int64], names: Sequence[str]) -> dict[str, Array]:
        """The inputs `[N, ...]` of some layers for a micro-batch."""
        images = load_batch(part, indices, self._manifest.preprocessing)
        values: dict[str, Array] = {**self._parameters, **run_prefix(self._prefix, images)}
        found = self._inputs.run(values, [activation_name(name) for name in names])
        return {name: found[activation_name(name)] for name in names}


def plan_passes(
    layers: Sequence[Layer], mode: Mode, batch_size: int, protected_only: bool, limit_bytes: int
) -> tuple[tuple[Layer, ...], ...]:
    """The layers in their order, as many to a pass as fit the limit; a larger one has a pass of its own."""
    passes: list[list[Layer]] = []
    room = 0
    for layer in layers:
        needed = moment_bytes(layer, mode, batch_size, protected_only)
        if not passes or needed > room:
            passes.append([])
            room = limit_bytes
        passes[-1].append(layer)
        room -= needed
    return tuple(map(tuple, passes))


def moment_bytes(layer: Layer, mode: Mode, batch_size: int, protected_only: bool) -> int:
    """What measuring a layer keeps: a batch of its input, float32, and the moments of its modes, float64."""
    return kept_bytes(layer, mode, batch_size, protected_only) + 4 * batch_size * math.prod(layer.input_shape)
