"""The heads of all tasks that a package knows: for each its classes and its own last layer, on one trunk."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_device.checkpoint import Checkpoint
from lance_device.graphs import float_array
from lance_edge.bundle import Bundle
from lance_edge.errors import DataError
from lance_edge.names import WEIGHTS_MEMBER, head_name

Float = NDArray[np.float32]


@dataclass(frozen=True)
class TaskHead:
    """A task's name (empty for a package of a single one), its classes, and the parameters that are its own."""

    task: str
    classes: tuple[str, ...]
    parameters: dict[str, Float]


def task_heads(bundle: Bundle, checkpoint: Checkpoint) -> tuple[TaskHead, ...]:
    """The heads of all tasks, in the order in which they were learnt; the checkpoint's own is the last.

    Raises:
        ArtifactError: if an earlier one is missing or of another shape.
    """
    manifest = bundle.manifest
    stored = bundle.arrays(WEIGHTS_MEMBER) if manifest.tasks else {}
    earlier = [
        TaskHead(
            task.name,
            task.classes,
            {
                spec.name: float_array(stored, head_name(task.name, spec.name), spec.sizes(0), bundle)
                for spec in task.head
            },
        )
        for task in manifest.tasks
    ]
    own = {name: checkpoint.parameters[name] for name in manifest.head if name in checkpoint.parameters}
    return (*earlier, TaskHead(manifest.task, manifest.classes, own))


def find_task(heads: Sequence[TaskHead], wanted: str, where: str) -> TaskHead:
    """The head of a task by its name, or by its number from 1.

    Raises:
        DataError: if there is no such task.
    """
    for number, head in enumerate(heads, start=1):
        if wanted in (head.task, str(number)):
            return head
    known = ", ".join(f"{number} ({head.task or 'unnamed'})" for number, head in enumerate(heads, start=1))
    raise DataError(f"{where}: no task {wanted!r} here; expected one of {known}")
