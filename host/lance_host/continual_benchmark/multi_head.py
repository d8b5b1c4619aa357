"""A network with a head for each task, as PyTorch trains and evaluates it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lance_edge.datasets import LEAST_FOR_VALIDATION
from lance_edge.errors import DataError, ModelError
from lance_edge.images import Part, load_batch
from lance_edge.input_spec import ArrayInput
from lance_edge.stream import shuffled
from lance_host.continual_benchmark.protocol import HEAD, BatchNorm
from lance_host.continual_benchmark.state import NetworkState
from lance_host.sources import open_source

EVALUATION_BATCH = 64  # the protocol's; with batch statistics the result depends on it
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)


class MultiHead(nn.Module):
    """The body of a network and one linear head a task; `[N, ...]` to the logits of the heads asked for."""

    def __init__(self, network: nn.Module, heads: Mapping[str, nn.Linear]) -> None:
        """Takes `network` over: its own head goes."""
        super().__init__()
        setattr(network, HEAD, nn.Identity())
        self.body = network
        self.tasks = list(heads)
        self.heads = nn.ModuleList(heads.values())

    def head(self, task: str) -> nn.Linear:
        """The head of a task."""
        head = self.heads[self.tasks.index(task)]
        assert isinstance(head, nn.Linear)
        return head

    def add_head(self, task: str, head: nn.Linear) -> None:
        """For one more task."""
        self.tasks.append(task)
        self.heads.append(head)

    def forward(self, images: torch.Tensor, task: str) -> torch.Tensor:
        """Images `[N, 3, 32, 32]` of one task to logits `[N, classes]`."""
        logits: torch.Tensor = self.head(task)(self.body(images))
        return logits

    def losses(self, images: torch.Tensor, labels: torch.Tensor, tasks: Sequence[str]) -> torch.Tensor:
        """Cross-entropy of each image by the head of its task, with one pass through the body: `[N]`."""
        features = self.body(images)
        parts = []
        for task in dict.fromkeys(tasks):
            rows = torch.tensor([row for row, name in enumerate(tasks) if name == task])
            logits = self.head(task)(features[rows])
            parts.append((rows, functional.cross_entropy(logits, labels[rows], reduction="none")))
        order = torch.argsort(torch.cat([rows for rows, _ in parts]))
        return torch.cat([losses for _, losses in parts])[order]

    def state(self) -> NetworkState:
        """A copy of all weights."""
        body = {name: tensor.detach().clone() for name, tensor in self.body.state_dict().items()}
        pairs = zip(self.tasks, self.heads.parameters(), strict=True)
        return NetworkState(body, {task: weight.detach().clone() for task, weight in pairs})

    def load(self, state: NetworkState) -> None:
        """Take over all weights."""
        self.body.load_state_dict(dict(state.body))
        with torch.no_grad():
            for task, weight in state.heads.items():
                self.head(task).weight.copy_(weight)


def check_network(name: str) -> None:
    """See that a network can have a head for each task.

    Raises:
        ModelError: if there is no such network, or its last layer cannot be exchanged.
    """
    head = dict(open_source(name).build(2).named_modules()).get(HEAD)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        found = "none" if head is None else f"{type(head).__name__}{' with bias' * isinstance(head, nn.Linear)}"
        raise ModelError(
            f"--network {name}: expected a linear layer without bias as the module {HEAD}, which is new for"
            f" every task, found {found}; take alexnet or resnet18-reduced, or name your own last layer so"
        )


def new_network(name: str, seed: int) -> MultiHead:
    """A network with random weights and no head yet.

    Args:
        name: as after `--model`; its last layer is a linear one without bias, the module `head`.

    Raises:
        ModelError: if there is no such network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MultiHead(open_source(name).build(2), {})


def network_of(name: str, state: NetworkState) -> MultiHead:
    """The network with the weights and heads of a state."""
    network = new_network(name, seed=0)
    for task, weight in state.heads.items():
        network.add_head(task, nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    network.load(state)
    return network


def new_head(network: str, classes: int, seed: int) -> nn.Linear:
    """A head with PyTorch's default initialisation, the same as `weights.load_weights` makes."""
    old = open_source(network).build(2).get_submodule(HEAD)
    assert isinstance(old, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(old.in_features, classes, bias=False)


def body_parameters(network: MultiHead, *, with_norms: bool) -> dict[str, nn.Parameter]:
    """What trains beside the head: all of task 1; afterwards weights of convolutions and linear layers."""
    norms = {id(p) for m in network.body.modules() if isinstance(m, BATCH_NORM) for p in m.parameters()}
    named = network.body.named_parameters()
    return {name: p for name, p in named if with_norms or id(p) not in norms}


def set_training(network: MultiHead, batch_norm: BatchNorm, *, first_task: bool, dropout: bool) -> None:
    """Batch-norm with the statistics of the batch, or with running ones, frozen after the first task."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.train(dropout)
    for module in _norms(network):
        module.track_running_stats = True
        module.train(batch_norm == "batch" or first_task)


def set_evaluation(network: MultiHead, batch_norm: BatchNorm) -> None:
    """Dropout off; batch-norm as the variant has it at test."""
    network.eval()
    if batch_norm == "batch":
        for module in _norms(network):
            module.track_running_stats = False  # a test must not move them
            module.train()


def _norms(network: MultiHead) -> Iterator[nn.BatchNorm1d | nn.BatchNorm2d]:
    return (module for module in network.modules() if isinstance(module, BATCH_NORM))


@torch.no_grad()
def evaluate(network: MultiHead, task: str, part: Part, batch_norm: BatchNorm) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on the images of a part.

    With batch statistics, in batches of 64 at most in a fixed shuffled order: sorted by class, a batch would
    tell its label.

    Raises:
        DataError: if there are none.
    """
    if not len(part):
        raise DataError(
            f"task {task}: no images to validate or test on; expected for every class one test image or more,"
            f" and {LEAST_FOR_VALIDATION} training images or more, of which one is for validation: add some"
        )
    set_evaluation(network, batch_norm)
    order = shuffled(np.random.PCG64(0), len(part))
    loss, correct = 0.0, 0
    for rows in np.array_split(order, -(-len(order) // EVALUATION_BATCH)):
        images, labels = tensors_of(part, rows)
        logits = network(images, task)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(order), correct / len(order)


def tensors_of(part: Part, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[n, 3, 32, 32]` and labels `[n]` of some rows of a part of float32 arrays."""
    images = load_batch(part, rows, ArrayInput((3, 32, 32)))
    return torch.from_numpy(images), torch.from_numpy(part.labels[rows])
