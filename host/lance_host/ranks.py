"""Ranks of all trainable layers: by one energy threshold, and the threshold that fills a budget.

Source: LANCE, arXiv 2509.21617, rank selection by the energy threshold ε.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lance_edge.accounting import factored_activation_bytes
from lance_edge.energy import rank_for_energy
from lance_edge.manifest import Layer

Ranks = dict[str, tuple[int, ...]]
# Layer name -> eigenvalues of each mode, float64, descending.
Eigenvalues = Mapping[str, Sequence[NDArray[np.float64]]]

BISECTIONS = 40  # narrow ε to 1e-12, far below the distance of two eigenvalues' shares


def ranks_by_energy(eigenvalues: Eigenvalues, energy: float) -> Ranks:
    """The smallest rank of every mode that keeps a share `energy` of its variance (ε).

    Raises:
        LanceError: if `energy` is not above 0 and at most 1.
    """
    return {
        layer: tuple(rank_for_energy(values, energy) for values in modes)
        for layer, modes in eigenvalues.items()
    }


def energy_for_budget(layers: Sequence[Layer], eigenvalues: Eigenvalues, batch_size: int, budget: int) -> float:
    """The largest single ε whose activation bytes, all layers together, are at most `budget`.

    Found by bisection: more energy never takes fewer bytes (but where the whole batch mode is kept, at ε
    close to 1, a factor falls away).

    Raises:
        ValueError: if not even rank 1 everywhere fits.
    """

    def fits(energy: float) -> bool:
        return activation_bytes(layers, batch_size, ranks_by_energy(eigenvalues, energy)) <= budget

    low, high = np.finfo(np.float64).tiny, 1.0  # rank 1 everywhere, full ranks
    if not fits(low):
        raise ValueError(f"budget: expected room for rank 1 in every mode, found {budget} bytes")
    if fits(high):
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def activation_bytes(layers: Sequence[Layer], batch_size: int, ranks: Ranks) -> int:
    """The paper's activation memory of all layers: cores and factors."""
    return sum(factored_activation_bytes(layer, batch_size, ranks[layer.name]) for layer in layers)
