"""Timing phases, and writing the rows of a run."""

import contextlib
import csv
import errno
import io
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lance_device.checkpoint import FileMark
from lance_device.probe import MemoryProbe
from lance_edge.errors import StorageError
from lance_edge.files import atomic_writer, file_digest, sync_folder
from lance_edge.profiles import STEP_PHASES, cells, columns


@dataclass
class PhaseCost:
    """Time and memory of one phase, over the micro-batches of a step."""

    latency_ns: int = 0
    rss_kib: int | None = None
    peak_rss_kib: int | None = None

    @property
    def latency_ms(self) -> float:
        """Wall time."""
        return self.latency_ns * 1e-6

    def add(self, latency_ns: int, rss_kib: int | None, peak_rss_kib: int | None) -> None:
        """One more stretch: times add up, the peak is the highest, the size is the latest."""
        self.latency_ns += latency_ns
        self.rss_kib = rss_kib
        self.peak_rss_kib = highest(self.peak_rss_kib, peak_rss_kib)


def highest(*values: int | None) -> int | None:
    """The largest known value, `None` if none is known."""
    return max((value for value in values if value is not None), default=None)


class PhaseMeter:
    """Times the phases of a step with a monotonic clock and reads memory at their ends."""

    def __init__(self, memory: MemoryProbe) -> None:
        self._memory = memory
        self._costs: dict[str, PhaseCost] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as (a further stretch of) this phase; nothing counts if it raises."""
        self._memory.reset_peak()
        start_ns = time.perf_counter_ns()
        yield
        latency_ns = time.perf_counter_ns() - start_ns
        memory = self._memory.read()
        self._costs.setdefault(name, PhaseCost()).add(latency_ns, memory.rss_kib, memory.peak_rss_kib)

    def take_step(self) -> dict[str, PhaseCost]:
        """The phases since the last call, with `step` as their sum."""
        costs, self._costs = self._costs, {}
        step = PhaseCost()
        for name in STEP_PHASES:
            cost = costs.get(name, PhaseCost())
            step.add(cost.latency_ns, cost.rss_kib, cost.peak_rss_kib)
        return {**costs, "step": step}

    def take(self, name: str) -> PhaseCost:
        """One phase outside of a step."""
        return self._costs.pop(name)


class RowLog:
    """A CSV file that grows by whole rows.

    Rows reach the kernel at once but are synced only before a checkpoint, to spare an SD card; a power cut
    may cost the rows since then, whose steps a resumed run does again.
    """

    def __init__(self, path: Path, kind: type) -> None:
        """Open for appending; a new file gets its header."""
        self.name = path.name
        self._path = path
        try:
            self._file: BinaryIO = path.open("ab", buffering=0)
            self._size = os.fstat(self._file.fileno()).st_size
            self._digest = file_digest(path)
            if self._size == 0:
                sync_folder(path.parent)
        except OSError as error:
            raise _cannot_write(path, error) from None
        if self._size == 0:
            self._append(_line(columns(kind)))

    def write(self, *rows: Any) -> None:
        """Append rows, all or none of them.

        Raises:
            StorageError: if they cannot be written.
        """
        self._append(b"".join(_line(cells(row)) for row in rows))

    def sync(self) -> None:
        """Make all rows so far durable.

        Raises:
            StorageError: if the storage cannot keep them.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from None

    def mark(self) -> FileMark:
        """All rows so far."""
        return FileMark(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Done."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        try:
            if self._file.write(data) != len(data):  # the disk became full in the middle
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)  # take a torn row back
            raise _cannot_write(self._path, error) from None
        self._size += len(data)
        self._digest.update(data)


def write_rows(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Write a whole CSV file, atomically."""
    with atomic_writer(path) as file:
        for line in csv_lines(kind, rows):
            file.write(line)


def csv_lines(kind: type, rows: Iterable[Any]) -> Iterator[bytes]:
    """The lines of a CSV file, its header first."""
    yield _line(columns(kind))
    for row in rows:
        yield _line(cells(row))


def _line(texts: Any) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(texts)
    return buffer.getvalue().encode("utf-8", "surrogateescape")  # a file name need not be valid UTF-8


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: cannot write ({error.strerror or error}); free some space or choose another place"
    )
