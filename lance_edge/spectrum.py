"""The eigendecomposition of one mode's second moment: what ranks and projections are made from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lance_edge.energy import energy_kept, rank_for_energy


class ModeSpectrum(Protocol):
    """What ranks and projections of a mode are made from."""

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Descending; of several groups a row each."""

    def rank(self, energy: float) -> int:
        """The smallest rank that keeps the share `energy` (ε)."""

    def kept(self, rank: int) -> float:
        """The share of the energy that a rank keeps."""

    def projection(self, rank: int) -> NDArray[np.float32]:
        """`U [n, rank]`, orthonormal columns."""


@dataclass(frozen=True)
class Spectrum:
    """The eigendecomposition of one mode's mean covariance.

    `eigenvalues` `[n]` are float64, descending and not negative; column j of `eigenvectors` `[n, n]`
    belongs to eigenvalue j.
    """

    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.float64]

    def projection(self, rank: int) -> NDArray[np.float32]:
        """`U [n, rank]`: the leading eigenvectors, columns orthonormal to 1e-5.

        Raises:
            ValueError: if `rank` is not between 0 and n.
        """
        size = len(self.eigenvalues)
        if not 0 <= rank <= size:
            raise ValueError(f"projection: expected a rank from 0 to {size}, found {rank}; cut it to the mode")
        return np.ascontiguousarray(self.eigenvectors[:, :rank], dtype=np.float32)

    def rank(self, energy: float) -> int:
        """The smallest rank that keeps the share `energy` (ε)."""
        return rank_for_energy(self.eigenvalues, energy)

    def kept(self, rank: int) -> float:
        """The share of the energy that a rank keeps."""
        return energy_kept(self.eigenvalues, rank)


def decompose(covariance: NDArray[np.float64]) -> Spectrum:
    """The spectrum of a covariance: eigenvalues descending, rounding below zero clipped, signs made unique.

    An eigenvector is only defined up to its sign: the entry of largest magnitude is made positive.
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.where(vectors[largest, np.arange(len(values))] < 0, -1.0, 1.0)
    return Spectrum(np.maximum(values, 0.0), vectors * signs)
