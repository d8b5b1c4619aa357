"""Streamed covariances and spectra against literal unfoldings and singular values."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from lance_host import hosvd
from lance_host.hosvd import ModeCovariances, Spectrum

SHAPES = [(8, 6, 5, 4), (4, 9, 3), (7, 10), (2, 3, 1, 5)]


def activations(shape: tuple[int, ...], number: int, seed: int = 0) -> NDArray[np.float32]:
    """Correlated values with a mean, as after a ReLU: `[number, *shape]`."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((number, *shape))
    values += rng.standard_normal((1, *shape))
    return np.maximum(values, 0).astype(np.float32)


def unfold(activation: NDArray[np.float32], mode: int) -> NDArray[np.float64]:
    """The literal mode unfolding, `[n_mode, rest]`."""
    return np.moveaxis(activation.astype(np.float64), mode, 0).reshape(activation.shape[mode], -1)


def accumulated(batches: NDArray[np.float32]) -> ModeCovariances:
    covariances = ModeCovariances(batches.shape[1:])
    for batch in batches:
        covariances.add(batch)
    return covariances


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slab_values", [1, 17, hosvd.SLAB_VALUES])
def test_mean_is_the_mean_of_literal_covariances(
    shape: tuple[int, ...], slab_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosvd, "SLAB_VALUES", slab_values)
    batches = activations(shape, 3)
    covariances = accumulated(batches)
    assert covariances.count == 3
    for mode in range(len(shape)):
        literal = sum(unfold(a, mode) @ unfold(a, mode).T for a in batches) / 3
        np.testing.assert_allclose(covariances.mean(mode), literal, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectra_are_the_svd_of_all_unfoldings_side_by_side(shape: tuple[int, ...]) -> None:
    batches = activations(shape, 4)
    for mode, spectrum in enumerate(accumulated(batches).spectra()):
        everything = np.concatenate([unfold(a, mode) for a in batches], axis=1)  # [n, 4 * rest]
        left, singular, _ = np.linalg.svd(everything, full_matrices=False)
        np.testing.assert_allclose(spectrum.eigenvalues, singular**2 / 4, rtol=1e-10)
        alignment = np.abs(np.sum(left * spectrum.eigenvectors, axis=0))  # columns, up to the sign
        np.testing.assert_allclose(alignment, 1, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_equals_all_at_once(shape: tuple[int, ...]) -> None:
    batches = activations(shape, 6)
    streamed = accumulated(batches)
    for mode in range(len(shape)):
        everything = np.concatenate([unfold(a, mode) for a in batches], axis=1)
        at_once = everything @ everything.T / 6
        assert np.max(np.abs(streamed.mean(mode) - at_once)) <= 1e-10 * np.max(at_once)


def test_accepts_views_that_are_not_contiguous() -> None:
    batch = activations((8, 6, 5, 4), 1)[0]
    view = np.asfortranarray(batch)
    for ours, theirs in zip(accumulated(view[None]).spectra(), accumulated(batch[None]).spectra(), strict=True):
        np.testing.assert_allclose(ours.eigenvalues, theirs.eigenvalues, rtol=1e-12)


def test_small_values_are_not_lost_beside_large_ones() -> None:
    # 1e4 squared swallows 1e-1 squared in a float32 sum; float64 keeps both.
    large, small = np.full((2, 3), 1e4, np.float32), np.full((2, 3), 1e-1, np.float32)
    covariances = ModeCovariances((2, 3))
    for batch in (large, small):
        covariances.add(batch)
    exact = 3 * (float(large[0, 0]) ** 2 + float(small[0, 0]) ** 2) / 2
    assert covariances.mean(0)[0, 0] == pytest.approx(exact, rel=1e-14)


def test_eigenvalues_descend_and_are_never_negative() -> None:
    batch = np.outer(np.arange(1, 7), np.ones(9)).astype(np.float32)  # rank 1: the rest rounds around 0
    for spectrum in accumulated(batch[None]).spectra():
        assert np.all(np.diff(spectrum.eigenvalues) <= 0)
        assert np.all(spectrum.eigenvalues >= 0)
        assert spectrum.eigenvalues[0] == pytest.approx(float(np.sum(batch.astype(np.float64) ** 2)))


def test_the_largest_entry_of_every_eigenvector_is_positive() -> None:
    for spectrum in accumulated(activations((8, 6, 5, 4), 3)).spectra():
        vectors = spectrum.eigenvectors
        assert all(column[np.argmax(np.abs(column))] > 0 for column in vectors.T)


def test_the_same_batches_give_the_same_bytes() -> None:
    first, second = (accumulated(activations((8, 6, 5, 4), 3)).spectra() for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.eigenvalues.tobytes() == other.eigenvalues.tobytes()
        assert one.projection(3).tobytes() == other.projection(3).tobytes()


def test_projection_is_orthonormal_float32() -> None:
    for spectrum in accumulated(activations((32, 24, 5, 5), 3)).spectra():
        size = len(spectrum.eigenvalues)
        for rank in (0, 1, size // 2, size):
            projection = spectrum.projection(rank)
            assert projection.dtype == np.float32
            assert projection.shape == (size, rank)
            gram = projection.astype(np.float64).T @ projection
            np.testing.assert_allclose(gram, np.eye(rank), atol=1e-5)


def test_a_full_projection_rebuilds_the_activation() -> None:
    batch = activations((8, 6, 5, 4), 1)[0]
    rebuilt = batch
    for mode, spectrum in enumerate(accumulated(batch[None]).spectra()):
        u = spectrum.projection(batch.shape[mode])  # [n, n]
        rebuilt = np.moveaxis(np.tensordot(u @ u.T, rebuilt, (1, mode)), 0, mode)
    np.testing.assert_allclose(rebuilt, batch, atol=1e-4)


def test_a_dead_layer_has_a_zero_spectrum() -> None:
    for spectrum in accumulated(np.zeros((1, 4, 3, 2, 2), np.float32)).spectra():
        assert not spectrum.eigenvalues.any()
        assert np.linalg.norm(spectrum.projection(1)) == pytest.approx(1)


def peak_bytes(number: int) -> int:
    batch = activations((16, 12, 6, 6), 1)[0]
    covariances = ModeCovariances(batch.shape)
    covariances.add(batch)  # the runtime's own first-use allocations
    tracemalloc.start()
    for _ in range(number):
        covariances.add(batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_follow_the_number_of_batches() -> None:
    few, many = peak_bytes(2), peak_bytes(60)
    assert many <= few + 4096  # a few Python objects; one batch alone is 27 kB


def test_memory_of_a_batch_is_bounded_by_the_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = peak_bytes(1)
    monkeypatch.setattr(hosvd, "SLAB_VALUES", 16 * 12 * 6 * 6 // 12)
    assert peak_bytes(1) < whole / 3


@pytest.mark.parametrize("shape", [(4,), (), (4, 0)])
def test_refuses_shapes_without_two_modes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected two or more sizes, all positive, found"):
        ModeCovariances(shape)


def test_refuses_a_short_batch_and_keeps_its_sums() -> None:
    covariances = ModeCovariances((4, 3))
    with pytest.raises(ValueError, match=r"expected an activation of shape \(4, 3\), found \(2, 3\)"):
        covariances.add(np.ones((2, 3), np.float32))
    assert covariances.count == 0


def test_refuses_to_average_nothing() -> None:
    with pytest.raises(ValueError, match="no batch was added; add at least one"):
        ModeCovariances((4, 3)).spectra()


@pytest.mark.parametrize("rank", [-1, 3])
def test_refuses_ranks_outside_the_mode(rank: int) -> None:
    spectrum = Spectrum(np.ones(2), np.eye(2))
    with pytest.raises(ValueError, match=f"expected a rank from 0 to 2, found {rank}"):
        spectrum.projection(rank)
