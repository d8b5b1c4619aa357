"""Methods that train as a board does: a package of `calibrate`, and `lance-device train` on it.

From the second task on: all convolutions and linear layers and a new head, batch-norm frozen as the first task
left it.  The runtime is a process of its own, as on a board; nothing of it is imported.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import read_weights
from lance_edge.errors import Interrupted, LanceError
from lance_edge.files import atomic_writer
from lance_host.build import calibrate
from lance_host.continual_benchmark.in_pytorch import learn_first
from lance_host.continual_benchmark.job import Job, Learnt, bp_activation_bytes
from lance_host.continual_benchmark.protocol import SPLIT
from lance_host.merge import merged_state
from lance_host.request import Feedback, Request

PACKAGE, RUN, WEIGHTS = "pkg.tar", "run", "before.safetensors"


def learn_finetune(job: Job) -> Learnt:
    """Plain backpropagation on every task, with nothing protected: how much is forgotten then."""
    if job.number == 0:
        state, epochs = learn_first(job)
        return Learnt(state, epochs, bp_activation_bytes(job.network, job.preset.recipe.batch_size))
    make_package(job, "bp")
    return train_package(job)


def make_package(job: Job, method: str) -> None:
    """`calibrate` on the task's images, unless its package is there."""
    package = job.folder / PACKAGE
    if package.exists():
        return
    weights = job.folder / WEIGHTS
    before = job.state_before()
    last = list(before.heads)[-1]  # of the right shape or not: the head becomes new
    with atomic_writer(weights) as file:
        file.write(safetensors.torch.save({n: t.contiguous() for n, t in before.single(last).items()}))
    request = Request(
        model=job.network,
        data=job.task.path,
        output=package,
        weights=str(weights),
        layers="all",
        methods=(method,),
        energy=job.preset.energy,
        batches=job.preset.memory_batches,
        batch_size=job.preset.recipe.batch_size,
        seed=job.task_seed,
        split=SPLIT,
        threads=job.threads,
    )
    calibrate(request, Feedback(say=_nothing, progress=lambda name, done, total: None))
    weights.unlink()


def _nothing(text: str) -> None:
    """What a calibration says is of no interest in a benchmark."""


def train_package(job: Job, *more: str | Path) -> Learnt:
    """`lance-device train` in a process of its own; goes on with a run that was broken off.

    Raises:
        LanceError: with the runtime's own message, if it fails.
    """
    recipe, run = job.preset.recipe_of(job.method), job.folder / RUN
    command: list[str | Path] = [sys.executable, "-m", "lance_device.cli", "train"]
    command += ["--artifact", job.folder / PACKAGE, "--data", job.task.path, "--out", run, "--resume-or-start"]
    command += ["--epochs", str(recipe.epochs), "--lr", repr(recipe.lr), "--momentum", "0", "--clip", "0"]
    command += ["--schedule", "plateau", "--patience", str(recipe.patience), "--min-lr", repr(recipe.least_lr)]
    command += [
        "--micro-batch",
        str(recipe.batch_size),
        "--seed",
        str(job.task_seed),
        "--cache",
        "off",
        "--quiet",
    ]
    command += ["--threads", str(job.threads)] if job.threads else []
    run_device([*map(str, command), *map(str, more)])
    with Bundle(job.folder / PACKAGE) as bundle:
        checkpoint = run / "best.npz"
        trained = read_weights(checkpoint if checkpoint.exists() else run / "last.npz", bundle)
        state = {name: torch.from_numpy(array) for name, array in merged_state(bundle, trained.weights).items()}
        return Learnt(
            state=job.state_before().with_task(job.task.name, state),
            epochs=_epochs(run),
            activation_bytes=trained.variant.activation_bytes,
        )


def run_device(command: Sequence[str]) -> None:
    """Run a command of the device runtime to its end.

    Raises:
        Interrupted: if it was stopped.
        LanceError: with its own message, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    message = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    if done.returncode in (130, -2, -15):
        raise Interrupted(f"stopped: {message}; the same command goes on from here")
    if done.returncode:
        raise LanceError(f"lance-device {command[3]} ended with code {done.returncode}: {message}")


def _epochs(run: Path) -> int:
    """Rows of the run's history."""
    return len((run / "history.csv").read_text().splitlines()) - 1
