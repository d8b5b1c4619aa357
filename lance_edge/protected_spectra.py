"""The spectra of a layer's modes in patch mode or beside a memory, and the ranks that follow from them.

The protected mode may have a basis for each group, and none of its directions has a part in the memory.  A mode
without a second moment (too many positions) is kept whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lance_edge import subspace
from lance_edge.accounting import factored_activation_bytes
from lance_edge.manifest import Layer, Mode
from lance_edge.memory import LayerMemory, empty_layer
from lance_edge.moments import mode_sizes, protected_mode, protected_shape
from lance_edge.patch_accounting import PatchCost
from lance_edge.spectrum import ModeSpectrum, decompose

Double = NDArray[np.float64]


@dataclass(frozen=True)
class ProtectedSpectrum:
    """What each group's moment has outside of the memory.

    `totals` is the trace of each group's moment.  Up to `whole_below` dimensions all directions are taken.
    """

    groups: tuple[subspace.Directions, ...]
    totals: tuple[float, ...]
    whole_below: int = 0

    @property
    def dimension(self) -> int:
        """D."""
        return len(self.groups[0].vectors)

    @property
    def eigenvalues(self) -> Double:
        """`[n]`, or of several groups `[g, n]`, padded with zeros."""
        padded = np.zeros((len(self.groups), max(len(one.eigenvalues) for one in self.groups)))
        for row, one in zip(padded, self.groups, strict=True):
            row[: len(one.eigenvalues)] = one.eigenvalues
        return padded[0] if len(self.groups) == 1 else padded

    def rank(self, energy: float) -> int:
        """The largest rank that a group needs; 0 where no group has anything left."""
        return max(self._rank(*pair, energy) for pair in zip(self.groups, self.totals, strict=True))

    def _rank(self, one: subspace.Directions, total: float, energy: float) -> int:
        rank = subspace.null_rank(one, total, energy)
        return one.vectors.shape[1] if rank and self.dimension <= self.whole_below else rank

    def kept(self, rank: int) -> float:
        """The share of the energy outside that this rank keeps."""
        left = sum(one.energy for one in self.groups)
        inside = sum(float(one.eigenvalues[:rank].sum()) for one in self.groups)
        return min(1.0, inside / left) if left > 0 else 1.0

    def projection(self, rank: int) -> NDArray[np.float32]:
        """U `[D, rank]`, or `[g, D, rank]`; zeros for a group that has nothing left, or fewer directions."""
        bases = np.zeros((len(self.groups), self.dimension, rank), np.float32)
        for basis, one, total in zip(bases, self.groups, self.totals, strict=True):
            if subspace.null_rank(one, total, 1.0):
                columns = one.vectors[:, :rank]
                basis[:, : columns.shape[1]] = columns
        return bases[0] if len(bases) == 1 else bases


@dataclass(frozen=True)
class WholeMode:
    """A mode that is not compressed."""

    size: int

    @property
    def eigenvalues(self) -> Double:
        """Not known: none."""
        return np.zeros(0)

    def rank(self, energy: float) -> int:
        """Its size."""
        return self.size

    def kept(self, rank: int) -> float:
        """All of it."""
        return 1.0

    def projection(self, rank: int) -> NDArray[np.float32]:
        """The identity `[n, n]`."""
        return np.eye(self.size, dtype=np.float32)


def layer_spectra_of(
    layer: Layer,
    mode: Mode,
    batch_size: int,
    moments: Mapping[int, NDArray[np.floating]],
    memory: LayerMemory | None,
    energy: float,
    whole_below: int = 0,
) -> tuple[ModeSpectrum, ...]:
    """The spectra of all modes of a layer, in the order of `Layer.modes_in`.

    Args:
        moments: second moments by mode, of `LayerMoments` or of `stats.npz`.
        memory: what earlier tasks need.
        energy: the largest ε that ranks will be asked for (a randomised decomposition goes no further).
    """
    sizes, protected = mode_sizes(layer, mode, batch_size), protected_mode(layer)
    spectra: list[ModeSpectrum] = []
    for index, size in enumerate(sizes):
        if index == protected:
            before = memory or empty_layer(*protected_shape(layer, mode))
            spectra.append(protected_spectrum(moments[index], before, energy, whole_below))
        elif index in moments:
            spectra.append(decompose(moments[index].astype(np.float64)))
        else:
            spectra.append(WholeMode(size))
    return tuple(spectra)


def protected_spectrum(
    covariance: NDArray[np.floating], memory: LayerMemory, energy: float, whole_below: int = 0
) -> ProtectedSpectrum:
    """What `[g, D, D]` has outside of the memory."""
    totals = tuple(float(np.trace(one, dtype=np.float64)) for one in covariance)
    groups = []
    for group, one in enumerate(covariance):
        basis = memory.basis(group)
        left = (1 - subspace.explained(one, basis)) * totals[group]
        wanted = np.inf if len(one) <= whole_below else energy * left
        groups.append(subspace.outside(one, basis, wanted))
    return ProtectedSpectrum(tuple(groups), totals, whole_below)


def ranks_of(
    layer: Layer, mode: Mode, batch_size: int, spectra: Sequence[ModeSpectrum], energy: float
) -> tuple[int, ...]:
    """The ranks of all modes that keep `energy`, or more for no more bytes; 0 where nothing is left.

    Compressing the batch or the positions of a convolution may take more than it saves: then they stay whole.
    """
    ranks = tuple(one.rank(energy) for one in spectra)
    if 0 in ranks:
        return ranks
    sizes = mode_sizes(layer, mode, batch_size)
    may_be_whole = [0, 2] if mode == "patch" and not layer.is_linear else [0]
    candidates = [ranks]
    for index in may_be_whole:
        candidates += [(*one[:index], sizes[index], *one[index + 1 :]) for one in candidates]
    return min(reversed(candidates), key=lambda one: activation_bytes(layer, mode, batch_size, one))


def ranks_by_mode(
    layers: Sequence[Layer],
    mode: Mode,
    batch_size: int,
    spectra: Mapping[str, Sequence[ModeSpectrum]],
    energy: float,
) -> dict[str, tuple[int, ...]]:
    """The ranks of several layers."""
    return {layer.name: ranks_of(layer, mode, batch_size, spectra[layer.name], energy) for layer in layers}


def activation_bytes(layer: Layer, mode: Mode, batch_size: int, ranks: Sequence[int]) -> int:
    """The paper's activation bytes of a layer in either mode."""
    if mode == "patch" and not layer.is_linear:
        return PatchCost(layer, batch_size, ranks).activation_bytes
    return factored_activation_bytes(layer, batch_size, ranks)
