"""One training step of a method that compresses whole activations: `asi` and `hosvd`.

Their batch mode needs the whole batch of a layer's input at once.  So forward goes from one trainable layer
to the next with all samples, compresses each activation as soon as it is complete, and forgets it when
the next layer has read it: beside what backward needs, one activation is alive at a time (and the one that
is being made from it).  Within a layer, and in backward, samples pass in micro-batches as everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lance_device.codecs import Compressed, make_codec
from lance_device.features import Batch
from lance_device.measure import PhaseMeter
from lance_device.session import Array, Graph
from lance_device.step_graphs import (
    Kept,
    StepGraphs,
    StepOutcome,
    count_correct,
    micro_batches,
    total_bytes,
)
from lance_edge.errors import NumericalError
from lance_edge.manifest import Manifest
from lance_edge.names import LABELS, LOGITS, LOSS, core_name, projection_name

Float = NDArray[np.float32]


class LayerwiseStep:
    """Forward layer by layer, backward in micro-batches."""

    def __init__(self, graphs: StepGraphs, manifest: Manifest) -> None:
        self._graphs = graphs
        self._codec = make_codec(manifest, graphs.variant)
        plans, specs = graphs.variant.layers, graphs.variant.activations
        self._input_of = {plan.layer: spec.name for plan, spec in zip(plans, specs, strict=True)}

    def state(self) -> dict[str, Float]:
        """The codec's."""
        return self._codec.state()

    def load_state(self, state: Mapping[str, Float]) -> None:
        """The codec's."""
        self._codec.load_state(state)

    def run(
        self, batch: Batch, micro_batch: int, meter: PhaseMeter, before_each: Callable[[], None]
    ) -> StepOutcome:
        """See `step.TrainingStep`; the codec's time is part of forward."""
        graphs = self._graphs
        fed = batch.fed(slice(0, len(batch)))
        with meter.phase("forward"):
            constants = graphs.constants(batch)
        way = _Way(list(micro_batches(len(batch), micro_batch)), {**fed}, constants, before_each)
        live = self._features(batch, way, meter)
        with meter.phase("forward"):
            self._forward(live, way)
        loss, correct = graphs.finite_loss(live), count_correct(live[LOGITS], fed[LABELS])
        live.clear()
        saved_bytes = sum(kept.nbytes for kept in way.kept) + way.compressed.nbytes
        with meter.phase("backward"):
            statistics = self._backward(way)
            gradients = graphs.gradients(statistics, constants | way.compressed.tensors)
        saved_bytes += total_bytes(statistics)
        mean_loss = loss / graphs.total_weight(batch)
        return StepOutcome(mean_loss, correct, gradients, saved_bytes, way.compressed.nbytes)

    def _features(self, batch: Batch, way: "_Way", meter: PhaseMeter) -> dict[str, Array]:
        """The boundary tensors of the whole batch."""
        whole: dict[str, Array] = {}
        for rows in way.parts:
            way.before_each()
            for name, array in self._graphs.features.boundary(batch, rows, meter).items():
                _store(whole, name, array, 0, rows, len(batch))
        return whole

    def _forward(self, live: dict[str, Array], way: "_Way") -> None:
        """From boundary tensors to loss and logits; `live` has what is still read, of the whole batch."""
        parts = self._graphs.forward
        for number, graph in enumerate(parts):
            self._compress_complete(live, way)
            self._release(live, parts[number:], way)
            live |= _run_in_parts(graph, live, way)
            self._release(live, parts[number + 1 :], way)
        way.keep(self._graphs.backward, {name: live[name] for name in live if name in self._graphs.crossing})

    def _compress_complete(self, live: Mapping[str, Array], way: "_Way") -> None:
        """Compress the activations that are there and were not before."""
        for layer, name in self._input_of.items():
            if name in live and layer not in way.compressed.batches:
                way.before_each()  # of a large batch, a layer takes seconds
                way.compressed.add(layer, self._compress(layer, live[name]))

    def _compress(self, layer: str, activation: Array) -> Compressed:
        try:
            return self._codec.compress(layer, activation)
        except NumericalError as error:
            raise NumericalError(f"the input of layer {layer}: {error}") from None

    def _release(self, live: dict[str, Array], later: Sequence[Graph], way: "_Way") -> None:
        """Drop what nobody reads any more, or keep it for backward; masks are packed then."""
        needed = {name for graph in later for name in graph.inputs} | {LOSS, LOGITS}
        needed |= {name for layer, name in self._input_of.items() if layer not in way.compressed.batches}
        released = {name: live.pop(name) for name in live.keys() - needed}
        crossing = {name: released[name] for name in self._graphs.crossing if name in released}
        way.keep(self._graphs.backward, crossing)

    def _backward(self, way: "_Way") -> dict[str, Array]:
        """The statistics of the whole batch, the last micro-batch first."""
        graphs, statistics = self._graphs, dict[str, Array]()
        while way.kept:
            way.before_each()
            kept, rows = way.kept.pop(), way.parts[len(way.kept)]
            fed = {**way.constants, **way.compressed.rows(rows), **kept.tensors()}
            fed |= _rows_of(graphs.backward, way.fed, rows)
            graphs.accumulate(statistics, graphs.backward.run(fed))
        return statistics


@dataclass
class _Compressed:
    """Cores and factors of the layers so far, by the names of backward's inputs.

    `batches` has the size of the batch for each layer that has come; of those in `whole` the batch mode is not
    compressed: backward reads an identity for their U0, and it is there only while a micro-batch passes.
    """

    batches: dict[str, int] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    tensors: dict[str, Array] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, layer: str, activation: Compressed) -> None:
        """Backward reads cores `[r1, r0, r2, r3]`."""
        core, factors = activation.core, activation.factors  # [r0, r1, r2, r3]
        self.tensors |= {projection_name(layer, mode): factor for mode, factor in factors.items()}
        self.tensors[core_name(layer)] = np.ascontiguousarray(core.swapaxes(0, 1))
        if 0 not in factors:
            self.whole.add(layer)
        self.batches[layer] = len(factors.get(0, core))
        self.nbytes += activation.nbytes

    def rows(self, rows: slice) -> dict[str, Array]:
        """All of them, of each U0 the rows of some samples."""
        samples = np.arange(rows.start, rows.stop)
        tensors = dict(self.tensors)
        for layer, batch in self.batches.items():
            name = projection_name(layer, 0)
            own = samples[:, None] == np.arange(batch) if layer in self.whole else tensors[name][rows]
            tensors[name] = own.astype(np.float32, copy=False)
        return tensors


@dataclass
class _Way:
    """A batch on its way through the graphs.

    `parts` are its micro-batches, and `kept` has for each of them what backward reads.  `fed` are labels
    and seeds of the whole batch, by their input's name; `constants` are the same for all samples.
    """

    parts: Sequence[slice]
    fed: Mapping[str, Array]
    constants: Mapping[str, Array]
    before_each: Callable[[], None]
    kept: list[Kept] = field(init=False)
    compressed: _Compressed = field(default_factory=_Compressed)

    def __post_init__(self) -> None:
        self.kept = [Kept({}, {}) for _ in self.parts]

    def keep(self, backward: Graph, tensors: Mapping[str, Array]) -> None:
        """Keep tensors of the whole batch, for each micro-batch its own samples."""
        for number, rows in enumerate(self.parts):
            self.kept[number] = self.kept[number].plus(_rows_of(backward, tensors, rows))


def _rows_of(graph: Graph, values: Mapping[str, Array], rows: slice) -> dict[str, Array]:
    """Some samples of those inputs of a graph that have a batch axis, whole ones of the others."""
    names = [name for name in graph.inputs if name in values]
    return {name: np.ascontiguousarray(values[name][_index(graph.batch_axes[name], rows)]) for name in names}


def _run_in_parts(graph: Graph, values: Mapping[str, Array], way: _Way) -> dict[str, Array]:
    """Run a graph on the whole batch in micro-batches; outputs without a batch axis are summed."""
    whole: dict[str, Array] = {}
    for rows in way.parts:
        way.before_each()
        fed = {**way.constants, **_rows_of(graph, {**values, **way.fed}, rows)}
        for name, array in graph.run(fed).items():
            axis = graph.batch_axes[name]
            if axis is None:
                whole[name] = whole.get(name, 0) + array
            else:
                _store(whole, name, array, axis, rows, way.parts[-1].stop)
    return whole


def _store(whole: dict[str, Array], name: str, part: Array, axis: int, rows: slice, samples: int) -> None:
    """Put what a micro-batch made where it belongs in the tensor of the whole batch."""
    if name not in whole:
        shape = (*part.shape[:axis], samples, *part.shape[axis + 1 :])
        whole[name] = np.empty(shape, part.dtype)
    whole[name][_index(axis, rows)] = part


def _index(axis: int | None, rows: slice) -> tuple[slice, ...]:
    """What picks rows along an axis; everything where there is none."""
    return () if axis is None else (slice(None),) * axis + (rows,)
