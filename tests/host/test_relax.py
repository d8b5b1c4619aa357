"""What `--relax` releases of a memory, against what its description promises."""

import numpy as np
import pytest

from lance_edge.memory import LayerMemory
from lance_host.continual_benchmark.protected import unit_trace
from lance_host.continual_benchmark.relax import generalised_eigenvectors, release, release_basis

ROWS = 12


def basis(columns: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((ROWS, columns)))[0]


def moment(energies: list[float], vectors: np.ndarray) -> np.ndarray:
    """Of trace 1, with these energies along the columns."""
    found = vectors[:, : len(energies)] * np.array(energies) @ vectors[:, : len(energies)].T
    return found / np.trace(found)


def inside(vector: np.ndarray, memory: np.ndarray) -> float:
    """Share of a unit vector within a memory."""
    return float(np.linalg.norm(memory.T @ vector))


def test_the_direction_that_the_new_task_needs_and_the_old_ones_do_not_is_released() -> None:
    """Old energies 90, 8, 2; the new task lives along the third: it goes, and nothing else does."""
    vectors = basis(4)
    old = moment([90, 8, 2], vectors)
    new = moment([1], vectors[:, 2:])
    left = release_basis(vectors[:, :3], old, new, share=0.05)
    assert left.shape == (ROWS, 2)
    assert inside(vectors[:, 2], left) < 1e-6
    assert inside(vectors[:, 0], left) == pytest.approx(1)
    assert inside(vectors[:, 1], left) == pytest.approx(1)


def test_what_holds_more_energy_than_the_share_stays() -> None:
    vectors = basis(4)
    old, new = moment([90, 8, 2], vectors), moment([1], vectors[:, 2:])
    assert release_basis(vectors[:, :3], old, new, share=0.019).shape == (ROWS, 3)


def test_unrelated_tasks_release_nothing() -> None:
    """All that the new task has lies outside of the memory, or where the old ones have more."""
    vectors = basis(6)
    old = moment([50, 30, 20], vectors)
    for new in (moment([1, 1], vectors[:, 3:]), moment([1, 1, 1, 97], vectors)):
        np.testing.assert_allclose(release_basis(vectors[:, :3], old, new, share=0.5), vectors[:, :3])


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_the_energy_that_is_released_is_bounded(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    old, new = (moment(list(rng.exponential(size=ROWS) ** 3), basis(ROWS, seed + k)) for k in (100, 200))
    memory = basis(7, seed)
    left = release_basis(memory, old, new, share)
    np.testing.assert_allclose(left.T @ left, np.eye(left.shape[1]), atol=1e-12)
    np.testing.assert_allclose(memory @ (memory.T @ left), left, atol=1e-12)  # within M
    lost = np.trace(memory.T @ old @ memory) - np.trace(left.T @ old @ left)
    assert -1e-12 < lost <= share + 1e-12


def test_the_eigenvectors_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(3)
    one, other = (factor @ factor.T for factor in rng.standard_normal((2, 6, 6)))
    overlap, vectors = generalised_eigenvectors(one, other)
    # The floor of 1e-9 of the mean energy is all that differs.
    np.testing.assert_allclose(one @ vectors, other @ vectors * overlap, rtol=1e-4, atol=1e-5)
    assert list(overlap) == sorted(overlap, reverse=True)


def test_groups_are_relaxed_one_by_one() -> None:
    vectors = basis(3)
    layer = LayerMemory(np.stack([vectors[:, :2], vectors[:, :2]]).astype(np.float32), (2, 2))
    old = np.stack([moment([98, 2], vectors)] * 2)
    new = np.stack([moment([1], vectors[:, 1:]), moment([1], vectors[:, 2:])])
    assert release(layer, old, new, 0.05).ranks == (1, 2)


def test_every_task_counts_alike() -> None:
    moments = np.stack([np.diag([1.0, 3.0]), np.diag([2.0, 2.0])])
    assert float(np.trace(unit_trace(moments), axis1=1, axis2=2).sum()) == pytest.approx(1)
    np.testing.assert_array_equal(unit_trace(np.zeros((1, 2, 2))), np.zeros((1, 2, 2)))
