"""The order of samples, on boards and workstations alike: an endless row of epochs, cut into batches.

Epoch after epoch, each a permutation of all training images; batch i takes the samples
`i * batch_size ... (i + 1) * batch_size` of that row.  So a remainder smaller than a batch joins the next
epoch, every batch is full, and after `ceil(epochs * count / batch_size)` batches every image was seen at
least `epochs` times: the last batch is filled up from the start of one more permutation.

Everything follows from seed and position alone, so a resumed run needs to know the step and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Entry = TypeVar("Entry", bound=np.generic)


@dataclass(frozen=True)
class SampleStream:
    """The training samples of a run.

    Attributes:
        count: training images.
        flip: mirror half of the samples, drawn anew for every epoch.
    """

    count: int
    batch_size: int
    seed: int
    shuffle: bool
    flip: bool

    def indices(self, step: int) -> NDArray[np.int64]:
        """Which images form the batch of a step (from 0): `[batch_size]`."""
        epochs, offsets = self._positions(step)
        if not self.shuffle:
            return offsets
        return _lookup(epochs, offsets, lambda epoch: permutation(self.seed, epoch, self.count))

    def flips(self, step: int) -> NDArray[np.bool_]:
        """Which samples of that batch are mirrored: `[batch_size]`."""
        epochs, offsets = self._positions(step)
        if not self.flip:
            return np.zeros(self.batch_size, dtype=np.bool_)
        return _lookup(epochs, offsets, lambda epoch: coin_tosses(self.seed, epoch, self.count))

    def dropout_seeds(self, step: int) -> NDArray[np.int64]:
        """What is dropped of each sample of that batch: `[batch_size]`, from 0 to below 2^31 - 1."""
        drawn = np.random.PCG64([self.seed, step, 2]).random_raw(self.batch_size)
        return (drawn >> np.uint64(34)).astype(np.int64)

    def total_steps(self, epochs: int) -> int:
        """Batches after which every image was seen at least `epochs` times."""
        return -(-epochs * self.count // self.batch_size)

    def complete_epochs(self, steps: int) -> int:
        """Epochs that lie wholly within the first `steps` batches."""
        return steps * self.batch_size // self.count

    def ends_epoch(self, steps: int) -> bool:
        """Whether the last of the first `steps` batches completed an epoch."""
        return self.complete_epochs(steps) > self.complete_epochs(steps - 1)

    def _positions(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start = step * self.batch_size
        positions = np.arange(start, start + self.batch_size, dtype=np.int64)
        return positions // self.count, positions % self.count


def _lookup(
    epochs: NDArray[np.int64], offsets: NDArray[np.int64], table: Callable[[int], NDArray[Entry]]
) -> NDArray[Entry]:
    """Entry `offsets[i]` of the table of epoch `epochs[i]`, for every i."""
    return np.concatenate([table(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])


@lru_cache(maxsize=2)  # a batch touches two epochs at most where it is no larger than an epoch
def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of `0 ... count - 1` that depends on nothing but the arguments."""
    return shuffled(np.random.PCG64([seed, epoch, 0]), count)


def shuffled(bits: np.random.PCG64, count: int) -> NDArray[np.int64]:
    """The next permutation of `0 ... count - 1` that a bit generator gives.

    Sorts raw generator output, which numpy promises to keep for ever; `Generator.permutation` may change
    between numpy versions, and then a run would not repeat on another board.
    """
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)


@lru_cache(maxsize=2)
def coin_tosses(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    """One fair coin toss for each position of an epoch."""
    bits = np.random.PCG64([seed, epoch, 1]).random_raw(count) >> np.uint64(63)
    return np.asarray(bits, dtype=np.bool_)
