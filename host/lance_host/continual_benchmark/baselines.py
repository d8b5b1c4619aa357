"""Baselines that the engine cannot express, each as the gradient of a step.

They share network, data, schedule, first task and the trained parameters of the body with the methods of the
engine; the gradient differs, and what is kept from task to task.  Beside the head of the new task, ER and
A-GEM train the heads of earlier ones, whose kept images their gradients come from; EWC does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from lance_edge.images import Part
from lance_edge.stream import shuffled
from lance_host.continual_benchmark.multi_head import MultiHead, set_evaluation, tensors_of
from lance_host.continual_benchmark.trainer import Batch, Parameters, backward

Arrays = dict[str, NDArray[np.generic]]


class Baseline(Protocol):
    """An objective that remembers something of earlier tasks."""

    @property
    def replays(self) -> bool:
        """Whether a step has images of earlier tasks, so that their heads train too."""

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters, rate: float) -> float:
        """See `trainer.Objective`."""

    def finish(self, network: MultiHead, task: str, part: Part, parameters: Parameters) -> None:
        """Remember a task that was learnt, from its training images."""

    def kept(self) -> Arrays:
        """What it remembers, to be stored."""

    def recall(self, kept: Arrays) -> None:
        """Go on from `kept()`."""


# --- replay -------------------------------------------------------------------------------------------


class Replay:
    """Images of earlier tasks, chosen by reservoir sampling (Vitter 1985): all equally likely."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity, self._seed = capacity, seed
        self._seen = 0
        self._images = torch.zeros(0, 3, 32, 32)
        self._labels = torch.zeros(0, dtype=torch.int64)
        self._tasks: list[str] = []
        self._draws = np.random.PCG64([seed, 0])

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: str, part: Part) -> None:
        """Offer every training image of a task."""
        bits = np.random.PCG64([self._seed, 1, self._seen])
        rows: dict[int, int] = {}  # place in the buffer -> row of the part
        for row in shuffled(bits, len(part)):
            place = self._seen if self._seen < self._capacity else int(bits.random_raw()) % (self._seen + 1)
            if place < self._capacity:
                rows[place] = int(row)
            self._seen += 1
        grown = max([len(self), *(place + 1 for place in rows)])
        images, labels = tensors_of(part, np.array(list(rows.values()), np.int64))
        self._images = torch.cat([self._images, torch.zeros(grown - len(self), 3, 32, 32)])
        self._labels = torch.cat([self._labels, torch.zeros(grown - len(self), dtype=torch.int64)])
        self._tasks += [task] * (grown - len(self))
        places = torch.tensor(list(rows), dtype=torch.int64)
        self._images[places], self._labels[places] = images, labels
        for place in rows:
            self._tasks[place] = task

    def begin_task(self) -> None:
        """The draws of a task depend on what was seen before it alone: a run that is resumed repeats them."""
        self._draws = np.random.PCG64([self._seed, 0, self._seen])

    def draw(self, count: int) -> Batch:
        """So many different images, or all that there are."""
        chosen = shuffled(self._draws, len(self))[:count]
        rows = torch.from_numpy(chosen)
        return Batch(self._images[rows], self._labels[rows], [self._tasks[row] for row in chosen])

    def kept(self) -> Arrays:
        """The buffer."""
        return {
            "images": self._images.numpy(),
            "labels": self._labels.numpy(),
            "tasks": np.array(self._tasks, np.str_),
            "seen": np.array(self._seen),
        }

    def recall(self, kept: Arrays) -> None:
        """Go on from `kept()`."""
        self._images, self._labels = torch.from_numpy(kept["images"]), torch.from_numpy(kept["labels"])
        self._tasks, self._seen = [str(name) for name in kept["tasks"]], int(kept["seen"])


class _Replaying:
    """What ER and A-GEM have in common: a buffer that is filled after every task."""

    replays = True

    def __init__(self, capacity: int, seed: int) -> None:
        self.replay = Replay(capacity, seed)

    def finish(self, network: MultiHead, task: str, part: Part, parameters: Parameters) -> None:
        """Offer the task's images to the buffer."""
        self.replay.add(task, part)
        self.replay.begin_task()

    def kept(self) -> Arrays:
        """The buffer."""
        return self.replay.kept()

    def recall(self, kept: Arrays) -> None:
        """The buffer."""
        self.replay.recall(kept)
        self.replay.begin_task()


class ExperienceReplay(_Replaying):
    """ER (Chaudhry et al. 2019, arXiv 1902.10486): the mean loss over the batch and as many kept images.

    Not in the engine: a step there has the images of one data set and the logits of one head.
    """

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters, rate: float) -> float:
        """See `trainer.Objective`."""
        kept = self.replay.draw(len(batch.labels))
        images, labels = (torch.cat([getattr(b, name) for b in (batch, kept)]) for name in ("images", "labels"))
        return backward(network, Batch(images, labels, [*batch.tasks, *kept.tasks]))


class AveragedGem(_Replaying):
    """A-GEM (Chaudhry et al., ICLR 2019, arXiv 1812.00420): never against the gradient of kept images.

    Not in the engine: it takes a second gradient a step, at the same weights, through heads of other tasks,
    and a product over all parameters.
    """

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters, rate: float) -> float:
        """See `trainer.Objective`."""
        backward(network, self.replay.draw(len(batch.labels)))
        reference = _taken(parameters)
        loss = backward(network, batch)
        for parameter, gradient in zip(
            parameters.values(), project_agem(_taken(parameters), reference), strict=True
        ):
            parameter.grad = gradient
        return loss


def project_agem(gradient: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`g - (g . r / r . r) r` where `g . r < 0`, else `g`; products over all tensors together (eq. 11)."""
    along = sum(float((g * r).sum()) for g, r in zip(gradient, reference, strict=True))
    square = sum(float((r * r).sum()) for r in reference)
    if along >= 0 or square == 0:
        return list(gradient)
    return [g - (along / square) * r for g, r in zip(gradient, reference, strict=True)]


def _taken(parameters: Parameters) -> list[torch.Tensor]:
    """The gradients, which are left empty; zeros where there is none."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    return taken


# --- elastic weight consolidation ---------------------------------------------------------------------


@dataclass
class ElasticWeights:
    """EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): a spring on every weight, as stiff as it mattered.

    The penalty is `lambda / 2 sum_k F_k (w - w_k)^2` over the earlier tasks k, with the diagonal F_k of the
    Fisher information at the end of task k.  Only `sum F_k` and `sum F_k w_k` are kept, so memory does not
    grow; the gradient is `lambda (w sum F_k - sum F_k w_k)`.  Of a step of rate h the penalty is taken where
    the step ends (implicitly), which divides the gradient by `1 + h lambda sum F_k`: the same where a spring is
    soft, and no spring is too stiff for the rate.

    Heads have no springs: that of an earlier task has no part in the loss, and stays as it is.

    Not in the engine: the gradient has a term that depends on the weights alone, and the Fisher information
    needs the gradient of every image for itself.
    """

    penalty: float
    samples: int
    seed: int
    replays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Nothing is held yet."""
        self._stiffness: dict[str, torch.Tensor] = {}
        self._pull: dict[str, torch.Tensor] = {}

    def gradients(self, network: MultiHead, batch: Batch, parameters: Parameters, rate: float) -> float:
        """See `trainer.Objective`."""
        loss = backward(network, batch)
        for name, stiffness in self._stiffness.items():
            parameter = parameters[name]
            assert parameter.grad is not None
            parameter.grad += self.penalty * (stiffness * parameter.detach() - self._pull[name])
            parameter.grad /= 1 + rate * self.penalty * stiffness
        return loss

    def finish(self, network: MultiHead, task: str, part: Part, parameters: Parameters) -> None:
        """Add the spring of a task."""
        fisher = fisher_diagonal(network, task, part, parameters, self.samples, self.seed)
        for name, values in fisher.items():
            pull = values * parameters[name].detach()
            self._stiffness[name] = self._stiffness.get(name, torch.zeros_like(values)) + values
            self._pull[name] = self._pull.get(name, torch.zeros_like(values)) + pull

    def kept(self) -> Arrays:
        """Both sums of every weight."""
        groups = {"stiffness": self._stiffness, "pull": self._pull}
        return {f"{kind}/{name}": t.numpy() for kind, group in groups.items() for name, t in group.items()}

    def recall(self, kept: Arrays) -> None:
        """Go on from `kept()`."""
        for kind, group in (("stiffness/", self._stiffness), ("pull/", self._pull)):
            group |= {n.removeprefix(kind): torch.from_numpy(a) for n, a in kept.items() if n.startswith(kind)}


def fisher_diagonal(
    network: MultiHead, task: str, part: Part, parameters: Parameters, samples: int, seed: int
) -> dict[str, torch.Tensor]:
    """Mean over images of the squared gradient of the log-likelihood of their labels, one image at a time.

    Batch-norm runs with its running statistics, dropout is off: an image alone has no batch.
    """
    set_evaluation(network, "running")
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    rows = shuffled(np.random.PCG64([seed, 2]), len(part))[:samples]
    for row in rows:
        images, labels = tensors_of(part, np.array([row]))
        for parameter in parameters.values():
            parameter.grad = None
        functional.cross_entropy(network(images, task), labels).backward()  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            sums[name] += parameter.grad**2
    return {name: total / len(rows) for name, total in sums.items()}
