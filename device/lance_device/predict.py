"""Classifying image files, or files of arrays."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.classifier import Classifier
from lance_device.evaluate import softmax
from lance_device.step_graphs import micro_batches
from lance_edge.arrays import read_arrays
from lance_edge.datasets import FilePart
from lance_edge.errors import DataError, ModelError
from lance_edge.images import Part, list_images, load_batch
from lance_edge.manifest import ArrayInput, InputSpec


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, likeliest first.

    `file` is its path; of an array in a file with many, `path[row]`.
    """

    file: Path
    ranking: tuple[tuple[str, float], ...]


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    top: int,
    micro_batch: int,
    on_bad: Callable[[str, DataError], None] | None = None,
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
    part = _open(classifier.preprocessing, paths)
    bad: list[str] = []

    def leave_out(name: str, error: DataError) -> None:
        if on_bad is None or len(part) == 1:
            raise error
        on_bad(name, error)
        bad.append(name)

    for rows in micro_batches(len(part), micro_batch):
        images, names = _load(part, rows, classifier.preprocessing, leave_out)
        yield from _ranked(classifier, images, names, top) if names else ()
    if len(bad) == len(part):
        raise DataError(
            f"{bad[0]}: cannot read this image, nor any of the other {len(bad) - 1}; give whole ones"
        )


def _load(
    part: Part, rows: slice, preprocessing: InputSpec, on_bad: Callable[[str, DataError], None]
) -> tuple[NDArray[np.float32], list[str]]:
    """Those of some samples that can be read, `[N, ...]`, and their names."""
    loaded, names = [], []
    for index in range(rows.start, rows.stop):
        try:
            loaded.append(load_batch(part, [index], preprocessing))  # [1, ...]
            names.append(part.names[index])
        except DataError as error:
            on_bad(part.names[index], error)
    return np.concatenate(loaded) if loaded else np.empty(0, np.float32), names


def _ranked(
    classifier: Classifier, images: NDArray[np.float32], names: Sequence[str], top: int
) -> Iterator[Prediction]:
    probabilities = softmax(classifier.logits(images))  # [N, classes]
    if probabilities.shape[1] != len(classifier.classes):
        raise ModelError(
            f"the model gives {probabilities.shape[1]} logits but names {len(classifier.classes)} classes;"
            " export it again with lance-host merge"
        )
    for name, row in zip(names, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        yield Prediction(Path(name), tuple((classifier.classes[i], float(row[i])) for i in best))


def _open(preprocessing: InputSpec, paths: Sequence[Path]) -> Part:
    if isinstance(preprocessing, ArrayInput):
        return read_arrays(paths, preprocessing.shape)
    files = tuple(list_images(paths))
    return FilePart(files, tuple(map(str, files)), np.zeros(len(files), np.int64))
