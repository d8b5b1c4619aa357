"""Classifying image files, or files of arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.classifier import AllHeads, Classifier
from lance_device.evaluate import softmax
from lance_device.step_graphs import micro_batches
from lance_edge.arrays import read_arrays
from lance_edge.datasets import FilePart
from lance_edge.errors import ModelError
from lance_edge.images import Part, list_images, load_batch
from lance_edge.input_spec import ArrayInput, InputSpec


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, likeliest first.

    `file` is its path; of an array in a file with many, `path[row]`.  `task` is the one whose head answered,
    where several were asked.
    """

    file: Path
    ranking: tuple[tuple[str, float], ...]
    task: str | None = None


def predict(classifier: Classifier, paths: Sequence[Path], top: int, micro_batch: int) -> Iterator[Prediction]:
    """Classify files, and all images in folders, in the order of their names; or the arrays of files.

    Args:
        top: classes of a prediction.
        micro_batch: images in memory at a time.

    Raises:
        DataError: if there is no image, or one cannot be read.
        ModelError: if the model gives another number of logits than it names classes.
    """
    part = _open(classifier.preprocessing, paths)
    for rows in micro_batches(len(part), micro_batch):
        images = load_batch(part, range(rows.start, rows.stop), classifier.preprocessing)
        probabilities = softmax(classifier.logits(images))  # [N, classes]
        if probabilities.shape[1] != len(classifier.classes):
            raise ModelError(
                f"the model gives {probabilities.shape[1]} logits but names {len(classifier.classes)} classes;"
                " export it again with lance-host merge"
            )
        for name, row in zip(part.names[rows], probabilities, strict=True):
            yield Prediction(Path(name), _ranking(classifier.classes, row, top))


def predict_by_confidence(
    network: AllHeads, paths: Sequence[Path], top: int, micro_batch: int
) -> Iterator[Prediction]:
    """Classify by the head that is surest of its first class: of images whose task is not known.

    No head was trained to stay unsure of other tasks' images, and one with few classes is surer of everything:
    a guess, good where the tasks look very different.

    Raises:
        DataError: if there is no image, or one cannot be read.
    """
    part = _open(network.preprocessing, paths)
    for rows in micro_batches(len(part), micro_batch):
        images = load_batch(part, range(rows.start, rows.stop), network.preprocessing)
        found = [(head, softmax(logits)) for head, logits in network.logits(images)]
        for index, name in enumerate(part.names[rows]):
            head, row = max(((head, shares[index]) for head, shares in found), key=lambda pair: pair[1].max())
            yield Prediction(Path(name), _ranking(head.classes, row, top), head.task)


def _ranking(classes: Sequence[str], row: NDArray[np.float64], top: int) -> tuple[tuple[str, float], ...]:
    best = np.argsort(-row, kind="stable")[:top]
    return tuple((classes[i], float(row[i])) for i in best)


def _open(preprocessing: InputSpec, paths: Sequence[Path]) -> Part:
    if isinstance(preprocessing, ArrayInput):
        return read_arrays(paths, preprocessing.shape)
    files = tuple(list_images(paths))
    return FilePart(files, tuple(map(str, files)), np.zeros(len(files), np.int64))
