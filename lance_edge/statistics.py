"""`stats.npz`: the second moments of a task, from which the workstation makes memory and projections.

Of each layer `<layer>/C<mode>` float32: the protected mode `[groups, D, D]`, the others `[n, n]` (see
`moments.py`; a mode that stays whole has none).  The file is sealed (`sealed.py`); `meta` is JSON: the fields
of `Statistics` without the layers.  No image and no activation is in it; but the second moments of a few
images can show what those images show.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import ArtifactError
from lance_edge.files import atomic_writer
from lance_edge.manifest import Mode
from lance_edge.matrices import META, MatrixFile, open_matrices
from lance_edge.records import from_json, to_json
from lance_edge.sealed import write_sealed

SCHEMA_VERSION = 1
WHAT = "statistics"

Matrices = dict[int, NDArray[np.floating]]


@dataclass(frozen=True)
class Statistics:
    """The second moments of one task, by layer and mode.

    Attributes:
        artifact_sha256: identity of the package whose layers these are.
        checkpoint_sha256: digest of the checkpoint file whose weights were in the network.
        memory_sha256: `memory_digest` of what the modes beside the protected one are without, or "".
        classes: of the task.
        images: number of images, `batches * batch_size`.
    """

    task: str
    classes: tuple[str, ...]
    mode: Mode
    artifact_sha256: str
    checkpoint_sha256: str
    memory_sha256: str
    batch_size: int
    batches: int
    layers: dict[str, Matrices]

    @property
    def images(self) -> int:
        """How many images they are of."""
        return self.batches * self.batch_size


@dataclass(frozen=True)
class _Meta:
    schema_version: int
    task: str
    classes: tuple[str, ...]
    mode: Mode
    artifact_sha256: str
    checkpoint_sha256: str
    memory_sha256: str
    batch_size: int
    batches: int
    modes: dict[str, tuple[int, ...]]


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Write `stats.npz`; the same statistics give the same bytes.

    Raises:
        StorageError: if it cannot be written.
    """
    fields = {name: value for name, value in vars(statistics).items() if name != "layers"}
    modes = {name: tuple(matrices) for name, matrices in statistics.layers.items()}
    meta = _Meta(schema_version=SCHEMA_VERSION, modes=modes, **fields)
    arrays: dict[str, NDArray[Any]] = {META: np.array(json.dumps(to_json(meta), ensure_ascii=False))}
    for name, matrices in statistics.layers.items():
        arrays |= {_array(name, mode): matrix.astype(np.float32) for mode, matrix in matrices.items()}
    with atomic_writer(path) as file:
        write_sealed(file, arrays)


def read_statistics(path: Path) -> Statistics:
    """Read `stats.npz`, checked before it is believed.

    Raises:
        ArtifactError: if it is missing, damaged, newer, or no statistics.
    """
    with open_matrices(path, WHAT, SCHEMA_VERSION) as file:
        meta = from_json(_Meta, file.meta())
        layers = {
            name: {mode: _symmetric(file, _array(name, mode)) for mode in modes}
            for name, modes in meta.modes.items()
        }
        file.expect_no_more([_array(name, mode) for name, modes in meta.modes.items() for mode in modes])
    fields = {key: value for key, value in vars(meta).items() if key not in ("schema_version", "modes")}
    return Statistics(layers=layers, **fields)


def _array(layer: str, mode: int) -> str:
    return f"{layer}/C{mode}"


def _symmetric(file: MatrixFile, name: str) -> NDArray[np.floating]:
    """Symmetric matrices `[n, n]` or `[groups, n, n]` without a negative diagonal."""
    matrix = file.array(name, np.float32, (2, 3))
    diagonal = np.diagonal(matrix, axis1=-2, axis2=-1) if matrix.shape[-1] == matrix.shape[-2] else -np.ones(1)
    if diagonal.min(initial=0.0) < 0 or not np.array_equal(matrix, np.swapaxes(matrix, -1, -2)):
        raise ArtifactError(
            f"{file.path}: {name}: expected a symmetric second moment, found something else; collect it again"
        )
    return matrix
