"""`--class-weights` and `--label-smoothing`: what each class is trained towards."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lance_device.class_weights_text import BALANCED, NONE, parse_weights
from lance_edge.errors import DataError
from lance_edge.targets import Targets, balanced_weights


def training_targets(text: str, smoothing: float, labels: NDArray[np.int64], classes: Sequence[str]) -> Targets:
    """The targets of a run.

    Args:
        text: `none`, `balanced`, or a number for each class.
        labels: of the training images, `[n]`: balanced weights come from their numbers.

    Raises:
        DataError: if weights were given for another number of classes.
    """
    if text == NONE:
        weights = np.ones(len(classes))
    elif text == BALANCED:
        weights = balanced_weights(labels, len(classes))
    else:
        weights = np.array(parse_weights(text))
    if len(weights) != len(classes):
        raise DataError(
            f"--class-weights {text}: expected {len(classes)} numbers, one for each of"
            f" {', '.join(classes)}, in this order; found {len(weights)}"
        )
    return Targets(weights, smoothing)
