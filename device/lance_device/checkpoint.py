"""`last.npz`, `previous.npz` and `best.npz`: weights, momentum, and where the run stands.

Trainable tensors stand under their state-dict names, momentum under `optimizer/<name>`, the subspaces of a
codec under `codec/<layer>/U<mode>`, `meta` is a JSON string and `sha256` the digest of all that.  Written
atomically; read without unpickling, and nothing in it is trusted unchecked.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_device.codecs import make_codec
from lance_device.options import TrainOptions, check_options
from lance_device.schedule import Plateau
from lance_edge.bundle import Bundle
from lance_edge.checkpoints import (
    CODEC,
    META,
    OPTIMIZER,
    open_archive,
    trained_shapes,
    trained_variant,
)
from lance_edge.errors import CheckpointError
from lance_edge.files import atomic_writer
from lance_edge.manifest import Variant
from lance_edge.records import RecordError, from_json, to_json
from lance_edge.sealed import write_sealed

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


@dataclass(frozen=True)
class FileMark:
    """The first `size` bytes of a file that grows, and their SHA-256."""

    size: int
    sha256: str


@dataclass
class Progress:
    """Where a run stands after its last complete step.

    Attributes:
        step, epoch: complete ones.
        evaluated_step: the step after which the last evaluation was made.
        loss_sum, correct, samples: over the steps since that evaluation.
        seconds: of training, in all parts of the run together.
        skipped, skipped_in_a_row: steps that were not applied because something was no number.
        rate_factor: what their number has left of the learning rate.
        plateau: where schedule `plateau` stands.
        rows: what the CSV files held, by their names; all of it was durable before this state was written.
    """

    step: int = 0
    epoch: int = 0
    evaluated_step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    samples: int = 0
    seconds: float = 0.0
    best: Best | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    rate_factor: float = 1.0
    plateau: Plateau = field(default_factory=Plateau)
    rows: dict[str, FileMark] = field(default_factory=dict)


@dataclass(frozen=True)
class Meta:
    """The `meta` of a checkpoint: whose weights these are, and how they came about.

    Attributes:
        artifact_sha256: identity of the package.
        data_sha256: of the training images' names and labels.
        layers: number of trained layers; with `method`, which variant of the package this is.
        best_accuracy: on the validation images, of the best evaluation so far.
    """

    schema_version: int
    run_id: str
    artifact_sha256: str
    data_sha256: str
    model: str
    classes: tuple[str, ...]
    method: str
    layers: int
    step: int
    epoch: int
    best_accuracy: float | None
    options: TrainOptions
    progress: Progress


@dataclass
class Checkpoint:
    """Trainable tensors by state-dict name, their momentum (empty before the first step), and `meta`.

    `codec_state` is what a compressing method remembers of earlier steps; empty for most methods.
    """

    meta: Meta
    parameters: dict[str, Float]
    velocity: dict[str, Float] = field(default_factory=dict)
    codec_state: dict[str, Float] = field(default_factory=dict)


def write_checkpoint(path: Path, checkpoint: Checkpoint, previous: Path | None = None) -> None:
    """Write; a reader finds the old file or the new one.

    Args:
        previous: where the old file is kept; it is never gone before the new one is durable.

    Raises:
        StorageError: if it cannot be written.
    """
    momentum = {OPTIMIZER + name: value for name, value in checkpoint.velocity.items()}
    meta = np.array(json.dumps(to_json(checkpoint.meta), ensure_ascii=False))
    codec = {CODEC + name: value for name, value in checkpoint.codec_state.items()}
    arrays: dict[str, Any] = {**checkpoint.parameters, **momentum, **codec, META: meta}
    with atomic_writer(path, previous) as file:
        write_sealed(file, arrays)


def read_checkpoint(path: Path, bundle: Bundle) -> Checkpoint:
    """Read, and check against the package that it must belong to.

    Raises:
        DamagedCheckpointError: if its content is not what was written.
        CheckpointError: if it is missing, or of another package.
    """
    with open_archive(path) as archive:
        value = archive.meta(bundle)
        meta = _decode_meta(path, value)
        variant = trained_variant(path, value, bundle)
        shapes = trained_shapes(bundle, variant)
        velocity = archive.group(OPTIMIZER, shapes, optional=True)  # none before the first step
        codec = archive.group(CODEC, _codec_shapes(bundle, variant))
        return Checkpoint(meta, archive.weights(shapes), velocity, codec)


def read_meta(path: Path, bundle: Bundle) -> Meta:
    """The meta data alone of a checkpoint whose content is what was written; raises like `read_checkpoint`."""
    with open_archive(path) as archive:
        return _decode_meta(path, archive.meta(bundle))


def _codec_shapes(bundle: Bundle, variant: Variant) -> dict[str, tuple[int, ...]]:
    """Of what the variant's codec remembers: the shapes of its first state."""
    if variant.schedule != "by layer":
        return {}
    return {name: value.shape for name, value in make_codec(bundle.manifest, variant).state().items()}


def _decode_meta(path: Path, value: dict[str, Any]) -> Meta:
    try:
        meta = from_json(Meta, value)
        check_options(meta.options)
    except (RecordError, ValueError) as error:
        raise CheckpointError(f"{path}: its {META} is damaged: {error}; use another checkpoint") from None
    return meta
