"""Latency profiles: the rows of `steps.csv`, `history.csv` and `summary.csv`, typed.

The columns of a file are the fields of its row, in order.  An empty cell is a value that this machine
could not give (`None`), a flag is 0 or 1.  The device writes these files; reports on any machine read them.
"""

import csv
import dataclasses
import math
import re
import types
import typing
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from lance_edge.errors import DataError

STEP_PHASES = ("data", "prefix", "forward", "backward", "update")  # "step" is their sum
PHASES = (*STEP_PHASES, "step", "eval", "checkpoint", "pause")

# May be nan or inf: a step that was not applied, a network that overflows.  Every other number is finite.
LOSSES = frozenset({"loss", "train_loss", "validation_loss", "test_loss"})

Row = TypeVar("Row")


@dataclass(frozen=True)
class StepRow:
    """One phase of one training step (`steps.csv`).

    Attributes:
        run_id: of the run, as in `run.json`: when it began (UTC), and six random digits.
        method: `lance`, `bp`, `asi` or `hosvd`.
        model: the network's name in the package.
        layers: trained layers.
        energy: the package's energy threshold; `None` for a method that compresses nothing, or whose ranks a
            memory budget chose.
        batch_size, micro_batch: images of a step, and of those that are in memory at a time.
        threads: of ONNX Runtime.
        epoch, step: from 1; the epoch in which the step's first sample lies.
        warmup: the first step after the start of a process: kept, but not in summaries.
        phase: `data`, `prefix`, `forward`, `backward`, `update`; `step`, their sum; `eval`, `checkpoint`,
            `pause`.
        latency_ms: wall time in milliseconds, summed over the micro-batches.
        rss_kib, peak_rss_kib: resident memory in KiB at the end of the phase, and its peak during the phase.
        loss: mean cross-entropy over the batch; nan of a step that was not applied.
        temperature_c: of the processor, in degrees Celsius.
        arm_mhz: clock of the processor's cores, in MHz.
        throttled: the firmware's flags, as `vcgencmd get_throttled` prints them (`0x50000`).
        time_s: seconds of training so far, earlier parts of a resumed run included.
        samples: images that the phase worked on.
        cached: features of the frozen part were read, not computed.
        activation_bytes: the paper's figure, in bytes: layer inputs, or cores and factors.
        saved_bytes: measured, in bytes: everything alive between forward and backward, statistics included.
    """

    run_id: str
    method: str
    model: str
    layers: int
    energy: float | None
    batch_size: int
    micro_batch: int
    threads: int
    epoch: int
    step: int
    warmup: bool
    phase: str
    latency_ms: float
    rss_kib: int | None
    peak_rss_kib: int | None
    loss: float | None
    temperature_c: float | None
    arm_mhz: float | None
    throttled: str | None
    time_s: float
    samples: int
    cached: bool
    activation_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class HistoryRow:
    """One evaluation (`history.csv`); losses are means, accuracies fractions of 1.

    `train_loss` and `train_accuracy` are running figures over the steps since the row before.

    Attributes:
        epoch, step: from 1, after which it was made.
        learning_rate: of the step before.
        train_loss, train_accuracy: mean cross-entropy, and fraction of 1, over the steps since the row before.
        validation_accuracy, validation_loss: on the validation images; empty without any.
        test_accuracy, test_loss: on the test images; empty without any.
        best: it is the best so far, and `best.npz` is of it.
        time_s: seconds of training so far, earlier parts of a resumed run included.
    """

    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_accuracy: float | None
    validation_loss: float | None
    test_accuracy: float | None
    test_loss: float | None
    best: bool
    time_s: float


MOST_KEPT = 4096  # latencies of a phase that percentiles are taken from


@dataclass(frozen=True)
class SummaryRow:
    """Latency of one phase over all steps but the warm-ups (`summary.csv`).

    Attributes:
        phase: as in `steps.csv`.
        n: rows that were counted.
        mean_ms, std_ms: mean and standard deviation, in milliseconds.
        min_ms, max_ms: the shortest and the longest, in milliseconds.
        p50_ms, p90_ms, p99_ms: percentiles, in milliseconds; the 50th is the median.
    """

    phase: str
    n: int
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


class LatencyCollector:
    """Gathers rows into summaries, in a memory that does not grow with the run."""

    def __init__(self) -> None:
        self._phases: dict[str, _Latencies] = {}

    def add(self, row: StepRow) -> None:
        """Count a row, unless it is a warm-up."""
        if not row.warmup:
            self._phases.setdefault(row.phase, _Latencies()).add(row.latency_ms)

    def rows(self) -> tuple[SummaryRow, ...]:
        """Latency per phase, in the order of `PHASES`; phases that never ran are left out."""
        return tuple(self._phases[phase].summary(phase) for phase in PHASES if phase in self._phases)


class _Latencies:
    """Those of one phase: count, mean, deviation, least and largest exactly, percentiles from what is kept.

    All are kept up to `MOST_KEPT`; of more, every second, then every fourth and so on, evenly over the run.
    """

    def __init__(self) -> None:
        self._kept: array[float] = array("d")
        self._stride, self._count = 1, 0
        self._mean, self._squares = 0.0, 0.0  # squares: of the distances from the mean (Welford 1962)
        self._least, self._largest = math.inf, -math.inf

    def add(self, latency_ms: float) -> None:
        if self._count % self._stride == 0:
            if len(self._kept) == MOST_KEPT:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            if self._count % self._stride == 0:
                self._kept.append(latency_ms)
        self._count += 1
        distance = latency_ms - self._mean
        self._mean += distance / self._count
        self._squares += distance * (latency_ms - self._mean)
        self._least, self._largest = min(self._least, latency_ms), max(self._largest, latency_ms)

    def summary(self, phase: str) -> SummaryRow:
        p50, p90, p99 = np.percentile(np.array(self._kept), (50, 90, 99))
        return SummaryRow(
            phase=phase,
            n=self._count,
            mean_ms=self._mean,
            std_ms=math.sqrt(self._squares / (self._count - 1)) if self._count > 1 else 0.0,
            min_ms=self._least,
            p50_ms=float(p50),
            p90_ms=float(p90),
            p99_ms=float(p99),
            max_ms=self._largest,
        )


def summarise(rows: Iterable[StepRow]) -> tuple[SummaryRow, ...]:
    """The content of `summary.csv` for the rows of `steps.csv`."""
    collector = LatencyCollector()
    for row in rows:
        collector.add(row)
    return collector.rows()


def finite(loss: float | None) -> float | None:
    """A loss, or `None` where it is no number: what a person is shown."""
    return loss if loss is not None and math.isfinite(loss) else None


def columns(kind: type) -> tuple[str, ...]:
    """The header of the file that holds rows of this kind."""
    return tuple(field.name for field in dataclasses.fields(kind))


def cells(row: Any) -> list[str]:
    """The row as text, one cell a column."""
    return [_cell(getattr(row, name)) for name in columns(type(row))]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return format(value, ".9g")  # nine digits bring back every float32
    return str(value)


class OtherColumnsError(DataError):
    """A whole file of another kind, or of another version."""


def read_rows(path: Path, kind: type[Row], undecodable: str = "strict") -> Iterator[Row]:
    """The rows of a file, one after the other.

    Args:
        undecodable: what becomes of bytes that are no UTF-8, as names of files may have: see `open`.

    Raises:
        DataError: naming file, line and column of the first thing that is not a row of this kind.
    """
    try:
        with path.open(newline="", encoding="utf-8", errors=undecodable) as file:
            yield from _parse(file.readline(), csv.reader(file), kind, str(path))
    except OSError as error:
        raise DataError(
            f"{path}: cannot read ({error.strerror or error}); expected a CSV file of a training run"
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable CSV file ({error}); copy it again") from None


def read_intact_rows(path: Path, kind: type[Row]) -> Iterator[Row]:
    """Like `read_rows`, but ends quietly at the first unreadable row.

    A board that lost power in the middle of a write leaves a torn last row; everything before it counts.

    Raises:
        DataError: if the file has a whole header, of other columns: another version wrote it.
    """
    try:
        yield from read_rows(path, kind)
    except OtherColumnsError:
        raise
    except DataError:
        return


def _parse(header: str, reader: Iterator[list[str]], kind: type[Row], where: str) -> Iterator[Row]:
    parser = RowParser(kind, where)
    parser.check_header(next(csv.reader([header]), []), is_whole=header.endswith("\n"))
    for line, texts in enumerate(reader, start=2):
        yield parser.row(texts, line)


class RowParser(Generic[Row]):
    """Turns the cells of one file into rows of one kind."""

    def __init__(self, kind: type[Row], where: str) -> None:
        """`where` begins every message: the file's name."""
        hints = typing.get_type_hints(kind)
        self._kind, self._where, self._names = kind, where, columns(kind)
        self._columns = [_Column(name, hints[name]) for name in self._names]

    def check_header(self, header: list[str], is_whole: bool = True) -> None:
        """Refuse the columns of another kind.

        Args:
            is_whole: its line has an end; one without may be cut off.

        Raises:
            DataError: if they are others, or cut off.
        """
        names = self._names
        is_cut = not is_whole or not header
        if tuple(header) != names and not (is_cut and ",".join(names).startswith(",".join(header))):
            missing = [name for name in names if name not in header]
            unknown = [name for name in header if name not in names]
            raise OtherColumnsError(
                f"{self._where}: expected the columns {','.join(names)}; missing {missing}, unknown {unknown};"
                " read it with the version of lance-edge that wrote it"
            )
        if tuple(header) != names:
            raise DataError(f"{self._where}: its header is cut off; copy the file again")

    def row(self, texts: list[str], line: int) -> Row:
        """The row in a line, counted from 1.

        Raises:
            DataError: naming line and column of the first cell that does not fit.
        """
        if len(texts) != len(self._names):
            raise DataError(
                f"{self._where} line {line}: expected {len(self._names)} cells, found {len(texts)};"
                " the file is cut off or was edited"
            )
        values = {}
        for number, (column, text) in enumerate(zip(self._columns, texts, strict=True), start=1):
            try:
                values[column.name] = column.value(text)
            except ValueError:
                raise DataError(
                    f"{self._where} line {line}, column {number} ({column.name}): expected"
                    f" {column.expected}, found {text!r}; the file was edited or damaged"
                ) from None
        return self._kind(**values)


class _Column:
    """How the texts of one column become values."""

    def __init__(self, name: str, hint: Any) -> None:
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        self.name, self._is_optional = name, types.NoneType in kinds
        self.expected, self._parse = _KINDS[kinds[0]]
        if name in LOSSES:
            self._parse = _any_number

    def value(self, text: str) -> Any:
        return None if text == "" and self._is_optional else self._parse(text)


def _whole_number(text: str) -> int:
    if re.fullmatch(r"-?[0-9]+", text) is None:  # int() also takes " 1_0 "
        raise ValueError(text)
    return int(text)


def _any_number(text: str) -> float:
    if re.fullmatch(r"[-+]?([0-9.]+(e[-+]?[0-9]+)?|nan|inf)", text) is None:  # float() also takes " 1_0 "
        raise ValueError(text)
    return float(text)


def _finite_number(text: str) -> float:
    number = _any_number(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


_KINDS: dict[type, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", _whole_number),
    float: ("a number", _finite_number),
    bool: ("0 or 1", _flag),
    str: ("text", str),
}
