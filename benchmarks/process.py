"""Processes whose time and highest memory are watched from outside."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.job import Job
from benchmarks.rows import PeerRow
from lance_device.bench_report import KILLED
from lance_edge.errors import LanceError
from lance_edge.profiles import read_rows
from lance_edge.records import to_json

POLL_S = 0.02
LIMIT_S = 900.0  # a compiler that does not end
TAIL = 300  # characters of a foreign error that are worth printing


class BenchmarkError(LanceError):
    """A contender could not be measured."""


@dataclass(frozen=True)
class Watched:
    """How a process ended; `peak_rss_kib` is its VmHWM, `None` where the system has no /proc."""

    code: int
    errors: str
    peak_rss_kib: int | None


def watch(command: Sequence[str], until: Callable[[], bool] = lambda: False, poll_s: float = POLL_S) -> Watched:
    """Run a command; its peak memory is read from outside, so that a process which resets it hides nothing.

    Args:
        until: the process is ended as soon as this holds.

    Raises:
        BenchmarkError: if it does not end in time.
    """
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None and not until():
                peak = max(peak, _peak_kib(process.pid))
                if time.monotonic() - began > LIMIT_S:
                    raise BenchmarkError(f"{' '.join(command[:4])}: not done after {LIMIT_S:.0f} s; ended it")
                time.sleep(poll_s)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        errors.seek(0)
        return Watched(process.returncode, errors.read(), peak or None)


def _peak_kib(process_id: int) -> int:
    try:
        text = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(sizes[0]) if sizes else 0


def measure(job: Job) -> tuple[PeerRow, ...]:
    """The rows of a job, measured in a process of its own.

    Raises:
        BenchmarkError: if it fails, with the last line that it said.
    """
    with tempfile.TemporaryDirectory(prefix="lance-bench-") as folder:
        order, rows = Path(folder) / "job.json", Path(folder) / "rows.csv"
        order.write_text(json.dumps(to_json(job)))
        end = watch([sys.executable, "-m", "benchmarks.worker", str(order), str(rows)])
        if end.code != 0:
            raise BenchmarkError(f"{job.text()}: {reason(end)}")
        measured = list(read_rows(rows, PeerRow))
    if CONTENDERS[job.contender].starts_command:
        return tuple(measured)
    peaks = [end.peak_rss_kib, *(row.peak_rss_kib for row in measured)]
    peak = max((kib for kib in peaks if kib is not None), default=None)
    return tuple(replace(row, peak_rss_kib=peak) for row in measured)


def reason(end: Watched) -> str:
    """Why a process failed, on one line."""
    if end.code == -9:
        return KILLED
    lines = [line for line in end.errors.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return said.removeprefix("error: ")[:TAIL] or f"ended with code {end.code}"
