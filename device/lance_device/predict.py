"""Classifying image files, or files of arrays."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.classifier import AllHeads, Classifier
from lance_device.evaluate import softmax
from lance_device.step_graphs import micro_batches
from lance_edge.arrays import read_arrays
from lance_edge.datasets import FilePart
from lance_edge.errors import DataError, ModelError
from lance_edge.images import Part, list_images, load_batch
from lance_edge.input_spec import ArrayInput, InputSpec

OnBad = Callable[[str, DataError], None]  # name of the image, what is wrong


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, likeliest first.

    `file` is its path; of an array in a file with many, `path[row]`.  `task` is the one whose head answered,
    where several were asked.
    """

    file: Path
    ranking: tuple[tuple[str, float], ...]
    task: str | None = None


def predict(
    classifier: Classifier, paths: Sequence[Path], top: int, micro_batch: int, on_bad: OnBad | None = None
) -> Iterator[Prediction]:
    """Classify files, and all images in folders, in the order of their names; or the arrays of files.

    Args:
        top: classes of a prediction.
        micro_batch: images in memory at a time.
        on_bad: told of every image that cannot be read, which is left out; by default the first is an error.

    Raises:
        DataError: if there is no image, or none that can be read.
        ModelError: if the model gives another number of logits than it names classes.
    """
    for images, names in _readable(classifier.preprocessing, paths, micro_batch, on_bad):
        probabilities = softmax(classifier.logits(images))  # [N, classes]
        if probabilities.shape[1] != len(classifier.classes):
            raise ModelError(
                f"the model gives {probabilities.shape[1]} logits but names {len(classifier.classes)} classes;"
                " export it again with lance-host merge"
            )
        for name, row in zip(names, probabilities, strict=True):
            yield Prediction(Path(name), _ranking(classifier.classes, row, top))


def predict_by_confidence(
    network: AllHeads, paths: Sequence[Path], top: int, micro_batch: int, on_bad: OnBad | None = None
) -> Iterator[Prediction]:
    """Classify by the head that is surest of its first class: of images whose task is not known.

    No head was trained to stay unsure of other tasks' images, and one with few classes is surer of everything:
    a guess, good where the tasks look very different.

    Raises:
        DataError: if there is no image, or none that can be read.
    """
    for images, names in _readable(network.preprocessing, paths, micro_batch, on_bad):
        found = [(head, softmax(logits)) for head, logits in network.logits(images)]
        for index, name in enumerate(names):
            head, row = max(((head, shares[index]) for head, shares in found), key=lambda pair: pair[1].max())
            yield Prediction(Path(name), _ranking(head.classes, row, top), head.task)


def _ranking(classes: Sequence[str], row: NDArray[np.float64], top: int) -> tuple[tuple[str, float], ...]:
    best = np.argsort(-row, kind="stable")[:top]
    return tuple((classes[i], float(row[i])) for i in best)


def _readable(
    preprocessing: InputSpec, paths: Sequence[Path], micro_batch: int, on_bad: OnBad | None
) -> Iterator[tuple[NDArray[np.float32], list[str]]]:
    """Samples that can be read, `[N, ...]`, with their names, at most a micro-batch at a time."""
    part = _open(preprocessing, paths)
    bad: list[str] = []
    for rows in micro_batches(len(part), micro_batch):
        loaded, names = [], []
        for index in range(rows.start, rows.stop):
            try:
                loaded.append(load_batch(part, [index], preprocessing))  # [1, ...]
                names.append(part.names[index])
            except DataError as error:
                if on_bad is None or len(part) == 1:
                    raise
                on_bad(part.names[index], error)
                bad.append(part.names[index])
        if loaded:
            yield np.concatenate(loaded), names
    if len(bad) == len(part):
        raise DataError(
            f"{bad[0]}: cannot read this image, nor any of the other {len(bad) - 1}; give whole ones"
        )


def _open(preprocessing: InputSpec, paths: Sequence[Path]) -> Part:
    if isinstance(preprocessing, ArrayInput):
        return read_arrays(paths, preprocessing.shape)
    files = tuple(list_images(paths))
    return FilePart(files, tuple(map(str, files)), np.zeros(len(files), np.int64))
