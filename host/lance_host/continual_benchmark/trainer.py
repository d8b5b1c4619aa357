"""One task by stochastic gradient descent in PyTorch: for the first task, and for baselines.

The engine trains from the second task on.  What it does not express is left to this small loop: the first
task of a network that starts from random weights (batch-norm with the statistics of the batch, running
statistics that move), and baselines that replay images or change the loss.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lance_edge.datasets import Dataset
from lance_edge.errors import NumericalError
from lance_edge.stream import SampleStream
from lance_host.continual_benchmark.multi_head import MultiHead, evaluate, set_training, tensors_of
from lance_host.continual_benchmark.protocol import BatchNorm, Recipe

Parameters = Mapping[str, nn.Parameter]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Batch:
    """Images `[B, 3, 32, 32]`, labels `[B]`, and the name of each image's task."""

    images: torch.Tensor
    labels: torch.Tensor
    tasks: Sequence[str]


class Material(Protocol):
    """What is trained on: one task, or all of them at once."""

    @property
    def count(self) -> int:
        """Training images."""

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """Some of them."""

    def validation_loss(self, network: MultiHead, batch_norm: BatchNorm) -> float:
        """Mean cross-entropy on the validation images."""


@dataclass(frozen=True)
class OneTask:
    """The images of a task."""

    name: str
    data: Dataset

    @property
    def count(self) -> int:
        """See `Material`."""
        return len(self.data.train)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """See `Material`."""
        return Batch(*tensors_of(self.data.train, rows), [self.name] * len(rows))

    def validation_loss(self, network: MultiHead, batch_norm: BatchNorm) -> float:
        """See `Material`."""
        return evaluate(network, self.name, self.data.validation, batch_norm)[0]


class AllTasks:
    """The images of several tasks, mixed."""

    def __init__(self, parts: Sequence[OneTask]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(part.count for part in parts)])

    @property
    def count(self) -> int:
        """See `Material`."""
        return int(self._starts[-1])

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """See `Material`; the images of a task stand together."""
        of = np.searchsorted(self._starts, rows, side="right") - 1  # [B], number of the task
        batches = [self._parts[k].batch(rows[of == k] - self._starts[k]) for k in np.unique(of)]
        images, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels"))
        return Batch(images, labels, [task for b in batches for task in b.tasks])

    def validation_loss(self, network: MultiHead, batch_norm: BatchNorm) -> float:
        """See `Material`; every image counts alike."""
        sizes = [len(part.data.validation) for part in self._parts]
        losses = [part.validation_loss(network, batch_norm) for part in self._parts]
        return float(np.average(losses, weights=sizes))


class Objective(Protocol):
    """What makes a method: the gradient of a step, written into the parameters' `grad`."""

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters, rate: float) -> float:
        """Fill `grad` of `parameters`, which is empty before, for a step of `rate`; gives the loss."""


class CrossEntropy:
    """The mean cross-entropy of the batch: what plain backpropagation descends."""

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters, rate: float) -> float:
        """See `Objective`."""
        return backward(network, batch)


def backward(network: MultiHead, batch: Batch) -> float:
    """Add the gradient of the mean cross-entropy to `grad`; gives the loss."""
    loss = network.losses(batch.images, batch.labels, batch.tasks).mean()
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
    """Rows of the batches of one epoch after the other: those that a board takes with the same seed."""
    stream = SampleStream(count, batch_size, seed, shuffle=True, flip=False)
    for epoch in itertools.count():
        steps = range(stream.total_steps(epoch), stream.total_steps(epoch + 1))
        yield [stream.indices(step) for step in steps]


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        first_task: batch-norm moves its running statistics.
        say: told after every epoch: epochs done, and at most.
    """

    recipe: Recipe
    batch_norm: BatchNorm
    seed: int
    first_task: bool
    dropout: bool
    say: Progress


def train(
    network: MultiHead, material: Material, parameters: Parameters, objective: Objective, how: Training
) -> int:
    """Train `parameters` in place, to the epoch of the least validation loss; gives the number of epochs.

    Raises:
        NumericalError: if the loss is no number.
    """
    recipe, plateau, best = how.recipe, Plateau(how.recipe), network.state()
    batches = epoch_batches(material.count, min(recipe.batch_size, material.count), how.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)  # of dropout
        for epoch in range(1, recipe.epochs + 1):
            set_training(network, how.batch_norm, first_task=how.first_task, dropout=how.dropout)
            for rows in next(batches):
                step(network, material.batch(rows), parameters, objective, plateau.rate)
            if plateau.improves(material.validation_loss(network, how.batch_norm)):
                best = network.state()
            how.say(epoch, recipe.epochs)
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
    loss = objective.gradients(network, batch, parameters, rate)
    if not math.isfinite(loss):
        raise NumericalError(
            f"task {batch.tasks[0]}: the loss is {loss}; a learning rate of {rate:g} is too large: lower --lr"
        )
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
