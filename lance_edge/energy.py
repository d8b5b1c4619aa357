"""How many eigenvectors of a mode to keep: the energy rule, the same on workstation and board.

Energy is the sum of covariance eigenvalues, that is the variance of the activation, not its square.
Source: LANCE, arXiv 2509.21617, rank selection by the energy threshold ε.
"""

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import LanceError


def rank_for_energy(eigenvalues: NDArray[np.float64], energy: float) -> int:
    """The smallest r with `sum(λ[:r]) / sum(λ) >= energy`.

    A share that misses `energy` by no more than the rounding of the sum counts as reaching it: at
    `energy` 1.0 this keeps every eigenvalue above rounding, that is the numerical rank.  An all-zero
    spectrum (a dead layer) gives rank 1, so that no tensor is ever empty.

    Args:
        eigenvalues: `[n]`, descending, not negative.
        energy: ε, above 0 and at most 1.

    Examples:
        >>> rank_for_energy(np.array([6.0, 3.0, 1.0]), 0.9)
        2
        >>> rank_for_energy(np.array([6.0, 3.0, 0.0]), 1.0)
        2

    Raises:
        LanceError: if `energy` is out of range.
        ValueError: if there are no eigenvalues.
    """
    if not 0.0 < energy <= 1.0:
        raise LanceError(
            f"energy threshold: expected a number above 0 and at most 1, found {energy:g}; the usual one is 0.7"
        )
    if len(eigenvalues) == 0:
        raise ValueError("rank for energy: expected at least one eigenvalue, found none")
    cumulative = np.cumsum(eigenvalues, dtype=np.float64)
    rounding = len(eigenvalues) * np.finfo(np.float64).eps
    reached = cumulative >= (energy - rounding) * cumulative[-1]
    return int(np.argmax(reached)) + 1


def energy_kept(eigenvalues: NDArray[np.float64], rank: int) -> float:
    """`sum(λ[:rank]) / sum(λ)`, from 0 to 1; an all-zero spectrum loses nothing and gives 1.

    Args:
        eigenvalues: `[n]`, descending, not negative.
        rank: 0 to n.

    Examples:
        >>> energy_kept(np.array([6.0, 3.0, 1.0]), 2)
        0.9

    Raises:
        ValueError: if `rank` is out of range.
    """
    if not 0 <= rank <= len(eigenvalues):
        raise ValueError(f"energy kept: expected a rank from 0 to {len(eigenvalues)}, found {rank}")
    if not np.any(eigenvalues):
        return 1.0
    cumulative = np.cumsum(eigenvalues, dtype=np.float64)
    return float(cumulative[rank - 1] / cumulative[-1]) if rank else 0.0
