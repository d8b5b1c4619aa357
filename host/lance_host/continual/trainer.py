"""One task by stochastic gradient descent in PyTorch: for the first task, and for baselines.

The engine trains from the second task on.  What it does not express is left to this small loop: the first
task of a network that starts from random weights (batch-norm with the statistics of the batch, running
statistics that move), and baselines that replay images or change the loss.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lance_edge.datasets import Dataset
from lance_edge.errors import NumericalError
from lance_host.continual.multi_head import MultiHead, evaluate, set_training, tensors_of
from lance_host.continual.protocol import BatchNorm, Recipe

Parameters = Mapping[str, nn.Parameter]
Progress = Callable[[int, int], None]  # epochs done, at most


@dataclass(frozen=True)
class Batch:
    """Images `[B, 3, 32, 32]` and labels `[B]` of one task."""

    images: torch.Tensor
    labels: torch.Tensor
    task: str


class Objective(Protocol):
    """What makes a method: the gradient of a step, written into the parameters' `grad`."""

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters) -> float:
        """Fill `grad` of `parameters`, which is empty before; gives the loss."""


class CrossEntropy:
    """The mean cross-entropy of the batch: what plain backpropagation descends."""

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters) -> float:
        """See `Objective`."""
        loss = functional.cross_entropy(network(batch.images, batch.task), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


class Plateau:
    """The learning rate: divided when the validation loss has not improved for `patience` epochs."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._left = recipe.patience
        self.best = math.inf
        self.rate = recipe.lr

    @property
    def has_ended(self) -> bool:
        """Whether the rate fell below its least."""
        return self.rate < self._recipe.least_lr

    def improves(self, loss: float) -> bool:
        """Take the validation loss of an epoch into account; whether it is the best so far."""
        if loss < self.best:
            self.best, self._left = loss, self._recipe.patience
            return True
        self._left -= 1
        if self._left <= 0:
            self.rate, self._left = self.rate / self._recipe.factor, self._recipe.patience
        return False


def epoch_batches(count: int, batch_size: int, seed: int) -> Iterator[list[NDArray[np.int64]]]:
    """Rows of the full batches of one epoch after the other; what is left joins the next epoch."""
    generator = np.random.Generator(np.random.PCG64(seed))
    waiting = np.zeros(0, np.int64)
    while True:
        waiting = np.concatenate([waiting, generator.permutation(count)])
        whole = len(waiting) // batch_size
        yield list(waiting[: whole * batch_size].reshape(whole, batch_size))
        waiting = waiting[whole * batch_size :]


def train_task(
    network: MultiHead,
    task: str,
    data: Dataset,
    parameters: Parameters,
    objective: Objective,
    recipe: Recipe,
    batch_norm: BatchNorm,
    seed: int,
    progress: Progress,
    *,
    first_task: bool,
) -> int:
    """Train `parameters` in place to the epoch of the least validation loss; gives the number of epochs.

    Raises:
        NumericalError: if the loss is no number.
    """
    plateau, best = Plateau(recipe), network.state()
    batches = epoch_batches(len(data.train), min(recipe.batch_size, len(data.train)), seed)
    for epoch in range(1, recipe.epochs + 1):
        set_training(network, batch_norm, first_task=first_task)
        for rows in next(batches):
            batch = Batch(*tensors_of(data.train, rows), task)
            step(network, batch, parameters, objective, plateau.rate)
        loss, _ = evaluate(network, task, data.validation, batch_norm)
        if plateau.improves(loss):
            best = network.state()
        progress(epoch, recipe.epochs)
        if plateau.has_ended:
            break
    network.load(best)
    return epoch


def step(network: MultiHead, batch: Batch, parameters: Parameters, objective: Objective, rate: float) -> None:
    """One step of plain SGD.

    Raises:
        NumericalError: if the loss is no number.
    """
    for parameter in network.parameters():
        parameter.grad = None
    loss = objective.gradients(network, batch, parameters)
    if not math.isfinite(loss):
        raise NumericalError(
            f"task {batch.task}: the loss is {loss}; the learning rate {rate:g} is too large: lower it with --lr"
        )
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
