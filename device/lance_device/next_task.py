"""`next-task`: what was learned becomes protected, and the package of the next task is made, on this board.

There is no compiler here.  The package's graphs take any rank and any number of classes (`takes_any_rank`), so
the next package has the same graphs, and beside them, made here by the workstation's own code:

1. the memory, extended by the finished task's second moments;
2. projections of the next task's images outside of that memory, of the modes that the graphs compress;
3. the network's weights as the finished task left them, a new head, and all earlier heads.

A layer whose null space is used up keeps its place with a projection of zeros, so its gradient is zero.  The
package is tried out on two images before it takes its name: shapes are taken from what the graphs give, and a
gradient that touches the memory is refused.

Memory: one pass (`moments_pass.py`), beside its moments for one layer at a time six float64 matrices D x D
(beyond 2,048 rows five of D x the columns that are wanted, where these are at most D / 4), and the package's
members.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.checkpoint import Checkpoint, read_checkpoint
from lance_device.collect import open_images
from lance_device.moments_pass import MomentsPass, PassOptions
from lance_device.next_package import write_next_package
from lance_device.protect import expect_no_extras
from lance_device.remeasure import remeasure
from lance_device.task_folder import TaskFolder, TaskPlace, TaskRecord
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset
from lance_edge.errors import ArtifactError, CheckpointError, DataError
from lance_edge.files import file_digest
from lance_edge.images import Part
from lance_edge.layer_plan import any_ranks, plan_layer
from lance_edge.manifest import LayerPlan, Variant
from lance_edge.memory import (
    LayerMemory,
    Memory,
    empty_memory,
    extend_memory,
    packed_memory,
    published_threshold,
)
from lance_edge.moments import expect_fitting, protected_mode
from lance_edge.names import MEMORY_BATCHES, PROJECTION_BATCHES, is_task_name, projection_name
from lance_edge.protected_spectra import layer_spectra_of

Float = NDArray[np.float32]
USUAL_ENERGY = 0.98


@dataclass(frozen=True)
class NextTaskRequest:
    """What somebody asks for.

    Attributes:
        artifact, checkpoint: of the finished task.
        data, next_data: the images of the finished task, and of the next one.
        task: the next one's name.
        finished: the finished one's, where its package has no name for it.
        threshold: ε_cl of the memory; by default 0.97, and 0.003 more for every task before.
        energy: ε of the next task's projections.
        memory_batches, batches: of the finished task's images, and of the next one's.
    """

    artifact: Path
    checkpoint: Path
    data: Path
    next_data: Path
    output: Path
    task: str
    options: PassOptions
    finished: str = "task-1"
    threshold: float | None = None
    energy: float = USUAL_ENERGY
    memory_batches: int = MEMORY_BATCHES
    batches: int = PROJECTION_BATCHES
    strict: bool = False


@dataclass(frozen=True)
class NextTask:
    """What was made: the memory, how each layer trains on, and those with no input left to learn with."""

    memory: Memory
    plans: tuple[LayerPlan, ...]
    used_up: tuple[str, ...]


def next_task(request: NextTaskRequest, note: Callable[[str], None]) -> NextTask:
    """Extend the memory and write the next package.

    Raises:
        LanceError: with nothing written, for anything that package, checkpoint or images do not allow.
    """
    with Bundle(request.artifact) as bundle:
        checkpoint = read_checkpoint(request.checkpoint, bundle)
        variant = next_variant(bundle, checkpoint)
        name = _settle_names(request, bundle)
        finished = _finished_images(request, bundle, note)
        following = open_images(request.next_data, bundle, request.strict, note)
        measure = MomentsPass(bundle, variant, checkpoint.parameters, request.options)

        memory = extend(request, bundle, measure, finished.train, name)
        made = project(memory, bundle, variant, measure, following.train, request.batches, request.energy)
        used_up = tuple(layer for layer, rank in made.left.items() if not rank)
        for layer in used_up:
            note(f"warning: {layer}: nothing of its inputs is left to learn with; it stays as it is")
        write_next_package(request.output, bundle, checkpoint, memory, following, made, request.task, name)
        return NextTask(memory, made.plans, used_up)


def continue_folder(
    folder: TaskFolder, request: NextTaskRequest, note: Callable[[str], None]
) -> tuple[TaskPlace, NextTask]:
    """The same in a folder of tasks, where the next one begins with its package.

    Raises:
        CheckpointError: if the current task is not finished.
    """
    place = folder.current()
    if not place.is_finished:
        raise CheckpointError(
            f"{place.path}: task {place.record.task} is not finished; train it first: lance-device train --out"
            f" {folder.root} --data {place.record.data} --resume-or-start"
        )
    remeasure(folder, note)  # where training was ended by hand, it was not done yet
    made: list[NextTask] = []

    def make(path: Path) -> None:
        made.append(next_task(replace(request, output=path), note))

    record = TaskRecord(request.task, str(request.next_data.absolute()), place.record.result)
    return folder.begin(record, make), made[0]


def next_variant(bundle: Bundle, checkpoint: Checkpoint) -> Variant:
    """The variant that the next task trains by: lance with the finished run's layers.

    Raises:
        ArtifactError: if the package's graphs are for one calibration only, or it trains more than layers.
    """
    variant = bundle.manifest.variant("lance", checkpoint.meta.layers)
    if not variant.takes_any_rank or not bundle.manifest.head:
        raise ArtifactError(
            f"{bundle.path}: its graphs serve the ranks of one calibration only; make the first package with"
            " lance-host calibrate --mode patch --any-rank, or the next one on the workstation"
        )
    expect_no_extras(bundle.manifest, variant)
    return variant


def _settle_names(request: NextTaskRequest, bundle: Bundle) -> str:
    """The finished task's name, after both were checked."""
    manifest = bundle.manifest
    finished = manifest.task or request.finished
    earlier = [*(task.name for task in manifest.tasks), finished]
    if not is_task_name(request.task) or request.task in earlier:
        raise DataError(
            f"task {request.task!r}: expected a name of letters, digits, dots and dashes, at most 64, other"
            f" than {', '.join(earlier)}; give one with --task"
        )
    return finished


def _finished_images(request: NextTaskRequest, bundle: Bundle, note: Callable[[str], None]) -> Dataset:
    dataset = open_images(request.data, bundle, request.strict, note)
    if set(dataset.classes) != set(bundle.manifest.classes):
        raise DataError(
            f"{request.data}: classes {', '.join(dataset.classes)}, and the finished task has"
            f" {', '.join(bundle.manifest.classes)}; give its images with --data, and the"
            " next task's with --next-data"
        )
    return dataset


# --- the memory -------------------------------------------------------------------------------------------


def extend(request: NextTaskRequest, bundle: Bundle, measure: MomentsPass, part: Part, name: str) -> Memory:
    """The package's memory with a finished task, a layer at a time.

    Args:
        part: the task's training images.
        name: the task's.
    """
    manifest = bundle.manifest
    memory = packed_memory(bundle) or empty_memory(manifest.mode, manifest.model)
    expect_fitting(memory, measure.layers, f"{bundle.path}: its memory")
    measured = measure.run(part, request.memory_batches, manifest.seed, protected_only=True)
    covariances = ((layer.name, moments.pop(protected_mode(layer))) for layer, moments in measured)
    threshold = request.threshold
    if threshold is None:
        threshold = published_threshold(len(manifest.tasks))
    digest = file_digest(request.checkpoint).hexdigest()
    return extend_memory(memory, name, covariances, threshold, digest)


# --- projections ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projected:
    """The next task's projections.

    Attributes:
        arrays: `<layer>/U<mode>` of the modes that the graphs compress.
        eigenvalues: `<layer>/eigenvalues<mode>`.
        left: by layer, the rank that the energy asks for in the protected mode: 0 where nothing is left.
    """

    plans: tuple[LayerPlan, ...]
    arrays: Mapping[str, Float]
    eigenvalues: Mapping[str, NDArray[np.float64]]
    left: Mapping[str, int]
    energy: float
    batches: int


def project(
    memory: Memory,
    bundle: Bundle,
    variant: Variant,
    measure: MomentsPass,
    part: Part,
    batches: int,
    energy: float,
) -> Projected:
    """Subspaces of the next task's inputs outside of the memory, for the modes that the graphs compress."""
    manifest = bundle.manifest
    compressed = {*variant.projections, *variant.batch_projections}
    plans, left = list[LayerPlan](), dict[str, int]()
    arrays, eigenvalues = dict[str, Float](), dict[str, NDArray[np.float64]]()
    for layer, moments in measure.run(part, batches, manifest.seed, memory.layers):
        known: LayerMemory = memory.layers[layer.name]
        spectra = layer_spectra_of(layer, manifest.mode, manifest.batch_size, moments, known, energy)
        moments.clear()
        modes = [mode for mode in range(len(spectra)) if projection_name(layer.name, mode) in compressed]
        ranks = any_ranks(layer, manifest.mode, manifest.batch_size, spectra, energy, modes)
        plans.append(plan_layer(layer, manifest.mode, manifest.batch_size, spectra, ranks))
        left[layer.name] = spectra[protected_mode(layer)].rank(energy)
        arrays |= {projection_name(layer.name, mode): spectra[mode].projection(ranks[mode]) for mode in modes}
        eigenvalues |= {f"{layer.name}/eigenvalues{mode}": one.eigenvalues for mode, one in enumerate(spectra)}
    return Projected(tuple(plans), arrays, eigenvalues, left, energy, measure.batches(part, batches))
