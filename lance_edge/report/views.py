"""Runs and benchmarks as a report sees them, read in a memory that does not grow with them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_edge.bench_rows import BenchRow
from lance_edge.profiles import STEP_PHASES, HistoryRow, StepRow, finite
from lance_edge.recordings import read_record
from lance_edge.report.costs import Costs, Setting, setting_of
from lance_edge.report.machines import Machine, machine_of
from lance_edge.report.tail import StartedOver, Tail
from lance_edge.report.thin import Thin
from lance_edge.throttling import flags_of, troubles

MOST_HISTORY = 1000  # evaluations that are kept; of more, every second
STEP_KINDS = (StepRow, BenchRow)


@dataclass(frozen=True)
class Files:
    """What there is of a run: any of the three may be missing."""

    name: str
    steps: Path | None
    history: Path | None
    record: Path | None


class View:
    """A run or a benchmark.  `update` reads what has been written since.

    Attributes:
        costs: by setting, in the order in which they were first measured.
        loss: over steps; memory, heat and clock over seconds of training.
        history: evaluations.
        latest: the newest row of each phase.
        peak_rss_kib: the highest of all rows, evaluations among them.
        steps: of training, so far.
        throttled: the firmware's flags of now, by the seconds at which they were read.
        is_lost: its process is gone.  No file says so: whoever finds out sets it.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.name = files.name
        self.record: Mapping[str, Any] | None = None
        self._record_seen: tuple[int, int] | None = None
        self.is_lost = False
        self._begin()

    def _begin(self) -> None:
        self._steps = None if self.files.steps is None else Tail(self.files.steps, STEP_KINDS)
        self._history = None if self.files.history is None else Tail(self.files.history, (HistoryRow,))
        self.costs: dict[Setting, Costs] = {}
        self.loss, self.rss_mib, self.peak_mib = Thin(), Thin(), Thin()
        self.peak_rss_kib: int | None = None
        self.temperature_c, self.arm_mhz, self.throttled = Thin(), Thin(), Thin()
        self.history: list[HistoryRow] = []
        self._history_stride, self._history_count = 1, 0
        self.last_evaluation: HistoryRow | None = None
        self.latest: dict[str, StepRow] = {}
        self.steps, self.is_benchmark = 0, False
        self.troubles: set[str] = set()

    def update(self) -> bool:
        """Read what is new; whether there was anything.

        Raises:
            DataError: naming file, line and column of what is not a row, or not a record.
        """
        try:
            return self._take_in()
        except StartedOver:
            self._begin()
            self._take_in()
            return True

    def _take_in(self) -> bool:
        is_new = self._read_record()
        for row in self._steps.rows() if self._steps is not None else ():
            self._add_step(row)
            is_new = True
        for evaluation in self._history.rows() if self._history is not None else ():
            self._add_evaluation(evaluation)
            is_new = True
        return is_new

    def _read_record(self) -> bool:
        path = self.files.record
        if path is None:
            return False
        try:
            status = path.stat()
        except OSError:
            return False
        seen = (status.st_mtime_ns, status.st_size)
        if seen == self._record_seen:
            return False
        self.record, self._record_seen = read_record(path), seen
        return True

    def _add_step(self, row: StepRow) -> None:
        self.latest[row.phase] = row
        if row.peak_rss_kib is not None:
            self.peak_rss_kib = max(self.peak_rss_kib or 0, row.peak_rss_kib)
        self.is_benchmark = isinstance(row, BenchRow)
        if row.phase in STEP_PHASES or row.phase == "step":
            self.costs.setdefault(setting_of(row), Costs()).add(row)
        self.troubles.update(troubles(flags_of(row.throttled)))
        if not self.is_benchmark:  # the processes of a benchmark have no common time
            self._add_to_series(row)
        if row.phase == "step":
            self.steps = row.step if not self.is_benchmark else self.steps + 1

    def _add_to_series(self, row: StepRow) -> None:
        if row.phase not in ("step", "eval"):
            return
        self.rss_mib.add(row.time_s, _mib(row.rss_kib))
        self.peak_mib.add(row.time_s, _mib(row.peak_rss_kib))
        self.temperature_c.add(row.time_s, row.temperature_c)
        self.arm_mhz.add(row.time_s, row.arm_mhz)
        self.throttled.add(row.time_s, float(bool(troubles(flags_of(row.throttled)))))
        if row.phase == "step":
            self.loss.add(row.step, finite(row.loss))

    def _add_evaluation(self, row: HistoryRow) -> None:
        self.last_evaluation = row
        if self._history_count % self._history_stride == 0:
            if len(self.history) == MOST_HISTORY:
                self.history, self._history_stride = self.history[::2], 2 * self._history_stride
            self.history.append(row)
        self._history_count += 1

    def measured(self) -> dict[Setting, Costs]:
        """Settings of which there is more than warm-ups; all, if there is nothing else."""
        found = {setting: costs for setting, costs in self.costs.items() if "step" in costs.phases()}
        return found or self.costs

    @property
    def evaluations(self) -> tuple[HistoryRow, ...]:
        """Those that are kept, the newest among them."""
        last = self.last_evaluation
        return (*self.history, *((last,) if last is not None and last is not self.history[-1] else ()))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not self.latest and not self.history

    @property
    def is_torn(self) -> bool:
        """Whether the last row of a file is cut off."""
        return any(tail is not None and tail.is_torn for tail in (self._steps, self._history))

    @property
    def machine(self) -> Machine:
        """Where it was measured."""
        return machine_of(self.record, self.name)

    @property
    def method(self) -> str:
        """Of a run; of a benchmark the first one."""
        return next((setting.method for setting in self.costs), self.fact("options", "method") or "unknown")

    @property
    def model(self) -> str:
        """The network's name, empty where no step was made."""
        return next((row.model for row in self.latest.values()), "")

    @property
    def status(self) -> str | None:
        """`running`, `finished`, `interrupted`, `failed`, `lost`, or `None` without a record."""
        if self.is_lost:
            return "lost"
        return None if self.record is None else str(self.record.get("status"))

    @property
    def total_steps(self) -> int | None:
        """Of the whole run, where the record says."""
        total = self.fact("total_steps")
        return total if isinstance(total, int) else None

    @property
    def test_accuracy(self) -> float | None:
        """Of the last evaluation, a fraction of 1."""
        return None if self.last_evaluation is None else self.last_evaluation.test_accuracy

    def fact(self, *path: str) -> Any:
        """An entry of the record, `None` where there is none: `fact("artifact", "path")`."""
        value: Any = self.record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def fact_text(self, *path: str) -> str:
        """The same as text, `-` where there is none."""
        value = self.fact(*path)
        if value is None or value == "":
            return "-"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mib(kib: int | None) -> float | None:
    return None if kib is None else kib / 1024
