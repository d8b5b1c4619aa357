"""Learning-rate schedules: a table from name to rule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

FINAL_FRACTION = 0.01  # cosine ends at 1 % of the learning rate (the published recipe)
PLATEAU = "plateau"
PLATEAU_FACTOR = 0.5  # of the learning rate at every plateau


def cosine(learning_rate: float, step: int, total_steps: int) -> float:
    """From `learning_rate` at step 0 down half a cosine to 1 % of it at `total_steps`.

    The same values as PyTorch's `CosineAnnealingLR(T_max=total_steps, eta_min=0.01 * learning_rate)`.
    """
    floor = FINAL_FRACTION * learning_rate
    return floor + (learning_rate - floor) * (1 + math.cos(math.pi * step / total_steps)) / 2


def constant(learning_rate: float, step: int, total_steps: int) -> float:
    """Always `learning_rate`."""
    return learning_rate


# Of `plateau`, the rule between evaluations: what they change is in `Plateau.factor`.
SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "cosine": cosine,
    "constant": constant,
    PLATEAU: constant,
}


@dataclass
class Plateau:
    """Where schedule `plateau` stands; of another schedule it stays as it is here.

    Attributes:
        best_loss: the lowest so far; `None` before the first that is a number.
        waited: evaluations since then, or since the learning rate fell.
        factor: what is left of the learning rate.
        is_over: the run ends here, however many steps were planned.
    """

    best_loss: float | None = None
    waited: int = 0
    factor: float = 1.0
    is_over: bool = False

    def observe(self, loss: float, learning_rate: float, patience: int, least: float) -> None:
        """An evaluation: after `patience` without a lower loss, halve the learning rate, or end below `least`.

        The rule of GPM's published training (arXiv 2103.09762, its code): patience begins anew with every
        better loss and every lower learning rate.

        Args:
            loss: on the validation images.
            learning_rate: at the start of the run.
        """
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited < patience:
            return
        self.waited = 0
        if learning_rate * self.factor * PLATEAU_FACTOR < least:
            self.is_over = True
        else:
            self.factor *= PLATEAU_FACTOR
