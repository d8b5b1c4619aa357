"""What a method hands from task to task: the network's weights and a head for each task so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from lance_edge.errors import CheckpointError
from lance_edge.files import atomic_writer
from lance_host.continual_benchmark.protocol import HEAD

WEIGHT = f"{HEAD}.weight"
HEADS = "heads/"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class NetworkState:
    """After a task.

    Attributes:
        body: the state dict without the head, batch-norm statistics included.
        heads: weight of each task's head `[classes, features]`, by task name, in the order of the tasks.
    """

    body: Tensors
    heads: Tensors = field(default_factory=dict)

    def single(self, task: str) -> dict[str, torch.Tensor]:
        """The state dict of the network with this task's head."""
        return {**self.body, WEIGHT: self.heads[task]}

    def with_task(self, task: str, single: Tensors) -> "NetworkState":
        """After one more task, from the state dict that it ended with."""
        body = {name: tensor for name, tensor in single.items() if name != WEIGHT}
        return NetworkState(body, {**self.heads, task: single[WEIGHT]})

    @property
    def kept_bytes(self) -> dict[str, int]:
        """What is kept of it for further tasks, as boards count it: earlier heads; the rest and the newest."""
        *earlier, newest = map(_nbytes, self.heads.values())
        return {"heads": sum(earlier), "weights": newest + sum(map(_nbytes, self.body.values()))}


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def write_state(path: Path, state: NetworkState) -> None:
    """Write atomically; the order of the heads is kept.

    Raises:
        StorageError: if it cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.body.items()}
    tensors |= {f"{HEADS}{task}": head.contiguous() for task, head in state.heads.items()}
    data = safetensors.torch.save(tensors, metadata={"tasks": "\n".join(state.heads)})
    with atomic_writer(path) as file:
        file.write(data)


def read_state(path: Path) -> NetworkState:
    """Read what `write_state` wrote.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tasks = (file.metadata() or {})["tasks"].split("\n")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        heads = {task: tensors[f"{HEADS}{task}"] for task in tasks if task}
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a readable state of a benchmark ({error}); remove its folder and learn again"
        ) from None
    return NetworkState({n: t for n, t in tensors.items() if not n.startswith(HEADS)}, heads)
