"""Accuracy and loss of a network on labelled images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.step_graphs import micro_batches
from lance_edge.datasets import Dataset, open_dataset
from lance_edge.errors import DataError
from lance_edge.images import Part, load_batch
from lance_edge.input_spec import InputSpec
from lance_edge.manifest import Manifest

Float = NDArray[np.float32]
Classify = Callable[[Part, slice], Float]  # some images of a part -> logits [N, classes]


@dataclass(frozen=True)
class Evaluation:
    """How well a network does on some images.

    Attributes:
        loss: mean cross-entropy.
        class_counts, class_correct: images, and rightly classified ones, of each class: `[classes]`.
    """

    loss: float
    class_counts: tuple[int, ...]
    class_correct: tuple[int, ...]

    @property
    def count(self) -> int:
        """Images."""
        return sum(self.class_counts)

    @property
    def accuracy(self) -> float:
        """Fraction of images that were classified rightly."""
        return sum(self.class_correct) / self.count

    @property
    def class_accuracy(self) -> tuple[float | None, ...]:
        """Accuracy of each class, `None` where it has no image here."""
        pairs = zip(self.class_correct, self.class_counts, strict=True)
        return tuple(correct / count if count else None for correct, count in pairs)


def open_labelled(data: Path, manifest: Manifest, classes: Sequence[str]) -> Dataset:
    """Images of a task of the package.

    Args:
        classes: of the task.

    Raises:
        DataError: if they are of other classes, naming the task of which these are.
    """
    try:
        return open_dataset(data, manifest.split, classes)
    except DataError:
        found = set(open_dataset(data, manifest.split).classes)
        tasks = {**{task.name: task.classes for task in manifest.tasks}, manifest.task: manifest.classes}
        meant = [name for name, known in tasks.items() if name and set(known) == found != set(classes)]
        if not meant:
            raise
    raise DataError(f"{data}: expected other classes, found those of task {meant[0]}; give --task {meant[0]}")


def on_images(network: Callable[[Float], Float], preprocessing: InputSpec) -> Classify:
    """Classify by a network that takes prepared images `[N, 3, R, R]`."""

    def classify(part: Part, rows: slice) -> Float:
        return network(load_batch(part, np.arange(rows.start, rows.stop), preprocessing))

    return classify


def evaluate(
    classify: Classify, part: Part, micro_batch: int, before_each: Callable[[], None] = lambda: None
) -> Evaluation | None:
    """Evaluate on every image of a part, `None` if it has no images.

    Args:
        micro_batch: images in memory at a time.
        before_each: called before every micro-batch; may raise to leave.

    Raises:
        DataError: if an image cannot be read.
    """
    loss_sum, predicted = 0.0, []
    for rows in micro_batches(len(part), micro_batch):
        before_each()
        logits = classify(part, rows)  # [N, classes]
        loss_sum += float(cross_entropy(logits, part.labels[rows]).sum())
        predicted.append(logits.argmax(axis=1))
        classes = logits.shape[1]
    if not predicted:
        return None
    hits = part.labels[np.concatenate(predicted) == part.labels]
    return Evaluation(
        loss=loss_sum / len(part),
        class_counts=tuple(np.bincount(part.labels, minlength=classes).tolist()),
        class_correct=tuple(np.bincount(hits, minlength=classes).tolist()),
    )


@np.errstate(over="ignore", invalid="ignore")  # a network that diverged has a loss of inf or nan
def cross_entropy(logits: Float, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """`-log softmax(logits)[label]` of each sample, in float64: `[N, classes], [N] -> [N]`."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    return np.asarray(np.log(np.exp(shifted).sum(axis=1)) - chosen)


@np.errstate(over="ignore", invalid="ignore")
def softmax(logits: Float) -> NDArray[np.float64]:
    """Class probabilities `[N, classes]`."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
