"""Stochastic gradient descent with momentum, weight decay and clipping, exactly as PyTorch does it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_device.numerics import largest_value
from lance_edge.errors import NumericalError

Tensors = dict[str, NDArray[np.float32]]

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SGD:
    """`g <- clip(g) + wd p;  v <- m v + g  (v = g the first time);  p <- p - lr v`, in float32.

    Attributes:
        clip: largest global norm of all gradients together; 0 leaves them as they are.
    """

    momentum: float
    weight_decay: float
    clip: float

    def update(self, parameters: Tensors, velocity: Tensors, gradients: Tensors, learning_rate: float) -> None:
        """One step, in place: of `parameters`, and of `velocity`, which is empty before the first step.

        Takes the arrays of `gradients` for its own use.  Nothing is changed when a value does not fit
        in float32, or memory does not suffice.

        Raises:
            NumericalError: naming the parameter whose update is not finite.
        """
        self.prepare(parameters, velocity, gradients, learning_rate)
        self.apply(parameters, velocity, gradients, learning_rate)

    @np.errstate(over="ignore", invalid="ignore")  # what overflows is found below and ends in one clear line
    def prepare(self, parameters: Tensors, velocity: Tensors, gradients: Tensors, learning_rate: float) -> None:
        """The first half of `update`, which may fail: makes the new momentum of each array of `gradients`."""
        if self.clip:
            _clip(gradients, self.clip)
        for name, gradient in gradients.items():
            if self.weight_decay:
                gradient += np.float32(self.weight_decay) * parameters[name]
            if self.momentum and name in velocity:
                gradient += np.float32(self.momentum) * velocity[name]
            _check_range(name, parameters[name], gradient, learning_rate)

    def apply(self, parameters: Tensors, velocity: Tensors, gradients: Tensors, learning_rate: float) -> None:
        """The second half: all memory that it takes, it takes before it changes anything."""
        scratch = np.empty(max((gradient.size for gradient in gradients.values()), default=0), np.float32)
        for name, gradient in gradients.items():
            change = scratch[: gradient.size].reshape(gradient.shape)
            parameters[name] -= np.multiply(gradient, np.float32(learning_rate), out=change)
            if self.momentum:
                velocity[name] = gradient  # the gradient array has become the new momentum


def _clip(gradients: Tensors, limit: float) -> None:
    factor = limit / (math.hypot(*map(_norm, gradients.values())) + CLIP_EPSILON)
    if factor < 1:
        for gradient in gradients.values():
            gradient *= np.float32(factor)


def _norm(array: NDArray[np.float32]) -> float:
    """Euclidean norm in float64, where no finite float32 overflows when squared."""
    return math.sqrt(float(np.square(array, dtype=np.float64).sum()))


def _check_range(
    name: str, parameter: NDArray[np.float32], velocity: NDArray[np.float32], learning_rate: float
) -> None:
    reach = largest_value(parameter) + learning_rate * largest_value(velocity)
    if not reach < FLOAT32_MAX:  # also true of nan
        raise NumericalError(f"the update of {name} is not finite in float32")
