"""Phase I of LANCE: the spectrum of every mode of a layer's input, streamed over calibration batches.

For N batches A of a layer's input, mode i has the mean covariance `C_i = sum A_(i) A_(i)^T / N`, where
`A_(i)` is the mode-i unfolding, `[n_i, product of the other sizes]`.  The eigenvectors of `C_i` are the
left singular vectors of all unfoldings side by side, so the batches never have to be kept.

Source: LANCE, arXiv 2509.21617, one-shot calibration.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lance_edge.energy import energy_kept, rank_for_energy

# Float64 values of an unfolding that exist at a time (8 MiB); a batch is unfolded piece by piece.
SLAB_VALUES = 1 << 20


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


class ModeCovariances:
    """The running covariances of all modes of one layer's input.

    Holds one float64 `[n_i, n_i]` matrix per mode, whatever the number of batches.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Start at zero for inputs of `shape`, the batch first: `[B, C, H, W]`, `[B, T, F]` or `[B, F]`.

        Raises:
            ValueError: for fewer than two modes, or an empty one.
        """
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"mode covariances: expected two or more sizes, all positive, found {shape}")
        self.shape = tuple(shape)
        self.count = 0
        self._sums = tuple(np.zeros((size, size), np.float64) for size in shape)

    def add(self, activation: NDArray[np.float32]) -> None:
        """Add one batch; `activation` must have exactly this object's shape.

        Raises:
            ValueError: for any other shape; nothing is added.
        """
        if activation.shape != self.shape:
            raise ValueError(
                f"mode covariances: expected an activation of shape {self.shape}, found {activation.shape};"
                " give every batch in full"
            )
        for mode, total in enumerate(self._sums):
            for unfolded in _unfoldings(activation, mode):  # [n_mode, part of the rest]
                total += unfolded @ unfolded.T
        self.count += 1

    def mean(self, mode: int) -> NDArray[np.float64]:
        """`C_mode [n, n]`, averaged over the batches seen so far.

        Raises:
            ValueError: before the first batch.
        """
        if self.count == 0:
            raise ValueError("mode covariances: no batch was added; add at least one before reading them")
        return self._sums[mode] / self.count

    def spectra(self) -> tuple[Spectrum, ...]:
        """The spectrum of every mode, in the order of the shape.

        Raises:
            ValueError: before the first batch.
        """
        return tuple(decompose(self.mean(mode)) for mode in range(len(self.shape)))


def _unfoldings(activation: NDArray[np.float32], mode: int) -> Iterator[NDArray[np.float64]]:
    """The mode's unfolding in pieces of columns, each `[n_mode, part]`, about `SLAB_VALUES` values.

    The one copy made is the conversion to float64, which also puts the mode first.  The pieces are cut
    along another axis than the mode's, so each has all n_mode rows and their products simply add up.
    """
    axis = 1 if mode == 0 else 0
    length = activation.shape[axis]
    step = max(1, SLAB_VALUES * length // activation.size)
    others = (other for other in range(activation.ndim) if other not in (mode, axis))
    moved = activation.transpose(mode, axis, *others)  # [n_mode, length, ...]
    for start in range(0, length, step):
        slab = np.array(moved[:, start : start + step], dtype=np.float64, order="C")
        yield slab.reshape(len(slab), -1)


def decompose(covariance: NDArray[np.float64]) -> Spectrum:
    """The spectrum of a covariance: eigenvalues descending, rounding below zero clipped, signs made unique.

    An eigenvector is only defined up to its sign: the entry of largest magnitude is made positive.
    """
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.where(vectors[largest, np.arange(len(values))] < 0, -1.0, 1.0)
    return Spectrum(np.maximum(values, 0.0), vectors * signs)
