"""Protected subspaces against the literal formulas on the projected second moment."""

import tracemalloc

import numpy as np
import pytest

from lance_edge import subspace
from lance_edge.errors import LanceError, NumericalError
from lance_edge.memory import LayerMemory
from lance_edge.protected_spectra import protected_spectrum
from lance_edge.subspace import explained, extend, orthonormal, outside

ROUNDING = 1e-10  # float64 products of matrices of some dozen rows, whose entries are of size 1


def moment(rng: np.random.Generator, rows: int, rank: int | None = None) -> np.ndarray:
    """A second moment with a decaying spectrum."""
    factor = rng.standard_normal((rows, rank or rows)) * 0.8 ** np.arange(rank or rows)
    return factor @ factor.T


def memory_of(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return orthonormal(rng.standard_normal((rows, columns)))


def null_basis(covariance: np.ndarray, memory: np.ndarray, energy: float, whole_below: int = 0) -> np.ndarray:
    """U `[D, r]` of the next task's projection, as `protected_spectrum` finds it, in float64."""
    known = LayerMemory(memory[None], (memory.shape[1],))
    spectrum = protected_spectrum(covariance[None], known, energy, whole_below)
    return spectrum.groups[0].vectors[:, : spectrum.rank(energy)]


def projected(covariance: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """The formula as it is written: (I - M M^T) C (I - M M^T)."""
    outside_of = np.eye(len(memory)) - memory @ memory.T
    return outside_of @ covariance @ outside_of


@pytest.mark.parametrize("columns", [0, 5])
def test_explained_is_the_share_of_the_trace_that_projection_takes(columns):
    rng = np.random.default_rng(0)
    covariance, memory = moment(rng, 30), memory_of(rng, 30, columns)
    expected = 1 - np.trace(projected(covariance, memory)) / np.trace(covariance)
    assert explained(covariance, memory) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.999])
def test_a_task_adds_the_fewest_eigenvectors_that_reach_the_threshold(columns, threshold):
    rng = np.random.default_rng(1)
    covariance, memory = moment(rng, 30), memory_of(rng, 30, columns)
    values, vectors = np.linalg.eigh(projected(covariance, memory))
    share = explained(covariance, memory) + np.cumsum(values[::-1]) / np.trace(covariance)
    count = int(np.argmax(share >= threshold)) + 1

    found = extend(memory, covariance, threshold)

    assert found.shape == (30, columns + count)
    np.testing.assert_allclose(found.T @ found, np.eye(columns + count), atol=ROUNDING)
    expected = np.hstack([memory, vectors[:, ::-1][:, :count]])  # spans are compared: signs are free
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-8)
    np.testing.assert_allclose(found[:, :columns], memory, atol=ROUNDING)
    assert explained(covariance, found) >= threshold - ROUNDING


def test_a_task_that_is_explained_already_adds_nothing():
    rng = np.random.default_rng(2)
    memory = memory_of(rng, 20, 6)
    covariance = memory @ moment(rng, 6) @ memory.T
    assert extend(memory, covariance, 0.999).shape == (20, 6)
    assert extend(memory, covariance, 1.0).shape == (20, 6)


@pytest.mark.parametrize("energy", [0.5, 0.98, 1.0])
def test_the_next_tasks_basis_keeps_its_energy_outside_of_the_memory(energy):
    rng = np.random.default_rng(3)
    covariance, memory = moment(rng, 30), memory_of(rng, 30, 7)
    values, vectors = np.linalg.eigh(projected(covariance, memory))
    share = np.cumsum(values[::-1]) / values.sum()
    count = min(int(np.argmax(share >= energy - 1e-12)) + 1, 23)

    basis = null_basis(covariance, memory, energy)

    assert basis.shape == (30, count)
    np.testing.assert_allclose(basis.T @ basis, np.eye(count), atol=ROUNDING)
    np.testing.assert_allclose(basis.T @ memory, 0, atol=ROUNDING)
    if count < 23:  # beyond, eigenvalues are rounding and directions free
        leading = vectors[:, ::-1][:, :count]
        np.testing.assert_allclose(basis @ basis.T, leading @ leading.T, atol=1e-8)


def test_small_modes_may_take_the_whole_null_space():
    rng = np.random.default_rng(4)
    covariance, memory = moment(rng, 30, rank=10), memory_of(rng, 30, 7)
    assert null_basis(covariance, memory, 0.5, whole_below=29).shape[1] < 10
    basis = null_basis(covariance, memory, 0.5, whole_below=30)
    assert basis.shape == (30, 23)
    np.testing.assert_allclose(basis.T @ memory, 0, atol=ROUNDING)


@pytest.mark.parametrize("columns", [6, 20])
def test_nothing_is_left_where_the_memory_has_all_energy_or_all_dimensions(columns):
    rng = np.random.default_rng(5)
    memory = memory_of(rng, 20, columns)
    covariance = memory @ moment(rng, columns) @ memory.T
    noisy = covariance.astype(np.float32)  # what a file of second moments keeps: energy from rounding alone
    assert null_basis(noisy, memory.astype(np.float32), 0.98).shape == (20, 0)


def test_a_layer_without_energy_has_nothing_to_protect_and_nothing_to_train():
    zero, empty = np.zeros((4, 4)), np.zeros((4, 0))
    assert explained(zero, empty) == 1.0
    assert extend(empty, zero, 0.97).shape == null_basis(zero, empty, 0.98).shape == (4, 0)


def test_float32_memory_stays_orthogonal_to_1e_5_over_many_tasks():
    """Every task reads back the float32 columns of the last; errors must not add up."""
    rng = np.random.default_rng(6)
    memory = np.zeros((60, 0), np.float32)
    for task in range(8):
        basis = null_basis(moment(rng, 60), memory, 0.9).astype(np.float32)
        assert np.abs(basis.T @ memory).max(initial=0) < 1e-5
        memory = extend(memory, moment(rng, 60), 0.6 + 0.04 * task).astype(np.float32)
        assert np.abs(memory.T @ memory - np.eye(memory.shape[1])).max() < 1e-5


def test_many_rows_are_decomposed_without_a_dense_eigendecomposition(monkeypatch):
    """The random subspace finds what the exact one finds: the energy to 1e-4, as all paths have to agree."""
    rng = np.random.default_rng(7)
    covariance, memory = moment(rng, 400, rank=300), memory_of(rng, 400, 20)
    exact_basis, exact_memory = null_basis(covariance, memory, 0.98), extend(memory, covariance, 0.97)
    monkeypatch.setattr(subspace, "DENSE_ROWS", 100)
    monkeypatch.setattr(subspace, "FIRST_COLUMNS", 4)  # it has to grow
    basis, extended = null_basis(covariance, memory, 0.98), extend(memory, covariance, 0.97)
    assert basis.shape == exact_basis.shape
    assert extended.shape == exact_memory.shape
    np.testing.assert_allclose(basis.T @ memory, 0, atol=ROUNDING)
    assert explained(covariance, basis) == pytest.approx(explained(covariance, exact_basis), abs=1e-4)
    assert explained(covariance, extended) == pytest.approx(explained(covariance, exact_memory), abs=1e-4)
    as_stored = null_basis(covariance.astype(np.float32), memory, 0.98)
    assert explained(covariance, as_stored) == pytest.approx(explained(covariance, basis), abs=1e-4)


@pytest.mark.parametrize("columns", [30, 80])
def test_the_whole_null_space_of_many_rows(monkeypatch, columns):
    """By the exact method, or where little is left by a random subspace of all of it."""
    monkeypatch.setattr(subspace, "DENSE_ROWS", 10)
    rng = np.random.default_rng(8)
    covariance, memory = np.eye(90), memory_of(rng, 90, columns)
    found = outside(covariance, memory, 90.0 - columns)
    assert found.vectors.shape == (90, 90 - columns)
    np.testing.assert_allclose(found.vectors.T @ memory, 0, atol=ROUNDING)
    assert found.energy == pytest.approx(90 - columns)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_many_rows_take_no_more_memory_than_the_exact_method(monkeypatch, exponent, energy):
    """Spectra that fall by a power law have no few leading directions: 0.98 is most of them."""
    monkeypatch.setattr(subspace, "DENSE_ROWS", 64)
    monkeypatch.setattr(subspace, "FIRST_COLUMNS", 16)
    rng, rows = np.random.default_rng(9), 384
    vectors = memory_of(rng, rows, rows)
    covariance = (vectors * np.arange(1, rows + 1.0) ** -exponent) @ vectors.T
    memory = memory_of(rng, rows, 10)
    wanted = energy * np.trace(projected(covariance, memory))
    tracemalloc.start()
    try:
        found = outside(covariance, memory, wanted)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 5 * 8 * rows**2  # what LAPACK takes besides is not seen here
    few = found.vectors[:, : int(np.argmax(np.cumsum(found.eigenvalues) >= wanted)) + 1]
    assert explained(covariance, few) * np.trace(covariance) >= wanted - ROUNDING
    assert found.vectors.shape[1] in (374, 16, 32, 64, 96)


def test_thresholds_out_of_range():
    with pytest.raises(LanceError) as raised:
        extend(np.zeros((2, 0)), np.eye(2), 1.5)
    assert str(raised.value) == (
        "memory threshold: expected a number above 0 and at most 1, found 1.5; the usual one is 0.97"
    )


def test_moments_that_are_not_finite():
    with pytest.raises(
        NumericalError, match="second moment: expected finite values, found NaN or infinity; check"
    ):
        null_basis(np.full((2, 2), np.nan), np.zeros((2, 0)), 0.98)
