"""What a sample of each class is trained towards: class weights and label smoothing as two vectors.

The target of a sample of class c is `off`, plus `on[c]` at c.  With class weights w and smoothing s,
`on = (1 - s) w` and `off = w s / classes`, and the loss of a batch is the sum over its samples of
`-target . log softmax(logits)`, divided by the sum of `w[label]`: PyTorch's
`CrossEntropyLoss(weight=w, label_smoothing=s)`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_edge.names import TARGET_OFF, TARGET_ON


@dataclass(frozen=True, eq=False)
class Targets:
    """Class weights `[classes]`, all positive, and label smoothing from 0 to below 1."""

    class_weights: NDArray[np.float64]
    smoothing: float = 0.0

    @classmethod
    def plain(cls, classes: int) -> "Targets":
        """Of ordinary cross-entropy."""
        return cls(np.ones(classes))

    @property
    def is_plain(self) -> bool:
        """Whether this is ordinary cross-entropy."""
        return self.smoothing == 0 and bool((self.class_weights == 1).all())

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The two vectors by the names of the graphs' inputs, float32 `[classes]`."""
        weights, smoothing = self.class_weights, self.smoothing
        return {
            TARGET_ON: ((1 - smoothing) * weights).astype(np.float32),
            TARGET_OFF: (smoothing / len(weights) * weights).astype(np.float32),
        }

    def total_weight(self, labels: NDArray[np.int64]) -> float:
        """What the sum over a batch is divided by: the weights of its samples, added up."""
        return float(self.class_weights[labels].sum())


def balanced_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Weights with which every class counts as much as any other: `samples / (classes * samples of c)`.

    Their mean over the samples is 1.  A class without samples has the weight of one with one sample.
    """
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    return np.asarray(len(labels) / (classes * counts), np.float64)
