"""Recorded latency profiles: a folder with `steps.csv`, `summary.csv` and `run.json` of a run or benchmark."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_edge.bench_rows import BenchRow, BenchSummaryRow
from lance_edge.errors import DataError
from lance_edge.profiles import PHASES, StepRow, SummaryRow, columns, read_rows

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Recording:
    """What was measured, where, and with what.

    Attributes:
        record: `run.json`: machine, versions, session options, arguments, the package's SHA-256.
        steps: a row for each phase of each step; in a benchmark each is a `BenchRow`.
        summary: latencies of each phase; of a benchmark, of each phase of each setting.
    """

    record: Mapping[str, Any]
    steps: tuple[StepRow, ...]
    summary: tuple[SummaryRow, ...] | tuple[BenchSummaryRow, ...]

    @property
    def is_benchmark(self) -> bool:
        """Whether `lance-device bench` measured it."""
        return bool(self.steps) and isinstance(self.steps[0], BenchRow)


def read_recording(folder: Path | str) -> Recording:
    """Read and check a whole recording.

    Raises:
        DataError: naming file, line and column of the first thing that does not fit.
    """
    folder = Path(folder)
    record = read_record(folder / "run.json")
    steps_path, summary_path = folder / "steps.csv", folder / "summary.csv"
    if _header(steps_path) == list(columns(BenchRow)):
        steps: tuple[StepRow, ...] = tuple(read_rows(steps_path, BenchRow))
        _check_steps(steps_path, steps)
        return Recording(record, steps, tuple(read_rows(summary_path, BenchSummaryRow)))
    steps = tuple(read_rows(steps_path, StepRow))
    _check_steps(steps_path, steps)
    return Recording(record, steps, tuple(read_rows(summary_path, SummaryRow)))


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().rstrip("\r\n").split(",")
    except (OSError, UnicodeDecodeError):
        return []  # `read_rows` says what is wrong


def _check_steps(path: Path, rows: tuple[StepRow, ...]) -> None:
    """What the types leave open."""
    if not rows:
        raise DataError(
            f"{path} line 2, column 1: expected a row for each phase of each step, found none;"
            " copy the recording again"
        )
    names = columns(type(rows[0]))
    for line, row in enumerate(rows, start=2):
        wrong = {
            "phase": (row.phase not in PHASES, f"one of {', '.join(PHASES)}"),
            "latency_ms": (row.latency_ms < 0, "no time below zero"),
            "batch_size": (row.batch_size < 1, "1 or more"),
            "micro_batch": (row.micro_batch < 1, "1 or more"),
        }
        for name, (is_wrong, expected) in wrong.items():
            if is_wrong:
                raise DataError(
                    f"{path} line {line}, column {names.index(name) + 1} ({name}): expected {expected},"
                    f" found {getattr(row, name)!r}; copy the recording again"
                )


def read_record(path: Path) -> Mapping[str, Any]:
    """A `run.json`, with its parts `machine`, `versions` and `artifact`.

    Raises:
        DataError: naming what does not fit.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path} {place}: not JSON ({error.msg}); copy the recording again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read ({error}); expected the record of a run") from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} line 1, column 1: expected a record of schema {SCHEMA_VERSION}, found {version!r};"
            " read it with the version of lance-edge that wrote it"
        )
    for name in ("machine", "versions", "artifact"):
        if not isinstance(record.get(name), dict):
            found = "another type" if name in record else "none"
            raise DataError(
                f"{path} line 1, column 1: expected an entry {name!r} with an object, found {found};"
                " copy the recording again"
            )
    return record  # type: ignore[no-any-return]
