"""Methods that train as a board does: a package of `calibrate`, and `lance-device train` on it.

From the second task on: all convolutions and linear layers and a new head, batch-norm frozen as the first task
left it.  The runtime is a process of its own, as on a board; nothing of it is imported.

    finetune   plain backpropagation, nothing protected
    gpm        plain backpropagation, gradients projected off the memory by the runtime (--protect)
    lance      activations compressed onto the null space of the memory
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import META, SCHEMA_VERSION, read_weights
from lance_edge.errors import Interrupted, LanceError, NumericalError
from lance_edge.files import atomic_writer
from lance_edge.memory import write_memory
from lance_edge.sealed import write_sealed
from lance_host.build import calibrate
from lance_host.continual import calibrate_next
from lance_host.continual_benchmark.in_pytorch import learn_first
from lance_host.continual_benchmark.job import Job, Learnt, bp_activation_bytes
from lance_host.continual_benchmark.protected import Kept, extend, read_kept, write_kept
from lance_host.continual_benchmark.protocol import SPLIT
from lance_host.continual_benchmark.records import PACKAGE, TRAINED
from lance_host.continual_benchmark.relax import relaxed
from lance_host.continual_benchmark.state import NetworkState
from lance_host.merge import merged_state
from lance_host.model_source import ProvidedWeights
from lance_host.request import After, Feedback, Request

PROTECTED_BY = "protected-by.npz"


def learn_finetune(job: Job) -> Learnt:
    """Plain backpropagation on every task, with nothing protected: how much is forgotten then."""
    if job.number == 0:
        state, epochs = learn_first(job)
        return Learnt(state, epochs, _bp_bytes(job))
    make_package(job, job.state_before().single(job.tasks[job.number - 1].name))
    return train_package(job)


def learn_gpm(job: Job) -> Learnt:
    """GPM: every gradient loses what lies in the memory."""
    if job.number == 0:
        return _learn_first_protected(job)
    make_package(job, job.state_before().single(job.tasks[job.number - 1].name))
    return _with_memory(job, train_package(job, "--protect", _memory_for(job)))


def learn_lance(job: Job) -> Learnt:
    """LANCE: gradients come from activations projected on what the memory leaves free."""
    if job.number == 0:
        return _learn_first_protected(job)
    assert job.before is not None
    memory = _memory_for(job)
    if not (job.folder / PACKAGE).exists():
        after = After(checkpoint=job.before / TRAINED, artifact=job.before / PACKAGE, memory=memory)
        own = replace(_request(job, "lance"), layers="", mode="patch", after=after)
        calibrate_next(own, after, _silent())
    return _with_memory(job, train_package(job))


def _bp_bytes(job: Job) -> int:
    return bp_activation_bytes(job.network, job.preset.recipe.batch_size)


# --- packages -----------------------------------------------------------------------------------------


def make_package(job: Job, weights: dict[str, torch.Tensor]) -> None:
    """A package that trains everything by plain backpropagation, unless it is there."""
    if not (job.folder / PACKAGE).exists():
        provided = ProvidedWeights(weights, f"benchmark, before {job.task.name}")
        calibrate(replace(_request(job, "bp"), weights=provided), _silent())


def _request(job: Job, method: str) -> Request:
    return Request(
        model=job.network,
        data=job.task.path,
        output=job.folder / PACKAGE,
        layers="all",
        methods=(method,),
        energy=job.preset.energy,
        batches=job.preset.memory_batches,
        batch_size=job.preset.recipe.batch_size,
        seed=job.task_seed,
        split=SPLIT,
        threads=job.threads,
        task=job.task.name,
        dropout=job.preset.dropout,
    )


def _silent() -> Feedback:
    """What a calibration says is of no interest in a benchmark."""
    return Feedback(say=lambda text: None, progress=lambda name, done, total: None)


def write_trained(job: Job, state: NetworkState) -> None:
    """A checkpoint of the task's package with the weights that PyTorch gave it."""
    with Bundle(job.folder / PACKAGE) as bundle:
        variant = bundle.manifest.variant("bp")
        single = state.single(job.task.name)
        meta = {
            "schema_version": SCHEMA_VERSION,
            "artifact_sha256": bundle.sha256,
            "model": bundle.manifest.model,
            "method": variant.method,
            "layers": len(variant.layers),
        }
        arrays = {name: single[name].numpy() for name in variant.parameters}
    with atomic_writer(job.folder / TRAINED) as file:
        write_sealed(file, {META: np.array(json.dumps(meta)), **arrays})


# --- memory -------------------------------------------------------------------------------------------


def _learn_first_protected(job: Job) -> Learnt:
    """The first task as everybody, then a package of it, from which the memory follows."""
    state, epochs = learn_first(job)
    make_package(job, state.single(job.task.name))
    write_trained(job, state)
    return _with_memory(job, Learnt(state, epochs, _bp_bytes(job)))


def _with_memory(job: Job, learnt: Learnt) -> Learnt:
    """Extend the memory by the task that was learnt."""
    before = None if job.before is None else read_kept(job.before)
    kept = extend(job, before)
    sizes = write_kept(job.folder, kept, with_moments=job.relax > 0)
    ranks = {name: sum(layer.ranks) for name, layer in kept.memory.layers.items()}
    return replace(learnt, ranks=ranks, kept_bytes=sizes)


def _memory_for(job: Job) -> Path:
    """The memory that protects while this task is learnt: that of the tasks before, or what is left of it."""
    assert job.before is not None
    path = job.folder / PROTECTED_BY
    kept: Kept = read_kept(job.before)
    write_memory(path, relaxed(job, kept) if job.relax else kept.memory)
    return path


# --- the runtime --------------------------------------------------------------------------------------


def train_package(job: Job, *more: str | Path) -> Learnt:
    """`lance-device train` in a process of its own; goes on with a run that was broken off.

    Raises:
        LanceError: with the runtime's own message, if it fails.
    """
    run = job.folder / f"run-{job.preset.recipe_of(job.method).lr:g}"  # a rate that ran away has another
    run_device([*train_command(job, run), *map(str, more)])
    with atomic_writer(job.folder / TRAINED) as file:  # a copy: a finished run without it could not go on
        file.write((run / "best.npz").read_bytes())
    with Bundle(job.folder / PACKAGE) as bundle:
        trained = read_weights(job.folder / TRAINED, bundle)
        whole = merged_state(bundle, trained.weights)
        stored = {name: torch.from_numpy(np.array(array)) for name, array in whole.items()}
        return Learnt(
            state=job.state_before().with_task(job.task.name, stored),
            epochs=_epochs(run),
            activation_bytes=trained.variant.activation_bytes,
        )


def train_command(job: Job, run: Path) -> list[str]:
    """What trains the task's package as the protocol says, in the folder `run`."""
    recipe = job.preset.recipe_of(job.method)
    command: list[str | Path] = [sys.executable, "-m", "lance_device.cli", "train"]
    command += ["--artifact", job.folder / PACKAGE, "--data", job.task.path, "--out", run, "--resume-or-start"]
    command += ["--epochs", str(recipe.epochs), "--lr", repr(recipe.lr), "--momentum", "0", "--clip", "0"]
    command += ["--schedule", "plateau", "--patience", str(recipe.patience), "--min-lr", repr(recipe.least_lr)]
    command += ["--micro-batch", str(recipe.batch_size), "--seed", str(job.task_seed)]
    command += ["--cache", "off", "--quiet"]
    command += ["--threads", str(job.threads)] if job.threads else []
    return [*map(str, command)]


def run_device(command: Sequence[str]) -> None:
    """Run a command of the device runtime to its end.

    Raises:
        Interrupted: if it was stopped.
        NumericalError: if the numbers ran away.
        LanceError: with its own message, if it fails otherwise.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    message = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    if done.returncode in (130, -2, -15):
        raise Interrupted(f"stopped: {message}; the same command goes on from here")
    if done.returncode:
        kind = NumericalError if done.returncode == NumericalError.exit_code else LanceError
        raise kind(f"lance-device {command[3]} ended with code {done.returncode}: {message}")


def _epochs(run: Path) -> int:
    """Rows of the run's history."""
    return len((run / "history.csv").read_text().splitlines()) - 1
