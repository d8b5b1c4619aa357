"""`memory.npz`: extended group by group, read back as it was, and nothing damaged is believed."""

import dataclasses
import io

import numpy as np
import pytest

from lance_edge.errors import ArtifactError, LanceError
from lance_edge.memory import (
    LayerMemory,
    Memory,
    drift,
    empty_memory,
    explained_share,
    extend_memory,
    memory_digest,
    published_threshold,
    read_memory,
    write_memory,
)
from lance_edge.sealed import write_sealed
from lance_edge.subspace import explained, extend


def covariances(seed: int) -> dict[str, np.ndarray]:
    """A layer of one group and one of four, whose energies fall at different rates."""
    rng = np.random.default_rng(seed)

    def one(rows: int, decay: float) -> np.ndarray:
        factor = rng.standard_normal((rows, rows)) * decay ** np.arange(rows)
        return factor @ factor.T

    return {"conv": one(12, 0.7)[None], "depthwise": np.stack([one(9, 0.3 + 0.15 * g) for g in range(4)])}


@pytest.fixture
def memory() -> Memory:
    first = extend_memory(empty_memory("patch", "net"), "one", covariances(0).items(), 0.9)
    return extend_memory(first, "two", covariances(1).items(), 0.93)


def test_the_published_threshold_grows_with_the_tasks_up_to_its_cap():
    assert [published_threshold(tasks) for tasks in (0, 1, 9)] == pytest.approx([0.97, 0.973, 0.997])
    assert published_threshold(10) == published_threshold(50) == 0.999


def test_bytes_are_those_of_the_columns_in_use(memory):
    columns = [layer.basis(group) for layer in memory.layers.values() for group in range(layer.groups)]
    assert memory.column_bytes == sum(basis.astype(np.float32).nbytes for basis in columns)
    assert memory.column_bytes < sum(layer.bases.nbytes for layer in memory.layers.values())  # padded
    assert empty_memory("patch", "net").column_bytes == 0


def test_every_group_has_a_basis_of_its_own(memory):
    layer, covariance = memory.layers["depthwise"], covariances(0)["depthwise"]
    assert len(set(layer.ranks)) > 1
    for group in range(4):
        first = extend(np.zeros((9, 0)), covariance[group], 0.9)
        both = extend(first.astype(np.float32), covariances(1)["depthwise"][group], 0.93)
        np.testing.assert_allclose(layer.basis(group), both, atol=1e-6)  # float32
        assert not layer.bases[group, :, layer.ranks[group] :].any()


def test_the_tasks_remember_ranks_and_energies(memory):
    one, two = memory.tasks
    assert (one.name, one.threshold, two.name, two.threshold) == ("one", 0.9, "two", 0.93)
    assert two.ranks == {name: layer.ranks for name, layer in memory.layers.items()}
    assert all(a <= b for name in one.ranks for a, b in zip(one.ranks[name], two.ranks[name], strict=True))
    for name, share in two.explained.items():
        layer, covariance = memory.layers[name], covariances(1)[name]
        parts = [
            explained(covariance[g], layer.basis(g)) * np.trace(covariance[g]) for g in range(layer.groups)
        ]
        assert share == pytest.approx(sum(parts) / np.trace(covariance, axis1=1, axis2=2).sum())
        assert share >= 0.93 - 1e-6
    assert 0 < memory.layers["conv"].used == two.ranks["conv"][0] / 12


def test_a_layer_without_energy_is_explained():
    zero = np.zeros((1, 3, 3))
    memory = extend_memory(empty_memory("patch", "net"), "dark", {"conv": zero}.items(), 0.97)
    assert memory.layers["conv"].ranks == (0,)
    assert explained_share(memory.layers["conv"], zero) == 1.0


def test_the_drift_of_a_weight_is_the_share_of_its_change_inside(memory):
    layer = memory.layers["depthwise"]
    rng = np.random.default_rng(2)
    change = rng.standard_normal((8, 1, 3, 3))  # two filters a group
    literal = [change[o].reshape(9) @ layer.basis(o // 2) for o in range(8)]
    expected = np.sqrt(sum((row**2).sum() for row in literal)) / np.linalg.norm(change)
    assert drift(change, layer) == pytest.approx(expected)
    assert drift(np.zeros_like(change), layer) == 0.0
    rows = change.reshape(4, 2, 9)
    away = rows - rows @ layer.bases @ layer.bases.transpose(0, 2, 1)
    assert drift(away.reshape(change.shape), layer) < 1e-6


def test_it_is_read_back_as_it_was(tmp_path, memory):
    write_memory(tmp_path / "memory.npz", memory)
    found = read_memory(tmp_path / "memory.npz")
    assert dataclasses.replace(found, layers={}) == dataclasses.replace(memory, layers={})
    for name, layer in memory.layers.items():
        np.testing.assert_array_equal(found.layers[name].bases, layer.bases)
        assert found.layers[name].ranks == layer.ranks
    assert memory_digest(found) == memory_digest(memory)
    write_memory(tmp_path / "again.npz", found)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "memory.npz").read_bytes()


def test_an_empty_memory_is_one_too(tmp_path):
    write_memory(tmp_path / "memory.npz", empty_memory("channel", "net"))
    assert read_memory(tmp_path / "memory.npz") == empty_memory("channel", "net")


def test_other_memories_have_other_digests(memory):
    turned = {name: LayerMemory(-layer.bases, layer.ranks) for name, layer in memory.layers.items()}
    others = [dataclasses.replace(memory, layers=turned), dataclasses.replace(memory, mode="channel")]
    assert len({memory_digest(one) for one in (memory, *others)}) == 3


def test_what_cannot_be_extended(memory):
    with pytest.raises(
        LanceError, match="memory: task two is in it already; give the task another name with --task"
    ):
        extend_memory(memory, "two", covariances(1).items(), 0.9)
    with pytest.raises(LanceError) as raised:
        extend_memory(memory, "three", {"conv": np.eye(5)[None]}.items(), 0.9)
    assert str(raised.value) == (
        "second moment: expected the shape [1, 12, 12] of the memory, found [1, 5, 5]; give statistics of the"
        " same layers and mode"
    )


def refusal(path) -> str:
    with pytest.raises(ArtifactError) as raised:
        read_memory(path)
    return str(raised.value)


def test_damaged_files_are_refused(tmp_path, memory):
    path = tmp_path / "memory.npz"
    assert "cannot open the memory (No such file or directory); check the path" in refusal(path)
    write_memory(path, memory)
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    assert "not a readable memory (" in refusal(path)
    at = good.index(memory.layers["conv"].bases.tobytes()) + 5
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert "not a readable memory (" in refusal(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "expected an npz with meta" in refusal(tmp_path / "array.npy")


def altered(path, memory, **changes):
    """A sealed file of the memory with other arrays; `None` leaves one out."""
    write_memory(path, memory)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"}
    arrays |= {name.replace("__", "/"): value for name, value in changes.items()}
    buffer = io.BytesIO()
    write_sealed(buffer, {name: value for name, value in arrays.items() if value is not None})
    path.write_bytes(buffer.getvalue())
    return refusal(path)


def test_files_that_are_no_memory_are_refused(tmp_path, memory):
    path, conv = tmp_path / "memory.npz", memory.layers["conv"]
    assert "conv/M: expected finite float32 of 3 dimensions, found nothing; make the memory again" in altered(
        path, memory, conv__M=None
    )
    assert "conv/M: expected finite float32 of 3 dimensions, found float64 [" in altered(
        path, memory, conv__M=conv.bases.astype(np.float64)
    )
    assert "group 0: expected orthonormal columns, then zeros, found an error of 3e+00; make" in altered(
        path, memory, conv__M=2 * conv.bases
    )
    assert "and its meta says" in altered(path, memory, conv__ranks=np.array([1], np.int64))
    assert "found the unknown array other; make the memory again" in altered(path, memory, other=np.zeros(2))
    assert (
        "memory schema 7, this version reads 1; install a newer lance-edge, or make the file again"
        in altered(path, memory, meta=np.array('{"schema_version": 7}'))
    )
    assert "missing fields" in altered(path, memory, meta=np.array('{"schema_version": 1}'))
    big = np.array(" " * (1 << 23))  # 4 bytes a character
    assert "its meta is larger than 16777216 bytes" in altered(path, memory, meta=big)
