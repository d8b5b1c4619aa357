"""The linear algebra of protected subspaces: which directions earlier tasks need, and which are left.

M `[D, m]` has orthonormal columns that span what earlier tasks' inputs of a layer are made of.  With the
second moment C `[D, D]` of a task's input (C = mean of x x^T), all is asked of `(I - M M^T) C (I - M M^T)`.

Workstation and board compute with these functions, so what they find is the same.  Up to 2,048 rows the
eigenvectors are exact; beyond, they come from randomised subspace iteration (Halko, Martinsson and Tropp,
arXiv 0909.4061), whose memory follows the number of vectors that are wanted, as long as these are few: where
the energy needs more than a quarter of all rows, they are exact again.

Source: GPM, arXiv 2103.09762, and LANCE, arXiv 2509.21617, continual learning.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_edge.energy import rank_for_energy
from lance_edge.errors import LanceError, NumericalError

DENSE_ROWS = 2048  # up to here an exact eigendecomposition; it takes six float64 matrices of D x D
# A random subspace takes some five matrices of D x columns and six power steps: with more columns than D / 4 it
# would take the memory of the exact method, and more time.  To stop there and report what was kept is no way
# out: earlier tasks were promised an energy, whatever the spectrum.
LARGEST_PART = 4
NOTHING = 1e-6  # of the energy: what float32 activations and moments cannot tell from zero
OVERSAMPLING = 16  # further columns of a random subspace, which make the wanted ones accurate
FIRST_COLUMNS = 64
POWER_STEPS = 6  # of a random subspace; the error falls with (λ[k + oversampling] / λ[k])^(2 steps)
BLOCK_ROWS = 512  # of C at a time, where it is float32 and has to be widened

Matrix = NDArray[np.floating]
Double = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """What a second moment has outside of a memory.

    `vectors` `[D, k]` are orthonormal and orthogonal to the memory; column j carries the energy
    `eigenvalues[j]`, descending.  `energy` is the trace of the projected moment, of all directions outside.
    """

    eigenvalues: Double
    vectors: Double
    energy: float


def check_threshold(threshold: float) -> None:
    """See that ε_cl is above 0 and at most 1.

    Raises:
        LanceError: if it is not.
    """
    if not 0.0 < threshold <= 1.0:
        raise LanceError(
            f"memory threshold: expected a number above 0 and at most 1, found {threshold:g}; the usual one is"
            " 0.97"
        )


def explained(covariance: Matrix, memory: Matrix) -> float:
    """The share of a task's energy inside the memory: `tr(M^T C M) / tr(C)`; 1 where there is no energy.

    Args:
        covariance: C `[D, D]`, symmetric.
        memory: M `[D, m]`, orthonormal columns; m may be 0.
    """
    total = _trace(covariance)
    return min(1.0, _inside(covariance, memory) / total) if total > 0 else 1.0


def extend(memory: Matrix, covariance: Matrix, threshold: float) -> Double:
    """The memory with what a finished task adds, `[D, m']`, m' >= m; its first m columns span the old one.

    The fewest eigenvectors of `(I - M M^T) C (I - M M^T)` that lift the energy inside to `threshold` of tr(C).

    Args:
        memory: M `[D, m]`, orthonormal columns.
        covariance: C `[D, D]` of the task.
        threshold: above 0 and at most 1.

    Raises:
        LanceError: if the threshold is out of range.
        NumericalError: if C is not finite.
    """
    check_threshold(threshold)
    total, inside = _trace(covariance), _inside(covariance, memory)
    missing = threshold * total - inside
    if missing <= NOTHING * total:
        return orthonormal(memory)
    found = outside(covariance, memory, missing)
    return orthonormal(np.hstack([memory, found.vectors[:, : _fewest(found.eigenvalues, missing)]]))


def null_rank(found: Directions, total: float, energy: float) -> int:
    """How many directions keep `energy` of all outside; 0 where that is nothing beside tr(C), `total`."""
    if found.energy <= NOTHING * total:
        return 0
    return _fewest(found.eigenvalues, energy * found.energy)


def outside(covariance: Matrix, memory: Matrix, energy: float) -> Directions:
    """Directions outside of the memory, by descending energy: at least so many that they have `energy`.

    Up to `DENSE_ROWS` rows, and where a quarter of the rows is too few, all D - m of them.

    Args:
        covariance: C `[D, D]`.
        memory: M `[D, m]`.
        energy: an absolute energy, as the trace of C is.

    Raises:
        NumericalError: if C is not finite.
    """
    if not np.isfinite(covariance).all():
        raise NumericalError(
            "second moment: expected finite values, found NaN or infinity; check weights and preprocessing"
        )
    left = max(0.0, _trace(covariance) - _inside(covariance, memory))
    found = _randomised(covariance, memory, left, energy) if len(covariance) > DENSE_ROWS else None
    return _exact(covariance, memory, left) if found is None else found


def orthonormal(columns: Matrix) -> Double:
    """The same spans, column by column, with orthonormal columns `[D, m]` of the same directions."""
    basis, triangle = np.linalg.qr(columns.astype(np.float64))
    return basis * np.where(np.diagonal(triangle) < 0, -1.0, 1.0)


def complement(memory: Matrix) -> Double:
    """An orthonormal basis `[D, D - m]` of everything orthogonal to M `[D, m]`."""
    whole, _ = np.linalg.qr(memory.astype(np.float64), mode="complete")
    return whole[:, memory.shape[1] :]


# --- eigenvectors -----------------------------------------------------------------------------------


def _exact(covariance: Matrix, memory: Matrix, left: float) -> Directions:
    """All directions: the eigenvectors of C within the complement, which no rounding can turn towards M."""
    basis = complement(memory)  # [D, n]
    values, vectors = np.linalg.eigh(basis.T @ (covariance @ basis))
    return Directions(np.maximum(values[::-1], 0.0), _signed(basis @ vectors[:, ::-1]), left)


def _randomised(covariance: Matrix, memory: Matrix, left: float, energy: float) -> Directions | None:
    """The leading directions, more at a time until they have the energy; `None` where that takes too many."""
    rows, inside = memory.shape
    most = min(rows // LARGEST_PART, rows - inside)
    rng, columns = np.random.default_rng(0), FIRST_COLUMNS
    vectors = np.empty((rows, 0))
    while most == rows - inside or energy <= left:
        wanted = min(columns, most)
        more = min(wanted + OVERSAMPLING, rows - inside) - vectors.shape[1]
        vectors = _iterate(covariance, memory, np.hstack([vectors, rng.standard_normal((rows, more))]))
        values, turn = np.linalg.eigh(vectors.T @ _times(covariance, vectors))
        values, vectors = np.maximum(values[::-1], 0.0), vectors @ turn[:, ::-1]
        if values[:wanted].sum() >= energy or wanted == rows - inside:
            return Directions(values[:wanted], _signed(vectors[:, :wanted]), left)
        if wanted == most:
            break
        columns *= 2
    return None


def _iterate(covariance: Matrix, memory: Matrix, start: Double) -> Double:
    """Power steps of the projected moment from `start` `[D, k]`; the result is orthogonal to M."""
    basis = orthonormal(_without(start, memory))
    for _ in range(POWER_STEPS):
        basis = orthonormal(_without(_times(covariance, basis), memory))
    return orthonormal(_without(basis, memory))


def _without(vectors: Double, memory: Matrix) -> Double:
    """`(I - M M^T) X`, twice: the second time takes what rounding left of the first."""
    for _ in range(2):
        vectors = vectors - memory @ (memory.T @ vectors)
    return vectors


def _times(covariance: Matrix, vectors: Double) -> Double:
    """`C X` `[D, k]` in float64, without a second copy of C."""
    return np.vstack([block @ vectors for block in _row_blocks(covariance)])


def _row_blocks(matrix: Matrix) -> Iterator[Double]:
    for start in range(0, len(matrix), BLOCK_ROWS):
        yield matrix[start : start + BLOCK_ROWS].astype(np.float64)


def _signed(vectors: Double) -> Double:
    """An eigenvector is only defined up to its sign: the entry of largest magnitude is made positive."""
    if not vectors.size:
        return vectors
    largest = np.argmax(np.abs(vectors), axis=0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


# --- energy -----------------------------------------------------------------------------------------


def _trace(covariance: Matrix) -> float:
    return float(np.trace(covariance, dtype=np.float64))


def _inside(covariance: Matrix, memory: Matrix) -> float:
    """`tr(M^T C M)`."""
    if not memory.shape[1]:
        return 0.0
    basis = memory.astype(np.float64)
    return float(np.sum(basis * _times(covariance, basis)))


def _fewest(eigenvalues: Double, energy: float) -> int:
    """The smallest k with `sum(λ[:k]) >= energy`, or all that are more than rounding."""
    found = float(eigenvalues.sum())
    return rank_for_energy(eigenvalues, min(1.0, energy / found)) if found > 0 and energy > 0 else 0
