"""Learning-rate schedules: a table from name to rule."""

import math
from collections.abc import Callable

FINAL_FRACTION = 0.01  # cosine ends at 1 % of the learning rate (the published recipe)


def cosine(learning_rate: float, step: int, total_steps: int) -> float:
    """From `learning_rate` at step 0 down half a cosine to 1 % of it at `total_steps`.

    The same values as PyTorch's `CosineAnnealingLR(T_max=total_steps, eta_min=0.01 * learning_rate)`.
    """
    floor = FINAL_FRACTION * learning_rate
    return floor + (learning_rate - floor) * (1 + math.cos(math.pi * step / total_steps)) / 2


def constant(learning_rate: float, step: int, total_steps: int) -> float:
    """Always `learning_rate`."""
    return learning_rate


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {"cosine": cosine, "constant": constant}
