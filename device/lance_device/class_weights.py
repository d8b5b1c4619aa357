"""`--class-weights` and `--label-smoothing`: what each class is trained towards."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import DataError
from lance_edge.targets import Targets, balanced_weights

NONE, BALANCED = "none", "balanced"


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


def parse_weights(text: str) -> tuple[float, ...]:
    """`1,2.5,1` as positive numbers; empty for what is not understood."""
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        return ()
    return weights if all(0 < weight < math.inf for weight in weights) else ()


def is_understood(text: str) -> bool:
    """Whether it is `none`, `balanced` or weights."""
    return text in (NONE, BALANCED) or bool(parse_weights(text))
