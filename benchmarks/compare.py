"""The comparison at work: rounds over all settings, rows kept as they come."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.job import Job
from benchmarks.material import Material
from benchmarks.plan import Options, plan_round, tuning_job
from benchmarks.process import BenchmarkError, measure
from benchmarks.rows import PeerRow
from benchmarks.tuning import Trial, candidates, search
from lance_device.measure import RowLog
from lance_edge.manifest import Manifest
from lance_edge.units import duration

Say = Callable[[str], None]
Measure = Callable[[Job], tuple[PeerRow, ...]]


@dataclass(frozen=True)
class Comparison:
    """All that was measured; `failures` says what could not be."""

    rows: tuple[PeerRow, ...]
    trials: tuple[Trial, ...]
    failures: tuple[str, ...]


def compare(
    options: Options, manifest: Manifest, material: Material, log: Path, say: Say, run: Measure = measure
) -> Comparison:
    """Tune PyTorch, then measure everybody in turns.

    Args:
        log: CSV file that gets every row at once.

    Raises:
        LanceError: if PyTorch cannot be measured at all, or the package lacks what is compared.
    """
    trials = {cached: _tune(options, manifest, material, cached, say, run) for cached in (False, True)}
    tunings = {cached: found[0].tuning for cached, found in trials.items()}
    jobs = [
        job
        for number in range(1, options.rounds + 1)
        for job in plan_round(options, manifest, material, tunings, number)
    ]
    rows, failures = _run_all(jobs, log, say, run)
    return Comparison(tuple(rows), (*trials[False], *trials[True]), tuple(failures.values()))


def _tune(
    options: Options, manifest: Manifest, material: Material, cached: bool, say: Say, run: Measure
) -> tuple[Trial, ...]:
    wanted = candidates(cached, options.quick, manifest.batch_size)
    return search(tuning_job(options, material, cached), wanted, say, run)


def _run_all(jobs: Sequence[Job], log: Path, say: Say, run: Measure) -> tuple[list[PeerRow], dict[str, str]]:
    """Rows, and by setting why it could not be measured: it is not tried again."""
    began, rows, failures = time.monotonic(), list[PeerRow](), dict[str, str]()
    file = RowLog(log, PeerRow)
    try:
        for done, job in enumerate(jobs):
            if job.text() in failures:
                continue
            elapsed_s = time.monotonic() - began
            left = f", {duration(elapsed_s / done * (len(jobs) - done))} left" if done else ""
            say(f"{done + 1}/{len(jobs)}  round {job.round}: {job.text()}{left}")
            try:
                measured = run(job)
            except BenchmarkError as error:
                failures[job.text()] = str(error)
                say(f"not measured: {error}")
                continue
            file.write(*measured)
            rows.extend(measured)
    finally:
        file.close()
    return rows, failures
