"""The record of a run while it goes on: rows, summaries, `run.json`."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from lance_device.measure import PhaseCost, RowLog, highest, write_rows
from lance_device.probe import HealthProbe, MemoryProbe
from lance_device.run_description import describe_run
from lance_device.run_record import (
    now_utc,
    write_record,
)
from lance_device.run_setup import Run, TrainRequest
from lance_device.schedule import PLATEAU
from lance_device.step_graphs import StepOutcome
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset
from lance_edge.profiles import (
    PHASES,
    HistoryRow,
    LatencyCollector,
    StepRow,
    SummaryRow,
    read_rows,
)
from lance_edge.throttling import flags_of, troubles


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; accuracies are fractions of 1, of the last and of the best evaluation.

    `median_ms` is per phase, warm-ups left out.  `throttled` is what the board complained of during the run.
    """

    status: str
    step: int
    total_steps: int
    epoch: int
    train_loss: float | None
    test_accuracy: float | None
    validation_accuracy: float | None
    best_epoch: int | None
    best_chosen_by: str
    best_validation_accuracy: float | None
    best_test_accuracy: float | None
    activation_bytes: int
    saved_bytes: int
    peak_rss_kib: int | None
    seconds: float
    median_ms: dict[str, float]
    max_temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    paused_s: float = 0.0


class RunLog:
    """Writes rows as they come, and everything else at the end.

    Attributes:
        latest: the newest row of each phase.
        last_evaluation: the newest, of an earlier part of the run too.
    """

    def __init__(
        self,
        request: TrainRequest,
        run: Run,
        bundle: Bundle,
        dataset: Dataset,
        memory: MemoryProbe,
        health: HealthProbe,
    ) -> None:
        """Open the CSV files and write `run.json` as "running"."""
        self._run, self._dataset = run, dataset
        self._started_at, self._started_step = time.monotonic(), run.progress.step
        self._seconds_before = run.progress.seconds
        self._health = health
        self._paused_s, self._throttled = 0.0, 0
        self._max_temperature_c: float | None = None
        self.latest: dict[str, StepRow] = {}
        self._collector = LatencyCollector()
        self._peak_rss_kib: int | None = None
        self._saved_bytes, self._activation_bytes = 0, run.variant.activation_bytes
        self.last_evaluation: HistoryRow | None = None
        self._is_at_checkpoint = True
        self._steps = RowLog(run.folder.steps, StepRow)
        self._history = RowLog(run.folder.history, HistoryRow)
        self._take_up_earlier_rows()
        self._common = _common_cells(run, bundle)
        self._record = describe_run(request, run, bundle, dataset, memory.peak_source)
        write_record(run.folder.record, {**self._record, "status": "running"})

    def seconds(self) -> float:
        """Training time so far, earlier parts of the run included."""
        return self._seconds_before + time.monotonic() - self._started_at

    def seconds_left(self) -> float:
        """At the speed of this part of the run, evaluations and checkpoints included."""
        done = self._run.progress.step - self._started_step
        elapsed_s = time.monotonic() - self._started_at
        return elapsed_s / max(done, 1) * (self._run.total_steps - self._run.progress.step)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, in which the first sample of a step (from 1) lies."""
        stream = self._run.stream
        return (step - 1) * stream.batch_size // stream.count + 1

    def step(self, outcome: StepOutcome, costs: dict[str, PhaseCost], cached: bool) -> None:
        """A row per phase of a complete step; `cached`: all of its features came from the cache."""
        self._is_at_checkpoint = False
        self._saved_bytes = max(self._saved_bytes, outcome.saved_bytes)
        if outcome.activation_bytes is not None:  # a method whose ranks differ from step to step
            self._activation_bytes = outcome.activation_bytes
        samples = self._run.stream.batch_size
        is_warmup = self._run.progress.step == self._started_step + 1
        phases = [(phase, costs[phase]) for phase in PHASES if phase in costs]
        self._write(phases, outcome.loss, samples, is_warmup, cached)

    def keep(self) -> None:
        """Make all rows so far durable, and put on record what they are.

        Raises:
            StorageError: if the storage cannot keep them.
        """
        self._steps.sync()
        self._history.sync()
        self.mark()

    def mark(self) -> None:
        """Put on record what the rows so far are."""
        self._run.progress.rows |= {log.name: log.mark() for log in (self._steps, self._history)}

    def evaluation(self, row: HistoryRow, samples: int, cost: PhaseCost, cached: bool) -> None:
        """An evaluation of so many images."""
        self._is_at_checkpoint = False
        self.last_evaluation = row
        self._history.write(row)
        self._write([("eval", cost)], None, samples, cached=cached)

    def pause(self, cost: PhaseCost) -> None:
        """The run has paused."""
        self._write([("pause", cost)], None, 0)

    def checkpoint(self, cost: PhaseCost) -> None:
        """A checkpoint was written."""
        self._is_at_checkpoint = True
        self._write([("checkpoint", cost)], None, 0)

    def finish(self, status: str, message: str = "") -> TrainResult:
        """Complete the files.

        Args:
            status: `finished`, `interrupted` or `failed`.
            message: what went wrong.
        """
        self._steps.sync()
        self._history.sync()
        rows = {log.name: asdict(log.mark()) for log in (self._steps, self._history)}
        if not self._is_at_checkpoint:  # steps or evaluations that last.npz does not know: they will come again
            rows = {}
        self._steps.close()
        self._history.close()
        summary = self._collector.rows()
        write_rows(self._run.folder.summary, SummaryRow, summary)
        result = self._result(status, {row.phase: row.p50_ms for row in summary})
        end: dict[str, Any] = {
            "status": status,
            "ended": now_utc(),
            "message": message,
            "result": asdict(result),
            "rows": rows,
        }
        write_record(self._run.folder.record, {**self._record, **end})
        return result

    def _write(
        self,
        costs: list[tuple[str, PhaseCost]],
        loss: float | None,
        samples: int,
        is_warmup: bool = False,
        cached: bool = False,
    ) -> None:
        progress, health = self._run.progress, self._health.read()
        rows = [
            StepRow(
                **self._common,
                epoch=max(self.epoch_of(progress.step), 1),
                step=progress.step,
                warmup=is_warmup,
                phase=phase,
                latency_ms=cost.latency_ms,
                rss_kib=cost.rss_kib,
                peak_rss_kib=cost.peak_rss_kib,
                loss=loss,
                temperature_c=health.temperature_c,
                arm_mhz=health.arm_mhz,
                throttled=health.throttled,
                time_s=self.seconds(),
                samples=samples,
                cached=cached,
                activation_bytes=self._activation_bytes,
                saved_bytes=self._saved_bytes,
            )
            for phase, cost in costs
        ]
        self._steps.write(*rows)
        for row in rows:
            self._take_in(row)

    def _take_in(self, row: StepRow) -> None:
        self.latest[row.phase] = row
        self._collector.add(row)
        self._peak_rss_kib = highest(self._peak_rss_kib, row.peak_rss_kib)
        self._saved_bytes = max(self._saved_bytes, row.saved_bytes)
        self._throttled |= flags_of(row.throttled)
        if row.temperature_c is not None:
            self._max_temperature_c = max(self._max_temperature_c or row.temperature_c, row.temperature_c)
        if row.phase == "pause":
            self._paused_s += row.latency_ms * 1e-3

    def _take_up_earlier_rows(self) -> None:
        for row in read_rows(self._run.folder.steps, StepRow):
            self._take_in(row)
        for evaluation in read_rows(self._run.folder.history, HistoryRow):
            self.last_evaluation = evaluation

    def _result(self, status: str, median_ms: dict[str, float]) -> TrainResult:
        progress, last, best = self._run.progress, self.last_evaluation, self._run.progress.best
        has_validation = len(self._dataset.validation) > 0
        return TrainResult(
            status=status,
            step=progress.step,
            total_steps=self._run.total_steps,
            epoch=progress.epoch,
            train_loss=last.train_loss if last else None,
            test_accuracy=last.test_accuracy if last else None,
            validation_accuracy=last.validation_accuracy if last else None,
            best_epoch=best.epoch if best else None,
            best_chosen_by=_chosen_by(self._run, has_validation),
            best_validation_accuracy=best.validation_accuracy if best else None,
            best_test_accuracy=best.test_accuracy if best else None,
            activation_bytes=self._activation_bytes,
            saved_bytes=self._saved_bytes,
            peak_rss_kib=self._peak_rss_kib,
            seconds=progress.seconds,
            median_ms=median_ms,
            max_temperature_c=self._max_temperature_c,
            throttled=troubles(self._throttled),
            paused_s=self._paused_s,
        )


def _chosen_by(run: Run, has_validation: bool) -> str:
    """What makes one evaluation better than another; see `keeper.is_better`."""
    if not has_validation:
        return "training loss"
    return "validation loss" if run.options.schedule == PLATEAU else "validation accuracy"


def _common_cells(run: Run, bundle: Bundle) -> dict[str, Any]:
    """Cells that are the same in every row of a run."""
    return {
        "run_id": run.run_id,
        "method": run.variant.method,
        "model": bundle.manifest.model,
        "layers": len(run.variant.layers),
        "energy": run.variant.energy,
        "batch_size": run.stream.batch_size,
        "micro_batch": run.options.micro_batch,
        "threads": run.options.threads,
    }
