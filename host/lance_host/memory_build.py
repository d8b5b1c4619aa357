"""`lance-host memory`: what a finished task needs of the layers, added to what earlier ones need."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_edge.datasets import open_dataset
from lance_edge.errors import ArtifactError, LanceError
from lance_edge.images import load_batch
from lance_edge.manifest import Mode
from lance_edge.memory import (
    Memory,
    empty_memory,
    extend_memory,
    memory_digest,
    published_threshold,
    read_memory,
    write_memory,
)
from lance_edge.moments import expect_fitting, protected_mode, protected_shape
from lance_edge.names import MEMORY_BATCHES
from lance_edge.screening import steady
from lance_edge.statistics import read_statistics
from lance_edge.subspace import check_threshold
from lance_host.calibrate import calibration_batches, layer_moments
from lance_host.next_task import check_model, check_moments, check_statistics
from lance_host.past import Past, read_past, tap_names
from lance_host.request import Feedback
from lance_host.text import count

DEFAULT_MODE: Mode = "patch"

Covariances = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class MemoryRequest:
    """What is asked for; `None`: as the published protocol, the older memory or the package has it.

    Either `data`, the finished task's images, or `statistics` of them.  `seed` chooses the images: by default
    the package's, as a board does.
    """

    checkpoint: Path
    output: Path
    artifact: Path | None = None
    data: Path | None = None
    statistics: Path | None = None
    memory: Path | None = None
    threshold: float | None = None
    mode: Mode | None = None
    batches: int = MEMORY_BATCHES
    seed: int | None = None
    threads: int | None = None


def make_memory(request: MemoryRequest, feedback: Feedback) -> Memory:
    """Write the memory after the checkpoint's task, and return it.

    Raises:
        LanceError: with nothing written, if checkpoint, older memory and data do not belong together.
    """
    if (request.data is None) == (request.statistics is None):
        raise LanceError(
            "--data or --stats: expected one of them, the finished task's images or their statistics"
        )
    if request.threshold is not None:
        check_threshold(request.threshold)
    past = read_past(request.artifact, request.checkpoint)
    before = open_before(request, past)
    covariances = measure(request, past, before.mode, feedback)
    threshold = request.threshold
    if threshold is None:
        threshold = published_threshold(len(before.tasks))
    after = extend_memory(before, past.task, covariances.items(), threshold, past.checkpoint_sha256)
    write_memory(request.output, after)
    return after


def open_before(request: MemoryRequest, past: Past) -> Memory:
    """The memory of the tasks before the finished one: by default what the finished one's package holds.

    Raises:
        LanceError: if it is missing, has another mode, knows other tasks, or is not that of the package.
    """
    earlier = [task.name for task in past.tasks[:-1]]
    found = past.memory if request.memory is None else read_memory(request.memory)
    where = "the memory in the package" if request.memory is None else str(request.memory)
    if found is None:
        if earlier:
            raise ArtifactError(
                f"--memory: the network learned {', '.join(earlier)} before {past.task}; give the memory of"
                " that, or it will be forgotten"
            )
        return empty_memory(request.mode or DEFAULT_MODE, past.manifest.model)
    remembered = [task.name for task in found.tasks]
    if remembered != earlier:
        raise ArtifactError(
            f"{where}: remembers {', '.join(remembered) or 'no task'}, expected"
            f" {', '.join(earlier) or 'none'}, which the network learned before {past.task}; give that memory"
        )
    check_model(found, where, past)
    if past.memory is not None and memory_digest(found) != memory_digest(past.memory):
        raise ArtifactError(
            f"{where}: is not the memory that {past.task} was trained beside, which its package holds; leave"
            " --memory out"
        )
    if request.mode not in (None, found.mode):
        raise ArtifactError(f"{where}: is of {found.mode} mode, not {request.mode}; leave --mode out")
    expect_fitting(found, past.layers, where)
    return found


def measure(request: MemoryRequest, past: Past, mode: Mode, feedback: Feedback) -> Covariances:
    """The second moment of the protected mode of every layer that the task trained, `[groups, D, D]`.

    Raises:
        LanceError: if the data are not of this task, or the statistics of another network.
    """
    for layer in past.layers:
        protected_shape(layer, mode)  # refuses what the mode cannot protect, before anything runs
    if request.statistics is not None:
        found = read_statistics(request.statistics)
        check_statistics(found, str(request.statistics), past)
        if found.mode != mode:
            raise ArtifactError(
                f"{request.statistics}: is of {found.mode} mode, the memory of {mode} mode; collect the"
                f" statistics with --mode {mode}"
            )
        if found.classes != past.manifest.classes:
            raise ArtifactError(
                f"{request.statistics}: of the classes {', '.join(found.classes)}, expected those of"
                f" {past.task}: {', '.join(past.manifest.classes)}; collect them from that task's images"
            )
        check_moments(found, str(request.statistics), past.layers)
        return {layer.name: found.layers[layer.name][protected_mode(layer)] for layer in past.layers}
    return _measure_images(request, past, mode, feedback) if past.layers else {}


def _measure_images(request: MemoryRequest, past: Past, mode: Mode, feedback: Feedback) -> Covariances:
    assert request.data is not None
    manifest = past.manifest
    opened = open_dataset(request.data, manifest.split, manifest.classes)
    part = steady(opened, feedback.say_bad_image).train
    batch_size = min(manifest.batch_size, len(part))
    seed = manifest.seed if request.seed is None else request.seed
    order = calibration_batches(len(part), batch_size, request.batches, seed)
    feedback.say(f"memory of {past.task}: {count(len(order), 'batch')} of {batch_size} training images")
    moments = layer_moments(
        past.taps,
        tap_names(past.layers),
        past.layers,
        mode,
        {},
        (load_batch(part, rows, manifest.preprocessing) for rows in order),
        batch_size,
        request.threads or os.cpu_count() or 1,
        lambda done: feedback.progress("memory", done, len(order)),
    )
    return {layer.name: moments[layer.name][protected_mode(layer)] for layer in past.layers}
