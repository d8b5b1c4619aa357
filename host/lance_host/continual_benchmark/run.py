"""The benchmark: tasks, methods and seeds, one after the other, going on where it was broken off."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lance_edge.errors import LanceError, NumericalError
from lance_host.continual_benchmark.benchmarks import choose_benchmark
from lance_host.continual_benchmark.job import Job, Learnt
from lance_host.continual_benchmark.methods import METHODS
from lance_host.continual_benchmark.multi_head import check_network, evaluate, network_of
from lance_host.continual_benchmark.protocol import BatchNorm, Preset
from lance_host.continual_benchmark.records import (
    RECORD,
    STATE,
    Settings,
    TaskRecord,
    keep_settings,
    read_record,
    task_folder,
    write_record,
)
from lance_host.continual_benchmark.report import write_results
from lance_host.continual_benchmark.state import write_state
from lance_host.continual_benchmark.tasks import Task, make_tasks

FIRST = "first-task"
LEAST_TASKS = 2
MOST_HALVINGS = 5


@dataclass(frozen=True)
class BenchmarkRequest:
    """What somebody asks for.

    Attributes:
        network: `None` takes the benchmark's own.
        relax: 0 protects strictly.
        energy: share of a task's energy outside of the memory that LANCE keeps; `None` takes the preset's.
    """

    benchmark: str
    methods: tuple[str, ...]
    data: Path
    out: Path
    preset: Preset
    seeds: int
    network: str | None = None
    batch_norm: BatchNorm = "running"
    relax: float = 0.0
    energy: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Voice:
    """How the benchmark talks: a line, and epochs `(done, at most)` of the task that is learnt."""

    say: Callable[[str], None]
    progress: Callable[[int, int], None]


def run_benchmark(request: BenchmarkRequest, voice: Voice) -> tuple[Path, Settings]:
    """Learn what is not learnt yet, and write the results after every task; gives their folder and settings.

    Raises:
        LanceError: for anything that data or options do not allow; what was learnt before stays.
    """
    benchmark = choose_benchmark(request.benchmark)
    check(request)
    check_network(request.network or benchmark.network)
    tasks = make_tasks(benchmark, request.data, request.out / "tasks", request.preset.per_class, voice.say)
    if len(tasks) < LEAST_TASKS:
        raise LanceError(
            f"{request.data}: found one task of {benchmark.name}, expected two or more; add data sets"
        )
    settings = settings_of(request, request.network or benchmark.network, tasks)
    folder = request.out / settings.folder
    keep_settings(folder, settings)
    if request.threads:
        torch.set_num_threads(request.threads)
    for seed in range(request.seeds):
        for method in request.methods:
            _run(request, settings, folder, tasks, method, seed, voice)
    write_results(folder, settings)
    return folder, settings


def check(request: BenchmarkRequest) -> None:
    """Refuse values that are of no use, and options that a method does not have, before anything is learnt.

    Raises:
        LanceError: naming the option, and the methods.
    """
    rates = (request.preset.recipe.lr, request.preset.gpm_lr)
    for option, values in (
        ("--lr", rates),
        ("--relax", (request.relax,)),
        ("--energy", (request.energy or 0,)),
    ):
        wrong = [value for value in values if not math.isfinite(value)]
        if wrong:
            raise LanceError(f"{option}: expected a number, found {wrong[0]:g}")
    if min(rates) <= 0:
        raise LanceError(f"--lr: expected a rate above 0, found {min(rates):g}")
    in_engine = [name for name in request.methods if METHODS[name].where == "engine"]
    if request.batch_norm == "batch" and in_engine:
        raise LanceError(
            f"--batch-norm batch: {', '.join(in_engine)} train in the engine, where batch-norm has frozen"
            " statistics; leave them out, or use --batch-norm running"
        )
    strict = [name for name in request.methods if not METHODS[name].relaxes]
    if request.relax and strict:
        able = ", ".join(name for name, method in METHODS.items() if method.relaxes)
        raise LanceError(f"--relax: {', '.join(strict)} protects no directions; it is for --method {able}")
    whole = [name for name in request.methods if not METHODS[name].compresses]
    if request.energy is not None and whole:
        raise LanceError(f"--energy: {', '.join(whole)} keeps whole activations; it is for --method lance")


def settings_of(request: BenchmarkRequest, network: str, tasks: tuple[Task, ...]) -> Settings:
    """What the results have in common."""
    preset = request.preset
    return Settings(
        benchmark=request.benchmark,
        network=network,
        preset=preset.name,
        epochs=preset.recipe.epochs,
        lr=preset.recipe.lr,
        gpm_lr=preset.gpm_lr,
        per_class=preset.per_class or (),
        batch_norm=request.batch_norm,
        dropout=preset.dropout,
        tasks=tuple(task.name for task in tasks),
        data=tuple(dict.fromkeys(task.digest for task in tasks)),
    )


def label_of(method: str, relax: float, energy: float | None) -> str:
    """The name of a method with its options: of its folder, and in the results."""
    relaxed = f"{method}-relax-{relax:g}" if relax else method
    return relaxed if energy is None else f"{relaxed}-energy-{energy:g}"


def _run(
    request: BenchmarkRequest,
    settings: Settings,
    folder: Path,
    tasks: tuple[Task, ...],
    method: str,
    seed: int,
    voice: Voice,
) -> None:
    """All tasks of one method and seed."""
    label = label_of(method, request.relax, request.energy)
    preset = request.preset if request.energy is None else replace(request.preset, energy=request.energy)
    numbers = [len(tasks) - 1] if METHODS[method].is_joint else range(len(tasks))
    for number in numbers:
        own = task_folder(folder, label, seed, number)
        before = None if number == numbers[0] else task_folder(folder, label, seed, number - 1)
        if read_record(own) is not None:
            _tidy(own, before)  # it may have been broken off
            continue
        voice.say(f"{label}, seed {seed}, task {number + 1} of {len(tasks)}: {tasks[number].name}")
        job = Job(
            network=settings.network,
            preset=preset,
            method=method,
            batch_norm=request.batch_norm,
            tasks=tasks,
            number=number,
            seed=seed,
            folder=own,
            before=before,
            first=folder / FIRST,
            relax=request.relax,
            threads=request.threads,
            say=voice.say,
            progress=voice.progress,
        )
        record = _learn(job, label)
        voice.say("  accuracy: " + ", ".join(f"{100 * accuracy:.1f} %" for accuracy in record.accuracies))
        write_results(folder, settings)


def _learn(job: Job, label: str) -> TaskRecord:
    """Learn a task, evaluate on all tasks so far, and leave its folder complete."""
    job.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    job, learnt = learn_stably(job)
    write_state(job.folder / STATE, learnt.state)
    record = TaskRecord(
        method=label,
        seed=job.seed,
        after=job.number,
        task=job.task.name,
        accuracies=accuracies(job, learnt),
        epochs=learnt.epochs,
        lr=job.preset.recipe_of(job.method).lr,
        activation_bytes=learnt.activation_bytes,
        seconds=time.perf_counter() - start,
        ranks=dict(learnt.ranks),
        kept_bytes={**learnt.kept_bytes, **learnt.state.kept_bytes},
    )
    write_record(job.folder, record)
    _tidy(job.folder, job.before)
    return record


def learn_stably(job: Job) -> tuple[Job, Learnt]:
    """Learn a task; if the numbers run away, again at half the rate.  Gives the job that went well.

    The published rates are those of batch-norms with statistics of each batch: frozen ones do not hold back
    what a rate that is too large makes of the weights.

    Raises:
        NumericalError: if they still do after `MOST_HALVINGS`.
    """
    for _ in range(MOST_HALVINGS):
        try:
            return job, METHODS[job.method].learn(job)
        except NumericalError:
            rate = job.preset.recipe_of(job.method).lr
            job.say(f"  the numbers ran away at a learning rate of {rate:g}: again at {rate / 2:g}")
            job = replace(job, preset=job.preset.at_half_rate())
    return job, METHODS[job.method].learn(job)


def accuracies(job: Job, learnt: Learnt) -> tuple[float, ...]:
    """On the test images of every task so far, each with its own head."""
    network = network_of(job.network, learnt.state)
    known = job.tasks[: job.number + 1]
    return tuple(evaluate(network, task.name, task.open().test, job.batch_norm)[1] for task in known)


def _tidy(folder: Path, before: Path | None) -> None:
    """Remove what no later task reads: the run of this one, all but the record of the one before."""
    unused = [path for path in folder.iterdir() if path.is_dir()]
    unused += [path for path in before.iterdir() if path.name != RECORD] if before is not None else []
    for path in unused:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
