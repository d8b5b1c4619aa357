"""What earlier tasks need of the trainable layers: `memory.npz`, and how a finished task extends it.

Of each protected layer the file has `<layer>/M` float32 `[groups, D, m]`, orthonormal columns in every group,
and `<layer>/ranks` int64 `[groups]`: how many columns a group uses, the rest is zero.  D is what one filter
reads: C/groups k_h k_w in patch mode, C in channel mode, F of a linear layer.  The file is sealed
(`sealed.py`); `meta` is JSON: the fields of `Memory` without the layers.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_edge import subspace
from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError, LanceError
from lance_edge.files import atomic_writer
from lance_edge.manifest import Mode
from lance_edge.matrices import MatrixFile, open_matrices, open_member
from lance_edge.names import MEMORY_MEMBER
from lance_edge.records import from_json, to_json
from lance_edge.sealed import write_sealed
from lance_edge.subspace import check_threshold

SCHEMA_VERSION = 1
META = "meta"
WHAT = "memory"
FIRST_THRESHOLD, THRESHOLD_STEP, LAST_THRESHOLD = 0.97, 0.003, 0.999  # after the first task, and each further

Float = NDArray[np.float32]


@dataclass(frozen=True)
class LayerMemory:
    """The protected subspace of a layer: `bases` `[groups, D, m]`, of which group g uses `ranks[g]` columns."""

    bases: Float
    ranks: tuple[int, ...]

    @property
    def groups(self) -> int:
        """Number of groups of the layer's convolution, 1 of most layers."""
        return len(self.ranks)

    @property
    def dimension(self) -> int:
        """D: values of the input that one filter reads."""
        return int(self.bases.shape[1])

    @property
    def used(self) -> float:
        """The share of all dimensions that is protected."""
        return sum(self.ranks) / (self.groups * self.dimension)

    def basis(self, group: int) -> Float:
        """M of a group, `[D, m_g]`, without padding."""
        basis: Float = self.bases[group, :, : self.ranks[group]]
        return basis


@dataclass(frozen=True)
class LearnedTask:
    """What one task did to the memory.

    `ranks` has, for each layer, the columns of every group after it; `explained` the share of this task's
    energy that is inside then.  `checkpoint_sha256` is the digest of the file that had the weights, or "".
    """

    name: str
    threshold: float
    ranks: dict[str, tuple[int, ...]]
    explained: dict[str, float]
    checkpoint_sha256: str = ""


@dataclass(frozen=True)
class Memory:
    """The protected subspaces of a network after some tasks."""

    mode: Mode
    model: str
    tasks: tuple[LearnedTask, ...]
    layers: dict[str, LayerMemory]

    @property
    def column_bytes(self) -> int:
        """Of the columns that are used; in the file, groups of fewer columns are padded with zeros."""
        return sum(4 * layer.dimension * rank for layer in self.layers.values() for rank in layer.ranks)


@dataclass(frozen=True)
class _Meta:
    schema_version: int
    mode: Mode
    model: str
    tasks: tuple[LearnedTask, ...]


def empty_layer(groups: int, dimension: int) -> LayerMemory:
    """The memory of a layer before the first task."""
    return LayerMemory(np.zeros((groups, dimension, 0), np.float32), (0,) * groups)


def empty_memory(mode: Mode, model: str) -> Memory:
    """Before the first task."""
    return Memory(mode, model, (), {})


def published_threshold(tasks: int) -> float:
    """ε_cl after so many earlier tasks, of the published protocol (arXiv 2509.21617, after GPM)."""
    return min(FIRST_THRESHOLD + THRESHOLD_STEP * tasks, LAST_THRESHOLD)


def extend_layer(layer: LayerMemory, covariance: NDArray[np.floating], threshold: float) -> LayerMemory:
    """A layer's memory with a finished task, each group by its own energy.

    Args:
        covariance: `[groups, D, D]`, second moment of the task's input.

    Raises:
        LanceError: if the shapes do not fit or the threshold is out of range.
    """
    expected = (layer.groups, layer.dimension, layer.dimension)
    if covariance.shape != expected:
        raise LanceError(
            f"second moment: expected the shape {list(expected)} of the memory, found {list(covariance.shape)};"
            " give statistics of the same layers and mode"
        )
    return pack([subspace.extend(layer.basis(g), covariance[g], threshold) for g in range(layer.groups)])


def explained_share(layer: LayerMemory, covariance: NDArray[np.floating]) -> float:
    """The share of a task's energy `[groups, D, D]` inside the memory, all groups together."""
    totals = np.array([np.trace(c, dtype=np.float64) for c in covariance])
    shares = np.array([subspace.explained(c, layer.basis(g)) for g, c in enumerate(covariance)])
    return float(totals @ shares / totals.sum()) if totals.sum() > 0 else 1.0


def extend_memory(
    memory: Memory,
    name: str,
    covariances: Iterable[tuple[str, NDArray[np.floating]]],
    threshold: float,
    checkpoint_sha256: str = "",
) -> Memory:
    """The memory after a task.

    Args:
        name: of the task.
        covariances: name and `[groups, D, D]` of every trained layer, one after the other: none is kept.  A
            layer that the memory does not know starts empty.
        threshold: ε_cl.
        checkpoint_sha256: digest of the checkpoint file of the task.

    Raises:
        LanceError: if the task is there already, or shapes and threshold do not fit.
    """
    if name in [task.name for task in memory.tasks]:
        raise LanceError(f"memory: task {name} is in it already; give the task another name with --task-name")
    check_threshold(threshold)
    layers, shares = dict(memory.layers), dict[str, float]()
    for layer, covariance in covariances:
        before = layers.get(layer) or empty_layer(len(covariance), covariance.shape[-1])
        layers[layer] = extend_layer(before, covariance, threshold)
        shares[layer] = explained_share(layers[layer], covariance)
        del covariance  # before the next one is made
    ranks = {layer: one.ranks for layer, one in layers.items()}
    learned = LearnedTask(name, threshold, ranks, shares, checkpoint_sha256)
    return Memory(memory.mode, memory.model, (*memory.tasks, learned), layers)


def pack(bases: list[NDArray[np.float64]]) -> LayerMemory:
    """Bases `[D, m_g]` of every group as one array, padded with columns of zeros."""
    ranks = tuple(basis.shape[1] for basis in bases)
    packed = np.zeros((len(bases), len(bases[0]), max(ranks)), np.float32)
    for group, basis in enumerate(bases):
        packed[group, :, : ranks[group]] = basis
    return LayerMemory(packed, ranks)


def drift(change: NDArray[np.floating], layer: LayerMemory) -> float:
    """`||dW M|| / ||dW||` of a change of a layer's weight; 0 if there is none.

    Args:
        change: `[O, C / groups, k_h, k_w]` or `[O, F]`; its filters are divided evenly over the groups.
    """
    rows = _rows(change, layer).astype(np.float64)
    norm = float(np.linalg.norm(rows))
    return float(np.linalg.norm(rows @ layer.bases)) / norm if norm else 0.0


def _rows(change: NDArray[Any], layer: LayerMemory) -> NDArray[Any]:
    """What meets the columns of M: `[groups, O / groups, D]`, in channel mode `[1, O k_h k_w, C]`."""
    if _is_by_channel(change, layer):
        return np.moveaxis(change, 1, -1).reshape(1, -1, layer.dimension)
    return change.reshape(layer.groups, -1, layer.dimension)


def _is_by_channel(change: NDArray[np.floating], layer: LayerMemory) -> bool:
    return layer.dimension != int(np.prod(change.shape[1:]))


# --- the file -----------------------------------------------------------------------------------------


def write_memory(path: Path, memory: Memory) -> None:
    """Write `memory.npz`; the same memory gives the same bytes.

    Raises:
        StorageError: if it cannot be written.
    """
    with atomic_writer(path) as file:
        file.write(memory_bytes(memory))


def memory_bytes(memory: Memory) -> bytes:
    """The content of `memory.npz`, of the file and of the member of a package alike."""
    arrays: dict[str, NDArray[Any]] = {META: _encode(memory)}
    for name, layer in memory.layers.items():
        arrays |= {f"{name}/M": layer.bases, f"{name}/ranks": np.array(layer.ranks, np.int64)}
    file = io.BytesIO()
    write_sealed(file, arrays)
    return file.getvalue()


def _encode(memory: Memory) -> NDArray[Any]:
    meta = _Meta(SCHEMA_VERSION, memory.mode, memory.model, memory.tasks)
    return np.array(json.dumps(to_json(meta), ensure_ascii=False))


def memory_digest(memory: Memory) -> str:
    """Identifies a memory: SHA-256 over its meta data and bases."""
    digest = hashlib.sha256(str(_encode(memory)).encode())
    for name, layer in memory.layers.items():
        digest.update(f"{name}{layer.bases.shape}{layer.ranks}".encode())
        digest.update(np.ascontiguousarray(layer.bases, np.float32).tobytes())
    return digest.hexdigest()


def read_memory(path: Path) -> Memory:
    """Read `memory.npz`, checked before it is believed.

    Raises:
        ArtifactError: if it is missing, damaged, newer, or no memory.
    """
    with open_matrices(path, WHAT, SCHEMA_VERSION) as file:
        return _read(file)


def packed_memory(bundle: Bundle) -> Memory | None:
    """The memory that a package holds, checked in the same way; `None` before the first task is finished.

    Raises:
        ArtifactError: if it is damaged, newer, or no memory.
    """
    if MEMORY_MEMBER not in {member.name for member in bundle.manifest.members}:
        return None
    data = bundle.read(MEMORY_MEMBER)
    with open_member(data, bundle.path / MEMORY_MEMBER, WHAT, SCHEMA_VERSION) as file:
        return _read(file)


def _read(file: MatrixFile) -> Memory:
    meta = from_json(_Meta, file.meta())
    names = meta.tasks[-1].ranks if meta.tasks else {}
    layers = {name: _read_layer(file, name, ranks) for name, ranks in names.items()}
    file.expect_no_more([f"{name}/{array}" for name in names for array in ("M", "ranks")])
    return Memory(meta.mode, meta.model, meta.tasks, layers)


def _read_layer(file: MatrixFile, name: str, ranks: tuple[int, ...]) -> LayerMemory:
    bases, stored = file.array(f"{name}/M", np.float32, (3,)), file.array(f"{name}/ranks", np.int64, (1,))
    if tuple(stored.tolist()) != ranks or bases.shape[::2] != (len(ranks), max(ranks, default=0)):
        raise ArtifactError(
            f"{file.path}: {name}/M is {list(bases.shape)} of ranks {stored.tolist()[:8]}, and its meta says"
            f" {list(ranks)[:8]}; make the memory again"
        )
    layer = LayerMemory(bases, ranks)
    for group in range(layer.groups):
        basis = layer.basis(group).astype(np.float64)
        error = np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(initial=0.0)
        if error > 1e-5 or bases[group, :, ranks[group] :].any():
            raise ArtifactError(
                f"{file.path}: {name}/M, group {group}: expected orthonormal columns, then zeros, found an"
                f" error of {error:.0e}; make the memory again"
            )
    return layer
