"""One task to be learnt by one method: what it is given, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import CheckpointError
from lance_edge.files import atomic_writer
from lance_edge.sealed import write_sealed
from lance_host.continual_benchmark.protocol import HEAD, BatchNorm, Preset
from lance_host.continual_benchmark.records import CARRY, STATE
from lance_host.continual_benchmark.state import NetworkState, read_state
from lance_host.continual_benchmark.tasks import Task
from lance_host.continual_benchmark.trainer import Progress
from lance_host.layers import list_layers
from lance_host.sources import open_source

Arrays = dict[str, NDArray[np.generic]]
SEEDS_APART = 1000  # more than any benchmark has tasks


@dataclass(frozen=True)
class Job:
    """A task for a method.

    Attributes:
        tasks: of the benchmark; `number` is the one to learn, from 0.
        folder: of this task, kept until the method has learnt it; what is found there may be gone on with.
        before: folder of the task before, `None` for the first.
        first: folder in which methods share what the first task gives.
        relax: how far the protection is loosened; 0 is strict.
        threads: `None` takes all cores.
    """

    network: str
    preset: Preset
    method: str
    batch_norm: BatchNorm
    tasks: tuple[Task, ...]
    number: int
    seed: int
    folder: Path
    before: Path | None
    first: Path
    relax: float
    threads: int | None
    say: Callable[[str], None]
    progress: Progress

    @property
    def task(self) -> Task:
        """The task to learn."""
        return self.tasks[self.number]

    @property
    def task_seed(self) -> int:
        """Of the order of images, of the new head and of dropout: the same for every method."""
        return SEEDS_APART * self.seed + self.number

    def state_before(self) -> NetworkState:
        """The network after the task before.

        Raises:
            CheckpointError: if its folder is damaged.
        """
        assert self.before is not None
        return read_state(self.before / STATE)


@dataclass(frozen=True)
class Learnt:
    """The network after a task, and what it took; see `records.TaskRecord`."""

    state: NetworkState
    epochs: int
    activation_bytes: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    kept_bytes: Mapping[str, int] = field(default_factory=dict)


def write_carry(folder: Path, arrays: Arrays) -> int:
    """Keep what a method remembers beside the network; gives its bytes.

    Raises:
        StorageError: if it cannot be written.
    """
    with atomic_writer(folder / CARRY) as file:
        write_sealed(file, arrays)
    return sum(array.nbytes for array in arrays.values())


def read_carry(folder: Path) -> Arrays:
    """What `write_carry` wrote.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with np.load(folder / CARRY, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "sha256"}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CARRY}: not readable ({error}); remove its folder: the task is learnt again"
        ) from None


def bp_activation_bytes(network: str, batch_size: int) -> int:
    """What plain backpropagation keeps of the inputs of all layers but the head."""
    module = open_source(network).build(2)
    candidates = list_layers(module.eval(), (3, 32, 32), HEAD)
    return sum(candidate.bp_bytes(batch_size) for candidate in candidates)
