"""Phase I of LANCE: the spectrum of every mode of a layer's input, streamed over calibration batches.

For N batches A of a layer's input, mode i has the mean covariance `C_i = sum A_(i) A_(i)^T / N`, where
`A_(i)` is the mode-i unfolding, `[n_i, product of the other sizes]`.  The eigenvectors of `C_i` are the
left singular vectors of all unfoldings side by side, so the batches never have to be kept.

Source: LANCE, arXiv 2509.21617, one-shot calibration.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lance_edge.spectrum import Spectrum as Spectrum
from lance_edge.spectrum import decompose

# Float64 values of an unfolding that exist at a time (8 MiB); a batch is unfolded piece by piece.
SLAB_VALUES = 1 << 20


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
