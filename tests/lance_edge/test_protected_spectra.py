"""Ranks and bases outside of a memory: each group by itself, and no mode cut where that saves nothing."""

import itertools

import numpy as np
import pytest

from lance_edge.manifest import Layer
from lance_edge.memory import LayerMemory, pack
from lance_edge.moments import mode_sizes
from lance_edge.protected_spectra import (
    WholeMode,
    activation_bytes,
    layer_spectra_of,
    protected_spectrum,
    ranks_of,
)
from lance_edge.subspace import orthonormal


def moments_of(rng: np.random.Generator, groups: int, rows: int, decay: float = 0.7) -> np.ndarray:
    factors = rng.standard_normal((groups, rows, rows)) * decay ** np.arange(rows)
    return factors @ factors.transpose(0, 2, 1)


def memory_of(rng: np.random.Generator, rows: int, ranks: tuple[int, ...]) -> LayerMemory:
    return pack([orthonormal(rng.standard_normal((rows, rank))) for rank in ranks])


def literal_basis(covariance: np.ndarray, basis: np.ndarray, energy: float) -> np.ndarray:
    """The fewest eigenvectors of (I - M M^T) C (I - M M^T) that keep the energy."""
    outside = np.eye(len(basis)) - basis @ basis.T
    values, vectors = np.linalg.eigh(outside @ covariance @ outside)
    rank = int(np.argmax(np.cumsum(values[::-1]) >= energy * values.sum())) + 1
    return vectors[:, ::-1][:, :rank]


def test_every_group_has_its_own_directions():
    rng = np.random.default_rng(0)
    covariance, memory = moments_of(rng, 3, 9), memory_of(rng, 9, (0, 4, 7))
    spectrum = protected_spectrum(covariance, memory, 0.9)
    bases = [literal_basis(covariance[g], memory.basis(g), 0.9) for g in range(3)]
    rank = spectrum.rank(0.9)
    assert rank == max(basis.shape[1] for basis in bases)
    found = spectrum.projection(rank)
    assert found.shape == (3, 9, rank)
    for group, basis in enumerate(bases):
        own = found[group, :, : basis.shape[1]]  # float32; signs of eigenvectors are free
        np.testing.assert_allclose(own @ own.T, basis @ basis.T, atol=1e-5)
        np.testing.assert_allclose(found[group].T @ memory.basis(group), 0, atol=1e-6)
    assert not found[2, :, 2:].any()  # two dimensions are left
    assert spectrum.eigenvalues.shape == (3, 9)


def test_the_energy_kept_is_that_of_all_groups_together():
    rng = np.random.default_rng(1)
    covariance, memory = moments_of(rng, 2, 6), memory_of(rng, 6, (1, 3))
    spectrum = protected_spectrum(covariance, memory, 0.9)
    bases = spectrum.projection(2).astype(np.float64)
    outside = [np.eye(6) - memory.basis(g) @ memory.basis(g).T for g in range(2)]
    left = sum(np.trace(outside[g] @ covariance[g] @ outside[g]) for g in range(2))
    kept = sum(np.trace(bases[g].T @ covariance[g] @ bases[g]) for g in range(2))
    assert spectrum.kept(2) == pytest.approx(kept / left, rel=1e-5)


def test_a_group_with_nothing_left_gets_zeros_and_all_of_them_freeze_the_layer():
    rng = np.random.default_rng(2)
    covariance = moments_of(rng, 2, 5)
    half = protected_spectrum(covariance, memory_of(rng, 5, (5, 1)), 0.98)
    assert half.rank(0.98) > 0
    assert not half.projection(2)[0].any()
    assert protected_spectrum(covariance, memory_of(rng, 5, (5, 5)), 0.98).rank(0.98) == 0


def test_small_modes_take_their_whole_null_space():
    rng = np.random.default_rng(3)
    covariance, memory = moments_of(rng, 1, 12, 0.3), memory_of(rng, 12, (4,))
    assert protected_spectrum(covariance, memory, 0.9).rank(0.9) < 8
    assert protected_spectrum(covariance, memory, 0.9, whole_below=12).rank(0.9) == 8
    assert protected_spectrum(covariance, memory, 0.9, whole_below=11).rank(0.9) < 8


def conv(groups: int, size: int) -> Layer:
    shapes = ((8, 6 // groups, 3, 3), (6, size, size), (8, size, size))
    return Layer("conv", "conv.weight", *shapes, (1, 1), (1, 1, 1, 1), (1, 1), groups)


LINEAR = Layer("fc", "fc.weight", (7, 20), (20,), (7,), (), (), (), 1)


@pytest.mark.parametrize("decay", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("layer", [conv(1, 4), conv(2, 4), conv(1, 12), LINEAR])
def test_modes_are_cut_where_that_saves_bytes(layer, decay):
    """Against every choice of modes to be kept whole: the least bytes, and never less than the energy."""
    rng, batch = np.random.default_rng(4), 16
    sizes = mode_sizes(layer, "patch", batch)
    groups = [layer.groups if mode == 1 and not layer.is_linear else 1 for mode in range(len(sizes))]
    moments = {mode: moments_of(rng, groups[mode], size, decay) for mode, size in enumerate(sizes)}
    protected = 1
    given = {mode: moment if mode == protected else moment[0] for mode, moment in moments.items()}
    spectra = layer_spectra_of(layer, "patch", batch, given, None, 0.9)
    least = tuple(one.rank(0.9) for one in spectra)
    free = [mode for mode in range(len(sizes)) if mode != protected]
    choices = [
        tuple(sizes[mode] if mode in whole else rank for mode, rank in enumerate(least))
        for count in range(len(free) + 1)
        for whole in itertools.combinations(free, count)
    ]
    found = ranks_of(layer, "patch", batch, spectra, 0.9)
    assert found in choices
    assert activation_bytes(layer, "patch", batch, found) == min(
        activation_bytes(layer, "patch", batch, ranks) for ranks in choices
    )


def test_modes_without_a_moment_stay_whole():
    rng, layer = np.random.default_rng(5), conv(1, 4)
    moments = {0: moments_of(rng, 1, 16)[0], 1: moments_of(rng, 1, 54)}
    spectra = layer_spectra_of(layer, "patch", 16, moments, None, 0.9)
    assert spectra[2] == WholeMode(16)
    assert ranks_of(layer, "patch", 16, spectra, 0.9)[2] == 16
    whole = WholeMode(3)
    assert (whole.rank(0.5), whole.kept(3), whole.eigenvalues.size) == (3, 1.0, 0)
    np.testing.assert_array_equal(whole.projection(3), np.eye(3))
