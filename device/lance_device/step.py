"""One training step: a batch in micro-batches, exactly the loop of `docs/artifact.md`.

In one pass, backward follows forward in every micro-batch: its tensors are gone before the next is read,
only the statistics stay.  In two passes, all forwards come first and what backward needs of each
micro-batch is kept: in a package that asks for this, mostly masks, a bit a value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lance_device.features import Batch, Features
from lance_device.layerwise import LayerwiseStep
from lance_device.measure import PhaseMeter
from lance_device.session import Array
from lance_device.step_graphs import (
    Kept,
    StepGraphs,
    StepOutcome,
    count_correct,
    micro_batches,
    total_bytes,
)
from lance_edge.bundle import Bundle
from lance_edge.manifest import Variant
from lance_edge.names import LABELS, LOGITS
from lance_edge.targets import Targets

Float = NDArray[np.float32]


class TrainingStep(Protocol):
    """Loss and gradients of a batch, and what a method remembers from step to step."""

    def run(
        self, batch: Batch, micro_batch: int, meter: PhaseMeter, before_each: Callable[[], None]
    ) -> StepOutcome:
        """Loss and gradients of a batch; nothing is updated.

        Args:
            micro_batch: samples in memory at a time.
            before_each: called before every micro-batch; may raise to leave the step.

        Raises:
            DataError: if an image cannot be read.
            NumericalError: if the loss or a gradient is not finite, naming the layer.
        """

    def state(self) -> dict[str, Float]:
        """What the next step depends on beside the weights, by name; empty for most methods."""

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Go on from `state()`.

        Raises:
            CheckpointError: if it is not of this method and package.
        """


def training_step(
    bundle: Bundle,
    variant: Variant,
    parameters: dict[str, Float],
    threads: int,
    features: Features | None = None,
    targets: Targets | None = None,
) -> TrainingStep:
    """The step of a variant, by its schedule.

    Args:
        parameters: the trainable tensors; read at every step, so an optimiser updates them in place.
        features: where boundary tensors come from; by default the package's prefix computes them.
        targets: of each class; by default those of ordinary cross-entropy.

    Raises:
        ArtifactError: if graphs and manifest do not fit together.
    """
    graphs = StepGraphs(bundle, variant, parameters, threads, features, targets)
    if variant.schedule == "by layer":
        threadpool_limits(
            threads, user_api="blas"
        )  # numpy's, which the codecs use; it takes all cores otherwise
        return LayerwiseStep(graphs, bundle.manifest)
    return StreamedStep(graphs)


class StreamedStep:
    """Forward and backward of one micro-batch after the other, in one pass or two."""

    def __init__(self, graphs: StepGraphs) -> None:
        self._graphs = graphs
        (self._forward,) = graphs.forward
        self._two_passes = graphs.variant.schedule == "two passes"

    def state(self) -> dict[str, Float]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Float]) -> None:
        """Nothing."""

    def run(
        self, batch: Batch, micro_batch: int, meter: PhaseMeter, before_each: Callable[[], None]
    ) -> StepOutcome:
        """See `TrainingStep`."""
        graphs = self._graphs
        with meter.phase("forward"):
            constants = graphs.constants(batch)
        sums = _Sums()
        waiting: list[_Waiting] = []
        for rows in micro_batches(len(batch), micro_batch):
            before_each()
            waiting.append(self._run_forward(batch, rows, constants, sums, meter))
            if not self._two_passes:
                self._run_backward(waiting.pop(), constants, sums, meter)
        while waiting:
            before_each()
            self._run_backward(waiting.pop(), constants, sums, meter)
        with meter.phase("backward"):
            gradients = graphs.gradients(sums.statistics, constants)
        saved_bytes = sums.peak_kept_bytes + total_bytes(sums.statistics) + graphs.projection_bytes
        return StepOutcome(sums.loss / graphs.total_weight(batch), sums.correct, gradients, saved_bytes)

    def _run_forward(
        self, batch: Batch, rows: slice, constants: Mapping[str, Array], sums: "_Sums", meter: PhaseMeter
    ) -> "_Waiting":
        """Features and forward of a micro-batch; adds to the sums and gives what backward needs."""
        graphs, fed = self._graphs, batch.fed(rows)
        values = graphs.features.boundary(batch, rows, meter)
        with meter.phase("forward"):
            values |= self._forward.run({**constants, **graphs.own_rows(rows), **values, **fed})
            graphs.accumulate(sums.statistics, values)
            sums.loss += graphs.finite_loss(values)
            sums.correct += count_correct(values[LOGITS], fed[LABELS])
            kept = Kept.of({name: values[name] for name in graphs.crossing})
        sums.hold(kept)
        return _Waiting(rows, fed, kept)

    def _run_backward(
        self, waiting: "_Waiting", constants: Mapping[str, Array], sums: "_Sums", meter: PhaseMeter
    ) -> None:
        """Backward of a micro-batch; adds to the sums."""
        graphs = self._graphs
        with meter.phase("backward"):
            fed = {**constants, **sums.statistics, **graphs.own_rows(waiting.rows), **waiting.fed}
            graphs.accumulate(sums.statistics, graphs.backward.run(fed | waiting.kept.tensors()))
        sums.release(waiting.kept)


@dataclass(frozen=True)
class _Waiting:
    """A micro-batch between forward and backward; `fed` are its labels and seeds of dropout."""

    rows: slice
    fed: dict[str, NDArray[np.int64]]
    kept: Kept


@dataclass
class _Sums:
    """What a batch adds up; `loss` is a sum over its samples."""

    statistics: dict[str, Array] = field(default_factory=dict)
    loss: float = 0.0
    correct: int = 0
    kept_bytes: int = 0
    peak_kept_bytes: int = 0

    def hold(self, kept: Kept) -> None:
        """Count what a micro-batch keeps."""
        self.kept_bytes += kept.nbytes
        self.peak_kept_bytes = max(self.peak_kept_bytes, self.kept_bytes)

    def release(self, kept: Kept) -> None:
        """It is gone."""
        self.kept_bytes -= kept.nbytes
