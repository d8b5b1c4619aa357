"""What GPM and LANCE keep from task to task: the memory, and for `--relax` the moments that it was made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_edge.memory import (
    Memory,
    empty_memory,
    extend_memory,
    published_threshold,
    read_memory,
    write_memory,
)
from lance_host.continual_benchmark.job import Job, read_carry, write_carry
from lance_host.continual_benchmark.protocol import Preset
from lance_host.continual_benchmark.records import CARRY, PACKAGE, TRAINED
from lance_host.memory_build import MemoryRequest, measure
from lance_host.past import read_past
from lance_host.request import Feedback

MEMORY = "memory.npz"
Moments = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Kept:
    """After some tasks.

    Attributes:
        moments: by layer, the sum over the tasks of their second moments `[groups, D, D]`, each of trace 1.
    """

    memory: Memory
    moments: Moments = field(default_factory=dict)


def extend(job: Job, before: Kept | None) -> Kept:
    """The memory with the task that was learnt, from its training images."""
    memory = before.memory if before is not None else empty_memory("patch", job.network)
    moments = moments_of(job, job.folder)
    threshold = published_threshold(job.number)
    grown = extend_memory(memory, job.task.name, moments.items(), threshold, _checkpoint_digest(job))
    sums = dict(before.moments) if before is not None else {}
    for name, moment in moments.items():
        sums[name] = sums.get(name, 0.0) + unit_trace(moment)
    return Kept(grown, sums)


def moments_of(job: Job, trained: Path) -> dict[str, NDArray[np.floating]]:
    """The second moments `[groups, D, D]` of this task's images in the network that a folder holds."""
    request = MemoryRequest(
        checkpoint=trained / TRAINED,
        output=Path(),
        artifact=trained / PACKAGE,
        data=job.task.path,
        batches=memory_batches(job.method, job.preset),
        seed=job.task_seed,
        threads=job.threads,
    )
    feedback = Feedback(say=lambda text: None, progress=lambda name, done, total: None)
    past = read_past(request.artifact, request.checkpoint)
    # No label is read: with --relax, the network after the task before sees the new task's classes.
    past = replace(past, manifest=replace(past.manifest, classes=job.task.classes))
    return dict(measure(request, past, "patch", feedback))


def memory_batches(method: str, preset: Preset) -> int:
    """Batches that the memory is built from: 11 of LANCE; of GPM as many as hold its 125 samples."""
    return -(-preset.gpm_samples // preset.recipe.batch_size) if method == "gpm" else preset.memory_batches


def _checkpoint_digest(job: Job) -> str:
    return read_past(job.folder / PACKAGE, job.folder / TRAINED).checkpoint_sha256


def unit_trace(moment: NDArray[np.floating]) -> NDArray[np.float64]:
    """A moment `[groups, D, D]` with a trace of 1 over all groups: tasks count alike, whatever their scale."""
    trace = float(np.trace(moment, axis1=1, axis2=2, dtype=np.float64).sum())
    return moment.astype(np.float64) / trace if trace > 0 else moment.astype(np.float64)


def write_kept(folder: Path, kept: Kept, *, with_moments: bool) -> dict[str, int]:
    """Write it; gives the bytes by kind."""
    write_memory(folder / MEMORY, kept.memory)
    sizes = {"memory": kept.memory.column_bytes}
    if with_moments:
        single = {name: moment.astype(np.float32) for name, moment in kept.moments.items()}
        sizes["moments"] = write_carry(folder, dict(single))
    return sizes


def read_kept(folder: Path) -> Kept:
    """What `write_kept` wrote."""
    memory = read_memory(folder / MEMORY)
    carried = read_carry(folder) if (folder / CARRY).exists() else {}
    return Kept(memory, {name: np.asarray(moment, np.float64) for name, moment in carried.items()})
