"""Values that are no numbers: found before a step is applied, named, and what the run does about it.

`--on-nan stop` ends the run with the state before the step saved; `skip` goes on with the next batch;
`halve-lr` does the same, and halves the learning rate of all steps to come.  What a step would have done is
never applied in part: weights and momentum are those of the last good step.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import NumericalError
from lance_edge.names import LOSS

Array = NDArray[Any]

RATE_FACTORS = {"stop": 1.0, "skip": 1.0, "halve-lr": 0.5}  # of the learning rate, for each bad step
ON_NAN = tuple(RATE_FACTORS)
MOST_IN_A_ROW = 10  # bad steps without a good one between them: the weights themselves have gone wrong


def finite_loss(values: Mapping[str, Array], frozen: Iterable[str], parameters: Mapping[str, Array]) -> float:
    """The loss among the outputs of forward.

    Args:
        values: what forward read and gave, as far as it is still there.
        frozen: names of the features, which the frozen part of the network gives.
        parameters: the trained tensors by state-dict name.

    Raises:
        NumericalError: if it is not finite, naming where that begins.
    """
    loss = float(values[LOSS])
    if math.isfinite(loss):
        return loss
    for name in frozen:
        if name in values and not np.isfinite(values[name]).all():
            raise NumericalError(f"the loss is {loss}: {name}, of the frozen layers, is not finite")
    largest = max(parameters, key=lambda name: largest_value(parameters[name]))
    raise NumericalError(
        f"the loss is {loss}: what the frozen layers give is finite, so it is the trained ones; the largest"
        f" weight is {largest_value(parameters[largest]):.2g}, of layer {layer_of(largest)}"
    )


def check_gradients(gradients: Mapping[str, Array]) -> None:
    """See that all gradients are numbers.

    Raises:
        NumericalError: naming the layers whose gradients are not.
    """
    bad = [layer_of(name) for name, gradient in gradients.items() if not np.isfinite(gradient).all()]
    if bad:
        raise NumericalError(f"the gradient of layer {', '.join(dict.fromkeys(bad))} is not finite")


def layer_of(parameter: str) -> str:
    """`blocks.3.conv` of `blocks.3.conv.weight`."""
    return parameter.rpartition(".")[0] or parameter


def largest_value(array: Array) -> float:
    """The largest magnitude."""
    return max(abs(float(array.max())), abs(float(array.min()))) if array.size else 0.0
