"""`last.npz` and `best.npz`: weights, momentum, and where the run stands.

Trainable tensors stand under their state-dict names, momentum under `optimizer/<name>`, and `meta` is a
JSON string.  Written atomically; read without unpickling, and nothing in it is trusted unchecked.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_device.graphs import parameter_shapes
from lance_device.options import TrainOptions
from lance_edge.bundle import Bundle
from lance_edge.errors import CheckpointError, LanceError
from lance_edge.files import atomic_writer
from lance_edge.records import RecordError, from_json, to_json

SCHEMA_VERSION = 1
META = "meta"
OPTIMIZER = "optimizer/"
MAX_META_BYTES = 1 << 24
NPY_OVERHEAD_BYTES = 4096  # header of an array inside the npz

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; `validation_*` are `None` where there are no validation images."""

    epoch: int
    step: int
    train_loss: float
    validation_accuracy: float | None
    validation_loss: float | None
    test_accuracy: float | None


@dataclass
class Progress:
    """Where a run stands after its last complete step.

    Attributes:
        step, epoch: complete ones.
        evaluated_step: the step after which the last evaluation was made.
        loss_sum, correct, samples: over the steps since that evaluation.
        seconds: of training, in all parts of the run together.
    """

    step: int = 0
    epoch: int = 0
    evaluated_step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    samples: int = 0
    seconds: float = 0.0
    best: Best | None = None


@dataclass(frozen=True)
class Meta:
    """The `meta` of a checkpoint: whose weights these are, and how they came about.

    Attributes:
        artifact_sha256: identity of the package.
        data_sha256: of the training images' names and labels.
        best_accuracy: on the validation images, of the best evaluation so far.
    """

    schema_version: int
    run_id: str
    artifact_sha256: str
    data_sha256: str
    model: str
    classes: tuple[str, ...]
    method: str
    step: int
    epoch: int
    best_accuracy: float | None
    options: TrainOptions
    progress: Progress


@dataclass
class Checkpoint:
    """Trainable tensors by state-dict name, their momentum (empty before the first step), and `meta`."""

    meta: Meta
    parameters: dict[str, Float]
    velocity: dict[str, Float] = field(default_factory=dict)


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write; a reader finds the old file or the new one.

    Raises:
        StorageError: if it cannot be written.
    """
    momentum = {OPTIMIZER + name: value for name, value in checkpoint.velocity.items()}
    meta = np.array(json.dumps(to_json(checkpoint.meta), ensure_ascii=False))
    arrays: dict[str, Any] = {**checkpoint.parameters, **momentum, META: meta}
    with atomic_writer(path) as file:
        np.savez(file, **arrays)


def read_checkpoint(path: Path, bundle: Bundle) -> Checkpoint:
    """Read, and check against the package that it must belong to.

    Raises:
        CheckpointError: if it is missing, damaged, or of another package.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            meta = _read_meta(path, archive)
            _check_identity(path, meta, bundle.sha256)
            shapes = parameter_shapes(bundle.manifest, bundle.manifest.variant(meta.method))
            return Checkpoint(meta, *_read_tensors(path, archive, shapes))
    except LanceError:
        raise
    except OSError as error:
        if error.strerror:
            raise CheckpointError(
                f"{path}: cannot open the checkpoint ({error.strerror}); give the last.npz or best.npz of a run"
            ) from None
        raise _damaged(path, error) from None
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        raise _damaged(path, error) from None


def _read_meta(path: Path, archive: Any) -> Meta:
    if not hasattr(archive, "zip") or META not in archive.files:
        raise CheckpointError(
            f"{path}: not a checkpoint: expected an npz with {META}; give the last.npz or best.npz of a run"
        )
    _check_size(path, archive.zip, META, MAX_META_BYTES)
    value = json.loads(str(archive[META]))
    version = value.get("schema_version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint schema {version}, this runtime reads {SCHEMA_VERSION};"
            " install a newer lance-edge"
        )
    try:
        return from_json(Meta, value)
    except RecordError as error:
        raise CheckpointError(f"{path}: its {META} is damaged: {error}; use another checkpoint") from None


def _check_identity(path: Path, meta: Meta, artifact_sha256: str) -> None:
    if meta.artifact_sha256 != artifact_sha256:
        raise CheckpointError(
            f"{path}: belongs to another package: expected {artifact_sha256[:12]}, found"
            f" {meta.artifact_sha256[:12]} ({meta.model}, {len(meta.classes)} classes);"
            " give the pkg.tar that this run was trained from"
        )


def _read_tensors(
    path: Path, archive: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Float], dict[str, Float]]:
    """Weights, and momentum (of every weight or of none)."""
    expected = set(shapes)
    momentum = {name.removeprefix(OPTIMIZER) for name in archive.files if name.startswith(OPTIMIZER)}
    found = {name for name in archive.files if name != META and not name.startswith(OPTIMIZER)}
    if found != expected or momentum not in (set(), expected):
        differing = sorted(found ^ expected) or sorted(OPTIMIZER + name for name in momentum ^ expected)
        raise CheckpointError(
            f"{path}: its tensors are not those of the package: {', '.join(differing)}; use another checkpoint"
        )
    parameters = {name: _read_tensor(path, archive, name, shapes[name]) for name in shapes}
    velocity = {
        name: _read_tensor(path, archive, OPTIMIZER + name, shapes[name]) for name in shapes if name in momentum
    }
    return parameters, velocity


def _read_tensor(path: Path, archive: Any, name: str, shape: tuple[int, ...]) -> Float:
    size = 4 * int(np.prod(shape, dtype=np.int64))
    _check_size(path, archive.zip, name, size + NPY_OVERHEAD_BYTES)  # before anything is unpacked
    array = archive[name]
    if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
        raise CheckpointError(
            f"{path}: {name} is {array.dtype} {list(array.shape)}, expected finite float32 {list(shape)};"
            " use another checkpoint"
        )
    return np.array(array, dtype=np.float32, order="C")


def _check_size(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> None:
    size = archive.getinfo(name + ".npy").file_size
    if size > limit:
        raise CheckpointError(
            f"{path}: {name} has {size} bytes, expected at most {limit}; use another checkpoint"
        )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(
        f"{path}: not a readable checkpoint ({reason}); it may be cut off: copy it again, or use another"
    )
