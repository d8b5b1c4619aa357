"""`collect`: what a workstation needs to know of a task's images to protect it, or to prepare it; no image."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lance_device.checkpoint import read_checkpoint
from lance_device.moments_pass import NO_MEMORY, MomentsPass, PassOptions
from lance_device.options import available_cores
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset, open_dataset
from lance_edge.errors import ArtifactError
from lance_edge.files import file_digest
from lance_edge.manifest import Mode
from lance_edge.memory import Memory, memory_digest, read_memory
from lance_edge.moments import expect_fitting
from lance_edge.names import MEMORY_BATCHES, PROJECTION_BATCHES
from lance_edge.screening import find_bad, refuse, without
from lance_edge.statistics import Matrices, Statistics, write_statistics

DEFAULT_MODE: Mode = "patch"  # of a memory, whatever the package compresses


@dataclass(frozen=True)
class CollectRequest:
    """What somebody asks for.

    Attributes:
        memory: of the tasks before: then all modes are measured, those beside the protected one without what
            it protects, for the next task's projections.  Without it the protected mode alone, for a memory.
        task: the name of the task that these images are of.
        batches: at most; by default as many as the workstation takes for a memory, or for projections.
        seed: chooses the images; by default the package's, as the workstation does.
        strict: refuse images that cannot be read, instead of leaving them out.
    """

    artifact: Path
    checkpoint: Path
    data: Path
    output: Path
    task: str
    options: PassOptions
    memory: Path | None = None
    batches: int | None = None
    seed: int | None = None
    strict: bool = False


def collect(request: CollectRequest, note: Callable[[str], None]) -> Statistics:
    """Measure, write `stats.npz`, and return what was written.

    Raises:
        LanceError: with nothing written, for anything that package, checkpoint, memory or images do not allow.
    """
    with Bundle(request.artifact) as bundle:
        checkpoint = read_checkpoint(request.checkpoint, bundle)
        variant = bundle.manifest.variant(checkpoint.meta.method, checkpoint.meta.layers)
        memory = _open_memory(request.memory, request.options.mode)
        if memory is not None:
            expect_fitting(memory, bundle.manifest.layers, str(request.memory))
        dataset = open_images(request.data, bundle, request.strict, note)
        mode = request.options.mode or (memory.mode if memory is not None else DEFAULT_MODE)
        options = replace(request.options, mode=mode)
        measure = MomentsPass(bundle, variant, checkpoint.parameters, options)
        seed = bundle.manifest.seed if request.seed is None else request.seed
        known = memory.layers if memory is not None else NO_MEMORY
        batches = request.batches or (MEMORY_BATCHES if memory is None else PROJECTION_BATCHES)
        found = measure.run(dataset.train, batches, seed, known, protected_only=memory is None)
        layers: dict[str, Matrices] = {
            layer.name: {mode: moment.astype(np.float32) for mode, moment in moments.items()}
            for layer, moments in found
        }
        statistics = Statistics(
            task=request.task,
            classes=dataset.classes,
            mode=measure.mode,
            artifact_sha256=bundle.sha256,
            checkpoint_sha256=file_digest(request.checkpoint).hexdigest(),
            memory_sha256=memory_digest(memory) if memory is not None else "",
            batch_size=bundle.manifest.batch_size,
            batches=measure.batches(dataset.train, batches),
            layers=layers,
        )
    write_statistics(request.output, statistics)
    return statistics


def open_images(data: Path, bundle: Bundle, strict: bool, note: Callable[[str], None]) -> Dataset:
    """The images of any task, of its own classes, without those that cannot be read.

    Raises:
        DataError: if there are none, or one cannot be read and `strict` is set.
    """
    dataset = open_dataset(data, bundle.manifest.split)
    skipped = find_bad(dataset, available_cores(), ("train",))
    if strict:
        refuse(data, skipped)
    for row in skipped:
        note(f"warning: {row.name} is left out ({row.reason})")
    return without(dataset, {row.name for row in skipped})


def _open_memory(path: Path | None, mode: Mode | None) -> Memory | None:
    if path is None:
        return None
    memory = read_memory(path)
    if mode not in (None, memory.mode):
        raise ArtifactError(f"{path}: a memory in {memory.mode} mode; use --mode {memory.mode}, not {mode}")
    return memory
