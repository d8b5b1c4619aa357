"""The mean gradient error of a layer over a grid of ranks, and which of them are worth their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lance_edge.accounting import FLOAT32_BYTES, factored_activation_bytes
from lance_edge.manifest import Layer
from lance_host.gradient_error import Grids, gradient_errors
from lance_host.hosvd import Spectrum


@dataclass(frozen=True)
class Candidate:
    """Ranks of one layer: activation bytes, and the mean distance to the exact weight gradient."""

    ranks: tuple[int, ...]
    nbytes: int
    error: float


class ErrorTable:
    """The mean gradient error of one layer at every combination of ranks of a grid."""

    def __init__(self, layer: Layer, batch_size: int, grids: Grids) -> None:
        """`grids` has the ranks of each mode, ascending."""
        self.layer = layer
        self.batch_size = batch_size
        self.grids = grids
        self._distances = np.zeros([len(grid) for grid in grids])
        self._norm = 0.0
        self.batches = 0

    def add(self, x: torch.Tensor, dy: torch.Tensor, spectra: Sequence[Spectrum]) -> None:
        """Add one batch, compressed with the leading vectors of these spectra."""
        bases = [torch.from_numpy(spectrum.projection(len(spectrum.eigenvalues))) for spectrum in spectra]
        distances, norm = gradient_errors(self.layer, x, dy, bases, self.grids)
        self._distances += distances.numpy()
        self._norm += norm
        self.batches += 1

    @property
    def gradient_norm(self) -> float:
        """The mean norm of the exact gradient."""
        return self._norm / self.batches

    def candidate(self, ranks: tuple[int, ...]) -> Candidate:
        """The candidate at these ranks, which must be of the grid."""
        place = tuple(grid.index(rank) for grid, rank in zip(self.grids, ranks, strict=True))
        return self._candidate(ranks, float(self._distances[place]))

    def frontier(self) -> list[Candidate]:
        """Those of the whole grid that are better than all cheaper ones, the cheapest first."""
        improves = _improving(self._all_bytes().ravel(), self._distances.ravel())
        places = np.unravel_index(improves, self._distances.shape)
        modes = (np.take(grid, place).tolist() for grid, place in zip(self.grids, places, strict=True))
        distances = self._distances.ravel()[improves].tolist()
        return [
            self._candidate(ranks, one) for ranks, one in zip(zip(*modes, strict=True), distances, strict=True)
        ]

    def _candidate(self, ranks: tuple[int, ...], distance: float) -> Candidate:
        nbytes = factored_activation_bytes(self.layer, self.batch_size, ranks)
        return Candidate(ranks, nbytes, distance / self.batches)

    def _all_bytes(self) -> NDArray[np.int64]:
        """`factored_activation_bytes` of the whole grid."""
        modes = range(len(self.grids))
        core, factors = np.ones([1 for _ in modes], np.int64), np.zeros([1 for _ in modes], np.int64)
        for mode, (size, grid) in enumerate(
            zip((self.batch_size, *self.layer.input_shape), self.grids, strict=True)
        ):
            ranks = np.expand_dims(np.array(grid, np.int64), [other for other in modes if other != mode])
            whole_batch = (ranks == size) if mode == 0 else False
            core = core * ranks
            factors = factors + np.where(whole_batch, 0, size * ranks)
        return FLOAT32_BYTES * (core + factors)


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that are better than all cheaper ones, the cheapest first."""
    nbytes = np.array([candidate.nbytes for candidate in candidates])
    errors = np.array([candidate.error for candidate in candidates])
    return [candidates[index] for index in _improving(nbytes, errors)]


def _improving(nbytes: NDArray[np.int64], errors: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the entries with a smaller error than all that take fewer bytes, or as many."""
    order = np.lexsort((errors, nbytes))
    least = np.minimum.accumulate(errors[order])
    improves = np.r_[True, least[1:] < least[:-1]]
    return order[improves].astype(np.int64)
