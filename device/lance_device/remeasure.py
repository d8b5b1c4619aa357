"""After each task: every task's accuracy again, in `accuracy_matrix.csv`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lance_device.classifier import Classifier, all_heads
from lance_device.evaluate import evaluate, on_images
from lance_device.heads import find_task
from lance_device.options import DEFAULT_MICRO_BATCH, available_cores
from lance_device.task_folder import TaskFolder, TaskPlace
from lance_edge.accuracy_matrix import AccuracyMatrix, AfterTask, read_matrix, write_matrix
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import DataError
from lance_edge.memory import packed_memory
from lance_edge.names import WEIGHTS_MEMBER
from lance_edge.screening import find_bad, without

HEADS = "heads/"


def remeasure(folder: TaskFolder, note: Callable[[str], None]) -> AccuracyMatrix:
    """Add the rows that are missing: of every finished task, on its test images and those of all before.

    Rows that are there are kept: their images may be gone by now.  Where a task cannot be measured, because its
    images are gone or none of them is to test on, that is noted, and the row waits for the next time.
    """
    places = folder.learned()
    matrix = _known(folder.matrix, places, note)
    for place in places[len(matrix.rows) :]:
        try:
            matrix = matrix.plus(_row(place, places))
        except DataError as error:
            note(f"warning: {folder.matrix}: nothing is known after {place.record.task} yet: {error}")
            break
        write_matrix(folder.matrix, matrix)
    return matrix


def _known(path: Path, places: tuple[TaskPlace, ...], note: Callable[[str], None]) -> AccuracyMatrix:
    """The rows on disk, as far as they are of these tasks."""
    if not path.exists():
        return AccuracyMatrix()
    try:
        matrix = read_matrix(path)
    except DataError as error:
        note(f"warning: {error}; all tasks are measured again")
        return AccuracyMatrix()
    if matrix.tasks != tuple(place.record.task for place in places)[: len(matrix.rows)]:
        note(f"warning: {path}: is of other tasks; all are measured again")
        return AccuracyMatrix()
    return matrix


def _row(place: TaskPlace, places: tuple[TaskPlace, ...]) -> AfterTask:
    """What the network knows after one task, and what is kept by then."""
    with Bundle(place.package) as bundle:
        network = all_heads(bundle, place.checkpoint, available_cores())
        accuracies = []
        for earlier in places[: place.number]:
            is_own = earlier.number == place.number
            head = (
                network.heads[-1] if is_own else find_task(network.heads, earlier.record.task, str(bundle.path))
            )
            classifier = network.of_task(head)
            accuracies.append(_accuracy(bundle, Path(earlier.record.data), classifier))
        memory = packed_memory(bundle)
        layers = memory.layers if memory is not None else {}
        names = [layer.name for layer in bundle.manifest.layers]
        return AfterTask(
            task=place.record.task,
            accuracies=tuple(accuracies),
            ranks={name: sum(layers[name].ranks) if name in layers else 0 for name in names},
            kept_bytes=kept_bytes(bundle),
        )


def kept_bytes(bundle: Bundle) -> dict[str, int]:
    """What is kept from task to task, in bytes: the memory's columns, earlier heads, the network's weights."""
    memory, stored = packed_memory(bundle), bundle.arrays(WEIGHTS_MEMBER)
    sizes = {name: np.asarray(stored[name]).nbytes for name in stored}
    heads = sum(size for name, size in sizes.items() if name.startswith(HEADS))
    columns = memory.column_bytes if memory is not None else 0
    return {"memory": columns, "heads": heads, "weights": sum(sizes.values()) - heads}


def _accuracy(bundle: Bundle, data: Path, classifier: Classifier) -> float:
    dataset = open_dataset(data, bundle.manifest.split, classifier.classes)
    dataset = without(dataset, {row.name for row in find_bad(dataset, available_cores(), ("test",))})
    result = evaluate(on_images(classifier.logits, classifier.preprocessing), dataset.test, DEFAULT_MICRO_BATCH)
    if result is None:
        raise DataError(f"{data}: has no test images, so nobody can say what is still known of it; add test/")
    return result.accuracy
