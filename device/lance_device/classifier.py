"""A trained network and what one needs to use it: from a package and a checkpoint, or from a plain ONNX."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.checkpoint import read_checkpoint
from lance_device.graphs import Network, load_network
from lance_device.heads import TaskHead, find_task, task_heads
from lance_device.session import Array, Graph
from lance_edge.bundle import Bundle
from lance_edge.errors import ModelError
from lance_edge.files import expect_signed
from lance_edge.input_spec import (
    CLASSES_KEY,
    PREPROCESSING_KEY,
    ArrayInput,
    InputSpec,
    Preprocessing,
    broken_rules,
)
from lance_edge.manifest import TensorSpec
from lance_edge.names import BATCH_DIM, IMAGES, LOGITS
from lance_edge.records import RecordError, from_json

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Classifier:
    """Prepared images `[N, 3, R, R]` to logits `[N, classes]`."""

    logits: Callable[[Float], Float]
    classes: tuple[str, ...]
    preprocessing: InputSpec


def from_package(bundle: Bundle, checkpoint_path: Path, threads: int, task: str | None = None) -> Classifier:
    """The network of a package with the weights of a checkpoint.

    Args:
        task: name or number of the task whose head answers; by default the one that was trained last.

    Raises:
        CheckpointError: if the checkpoint is damaged or belongs to another package.
        DataError: if there is no such task.
    """
    every = all_heads(bundle, checkpoint_path, threads)
    return every.of_task(every.heads[-1] if task is None else find_task(every.heads, task, str(bundle.path)))


@dataclass(frozen=True)
class AllHeads:
    """One trunk with the heads of all tasks, the last one trained at the end."""

    network: Network
    heads: tuple[TaskHead, ...]
    preprocessing: InputSpec

    def of_task(self, head: TaskHead) -> Classifier:
        """The network with the head of one task."""
        return Classifier(
            lambda images: self._logits(self.network.boundary(images), head), head.classes, self.preprocessing
        )

    def logits(self, images: Float) -> Iterator[tuple[TaskHead, Float]]:
        """Every head's logits `[N, classes]`; the prefix runs once."""
        boundary = self.network.boundary(images)
        for head in self.heads:
            yield head, self._logits(boundary, head)

    def _logits(self, boundary: dict[str, Array], head: TaskHead) -> Float:
        found = self.network.by_head(boundary, head.parameters)
        if found.shape[1] != len(head.classes):
            raise ModelError(
                f"task {head.task}: its head gives {found.shape[1]} logits for {len(head.classes)} classes;"
                " make the package again"
            )
        return found


def all_heads(bundle: Bundle, checkpoint_path: Path, threads: int) -> AllHeads:
    """The network of a package with the weights of a checkpoint and the heads of all its tasks.

    Raises:
        CheckpointError: if the checkpoint is damaged or belongs to another package.
    """
    checkpoint = read_checkpoint(checkpoint_path, bundle)
    manifest = bundle.manifest
    variant = manifest.variant(checkpoint.meta.method, checkpoint.meta.layers)
    network = load_network(bundle, variant, checkpoint.parameters, threads)
    return AllHeads(network, task_heads(bundle, checkpoint), manifest.preprocessing)


def from_onnx(path: Path, threads: int, signed_sha256: str | None = None) -> Classifier:
    """An inference model as `lance-host merge` exports it.

    Args:
        signed_sha256: of the file, by its signature.

    Raises:
        ArtifactError: if it is no ONNX model that loads here.
        ModelError: if it is missing, or does not say its classes and preprocessing.
    """
    try:
        model = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot open the model ({error.strerror}); make one with lance-host merge -o model.onnx"
        ) from None
    expect_signed(path, hashlib.sha256(model).hexdigest(), signed_sha256)
    graph = Graph(model, str(path), threads)
    if IMAGES not in graph.inputs or LOGITS not in graph.outputs:
        raise ModelError(
            f"{path}: expected an input {IMAGES} and an output {LOGITS}, found {', '.join(graph.inputs)} and"
            f" {', '.join(graph.outputs)}; export it with lance-host merge"
        )
    classes, preprocessing = _read_metadata(path, graph.metadata)
    images = TensorSpec(IMAGES, (BATCH_DIM, *preprocessing.sample_shape), "float32")
    graph.expect(images, TensorSpec(LOGITS, (BATCH_DIM, "classes"), "float32"))
    return Classifier(lambda images: graph.run({IMAGES: images})[LOGITS], classes, preprocessing)


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[tuple[str, ...], InputSpec]:
    try:
        classes = from_json(tuple[str, ...], json.loads(metadata[CLASSES_KEY]))
        steps = json.loads(metadata[PREPROCESSING_KEY])
        kind: type[InputSpec] = ArrayInput if isinstance(steps, dict) and "shape" in steps else Preprocessing
        preprocessing = from_json(kind, steps)
        broken = broken_rules(preprocessing)
        if not broken:
            return classes, preprocessing
        reason = f"expected {', '.join(broken)}"
    except KeyError as error:
        reason = f"no {error.args[0]}"
    except (ValueError, RecordError) as error:
        reason = str(error)
    raise ModelError(
        f"{path}: its metadata must hold {CLASSES_KEY} and {PREPROCESSING_KEY} as JSON ({reason});"
        " export it with lance-host merge"
    )
