"""The benchmark: every setting in processes of its own, interleaved, summarised against LANCE."""

import datetime
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lance_device.bench_folder import BenchFolder
from lance_device.bench_job import Job, open_batch
from lance_device.bench_plan import BenchRequest, plan_jobs
from lance_device.bench_report import KILLED, about_load, warnings_of
from lance_device.board import choose_board
from lance_device.live import Reporter
from lance_device.measure import RowLog, write_rows
from lance_device.run_record import describe_machine, describe_package, describe_software, now_utc, write_record
from lance_device.stop import StopRequest, stop_on_signals
from lance_edge.bench_rows import BenchRow, BenchSummaryRow, Setting, summarise_bench
from lance_edge.boards import Board
from lance_edge.bundle import Bundle
from lance_edge.errors import Interrupted, LanceError, PlatformError
from lance_edge.profiles import read_rows
from lance_edge.records import to_json
from lance_edge.units import count, duration

POLL_S = 0.2
OUT_OF_MEMORY = (PlatformError.exit_code, -9)  # our own refusal, or killed by the kernel


@dataclass(frozen=True)
class BenchResult:
    """What came of it; `warnings` say why figures may be wrong, `failures` what could not be measured."""

    summary: tuple[BenchSummaryRow, ...]
    warnings: tuple[str, ...]
    failures: tuple[str, ...]


class WorkerError(LanceError):
    """A measuring process ended with an error that would meet all others too."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def bench(request: BenchRequest, reporter: Reporter) -> BenchResult:
    """Measure as asked for, and leave a complete folder, however it ends.

    Raises:
        LanceError: if nothing can be measured; `Interrupted` after Ctrl-C, with what was measured kept.
    """
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    with Bundle(request.artifact) as bundle:
        jobs = plan_jobs(request, bundle.manifest, run_id)
        package = describe_package(bundle)
        if request.data is not None:
            open_batch(
                jobs[0], bundle.manifest
            )  # what is wrong with the images is said before a folder is made
    folder = BenchFolder(request.out)
    folder.claim()
    board = choose_board(request.board)
    record = {"run_id": run_id, **_describe(request, jobs, package, board)}
    write_record(folder.record, {**record, "status": "running"})
    _announce(jobs, board, reporter)
    if request.data is None and any(job.method == "hosvd" for job in jobs):
        reporter.note(
            "hosvd chooses its ranks by the images: its bytes are those of generated ones; give --data"
        )
    with stop_on_signals(lambda _: reporter.note("stopping; what was measured stays")) as stop:
        return _Benchmark(jobs, folder, board, record, reporter).run(stop)


@dataclass
class _Benchmark:
    """A benchmark at work."""

    jobs: tuple[Job, ...]
    folder: BenchFolder
    board: Board
    record: dict[str, Any]
    reporter: Reporter
    rows: list[BenchRow] = field(default_factory=list)
    failures: dict[Setting, str] = field(default_factory=dict)

    def run(self, stop: StopRequest) -> BenchResult:
        """Every job; then summary and warnings."""
        log = RowLog(self.folder.steps, BenchRow)
        try:
            self._run_jobs(log, stop)
        except LanceError as error:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            self._finish(status, str(error))
            raise
        finally:
            log.close()
        if not self.rows:
            message = next(iter(self.failures.values()))
            self._finish("failed", message)
            raise PlatformError(message)
        return self._finish("finished", "")

    def _run_jobs(self, log: RowLog, stop: StopRequest) -> None:
        began = time.monotonic()
        for done, job in enumerate(self.jobs):
            if job.setting in self.failures:
                continue
            elapsed_s = time.monotonic() - began
            self.reporter.status(self._status(job, done, elapsed_s), always=done == 0)
            try:
                rows = run_in_process(job, self.folder.path, stop)
            except Interrupted:
                raise Interrupted(
                    f"stopped after {done} of {len(self.jobs)} measurements; these are in {self.folder.path}"
                ) from None
            except PlatformError as error:  # others may need less memory
                self.failures[job.setting] = f"{job.setting_text()}: {error}"
                self.reporter.note(f"not measured: {self.failures[job.setting]}")
                continue
            log.write(*rows)
            self.rows.extend(rows)

    def _status(self, job: Job, done: int, elapsed_s: float) -> str:
        left = f"  {duration(elapsed_s / done * (len(self.jobs) - done))} left" if done else ""
        trials = self.jobs[-1].trial
        return f"{done + 1}/{len(self.jobs)}  trial {job.trial} of {trials}  {job.setting_text()}{left}"

    def _finish(self, status: str, message: str) -> BenchResult:
        summary = summarise_bench(self.rows)
        result = BenchResult(
            summary, warnings_of(self.rows, summary, self.board), tuple(self.failures.values())
        )
        write_rows(self.folder.summary, BenchSummaryRow, summary)
        end = {"status": status, "message": message, "ended": now_utc(), "warnings": result.warnings}
        write_record(self.folder.record, {**self.record, **end, "failures": result.failures})
        return result


def run_in_process(job: Job, place: Path, stop: StopRequest) -> list[BenchRow]:
    """The rows of a job.

    Args:
        place: an existing folder for its temporary files: features are read from the same disk as in training.

    Raises:
        Interrupted: if a stop was asked for meanwhile.
        PlatformError: if memory did not suffice, or the kernel ended the process.
        WorkerError: for everything else that went wrong there.
    """
    with tempfile.TemporaryDirectory(prefix=".job-", dir=place) as folder:
        paths = Path(folder) / "job.json", Path(folder) / "rows.csv"
        paths[0].write_text(json.dumps(to_json(job)))
        process = subprocess.Popen(
            [sys.executable, "-m", "lance_device.cli", "bench-worker", *map(str, paths)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends that one
        )
        try:
            errors = _wait(process, stop)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise _worker_error(process.returncode, errors)
        return list(read_rows(paths[1], BenchRow))


def _wait(process: "subprocess.Popen[str]", stop: StopRequest) -> str:
    while True:
        try:
            return process.communicate(timeout=POLL_S)[1]
        except subprocess.TimeoutExpired:
            stop.check()


def _worker_error(code: int, errors: str) -> LanceError:
    lines = [line.removeprefix("error: ") for line in errors.splitlines() if line.startswith("error: ")]
    if code in OUT_OF_MEMORY:
        return PlatformError(lines[-1] if lines else KILLED)
    text = lines[-1] if lines else f"the measuring process ended with code {code}: {errors.strip()[-300:]}"
    return WorkerError(text, code if code > 0 else 1)


def _announce(jobs: tuple[Job, ...], board: Board, reporter: Reporter) -> None:
    first, trials = jobs[0], jobs[-1].trial
    reporter.note(
        f"board {board.name}, {count(first.threads, 'thread')}: {count(len(jobs) // trials, 'setting')},"
        f" {count(trials, 'trial')} of {first.warmups} + {count(first.steps, 'step')} each"
    )
    busy = about_load()
    if busy is not None:
        reporter.note(f"warning: {busy}")


def _describe(
    request: BenchRequest, jobs: tuple[Job, ...], package: dict[str, Any], board: Board
) -> dict[str, Any]:
    return {
        "started": now_utc(),
        "kind": "benchmark",
        "artifact": package,
        "data": None if request.data is None else str(request.data),
        "arguments": list(request.arguments),
        "options": {name: value for name, value in asdict(request).items() if name != "arguments"},
        "threads": jobs[0].threads,
        "board_profile": board.name,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "machine": describe_machine(),
        **describe_software(),
    }
