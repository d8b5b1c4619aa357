"""What was learned before: a finished run's package and checkpoint, as the next task starts from them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import read_weights
from lance_edge.errors import ArtifactError, CheckpointError, LanceError, ModelError
from lance_edge.manifest import Layer, Manifest, Task, TensorSpec
from lance_edge.memory import Memory, packed_memory
from lance_edge.names import (
    FALLBACK_TASK,
    INPUTS_ROLE,
    WEIGHTS_MEMBER,
    activation_name,
    head_name,
    is_task_name,
    task_name_after,
)
from lance_host.compile import serialise
from lance_host.layers import exactly
from lance_host.merge import joined_graph, merged_state
from lance_host.model_source import ProvidedWeights
from lance_host.stages import bind

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Past:
    """The network after a finished task.

    Attributes:
        manifest: of the package that the task was trained from.
        artifact_sha256: identity of that package.
        checkpoint_sha256: digest of the checkpoint file.
        state: the network's state dict, with what the run trained.
        tasks: all that were learned, the finished one last.
        heads: the arrays of their heads, by their names in `weights.npz`.
        layers: that the finished run trained.
        taps: a graph from images to the inputs of these layers, weights constant.
        memory: that the finished task was trained beside; `None` if its package holds none.
    """

    manifest: Manifest
    artifact_sha256: str
    checkpoint_sha256: str
    state: Mapping[str, Array]
    tasks: tuple[Task, ...]
    heads: dict[str, Array]
    layers: tuple[Layer, ...]
    taps: bytes
    memory: Memory | None = None

    @property
    def task(self) -> str:
        """The finished task's name."""
        return self.tasks[-1].name

    @property
    def layer_names(self) -> str:
        """The layers of the finished run as `--layers` takes them."""
        return exactly(layer.name for layer in self.layers)

    @property
    def head(self) -> str:
        """Module name of the head."""
        return self.manifest.head[0].rpartition(".")[0]

    @property
    def weights(self) -> ProvidedWeights:
        """The network's weights as PyTorch takes them."""
        state = {name: torch.from_numpy(np.array(value)) for name, value in self.state.items()}
        return ProvidedWeights(state, f"after {self.task}: checkpoint {self.checkpoint_sha256[:16]}")


def tap_names(layers: tuple[Layer, ...]) -> dict[str, str]:
    """Layer name -> the output of `Past.taps` that is its input."""
    return {layer.name: activation_name(layer.name) for layer in layers}


def read_past(artifact: Path | None, checkpoint: Path) -> Past:
    """Package and checkpoint of a finished run.

    Args:
        artifact: the package; by default the one that the run's `run.json` names.

    Raises:
        LanceError: if they do not belong together, or another task cannot follow them.
    """
    path = artifact or find_artifact(checkpoint)
    with Bundle(path) as bundle:
        manifest, trained = bundle.manifest, read_weights(checkpoint, bundle)
        if not manifest.head:
            raise ModelError(
                f"{path}: trains no head, so no other task can follow; calibrate it again without --head none"
            )
        if trained.variant.layers and INPUTS_ROLE not in trained.variant.graphs:
            raise ArtifactError(
                f"{path}: has no graph to the inputs of its layers; calibrate and train the first task again"
                " with this version of lance-edge"
            )
        state = merged_state(bundle, trained.weights)
        task = Task(
            manifest.task or f"{FALLBACK_TASK}-{len(manifest.tasks) + 1}",
            manifest.classes,
            tuple(TensorSpec(name, state[name].shape, "float32") for name in manifest.head),
        )
        stored = bundle.arrays(WEIGHTS_MEMBER)
        heads = {
            head_name(one.name, spec.name): stored[head_name(one.name, spec.name)]
            for one in manifest.tasks
            for spec in one.head
        }
        heads |= {head_name(task.name, name): state[name] for name in manifest.head}
        names = {plan.layer for plan in trained.variant.layers}
        return Past(
            manifest=manifest,
            artifact_sha256=bundle.sha256,
            checkpoint_sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            state=state,
            tasks=(*manifest.tasks, task),
            heads=heads,
            layers=tuple(layer for layer in manifest.layers if layer.name in names),
            taps=_taps(bundle, trained.variant.graphs, trained.weights) if names else b"",
            memory=packed_memory(bundle),
        )


def _taps(bundle: Bundle, graphs: Mapping[str, tuple[str, ...]], weights: Mapping[str, Array]) -> bytes:
    model = ir.serde.deserialize_model(joined_graph(bundle, graphs, INPUTS_ROLE))
    bind(model, weights)
    return serialise(model, "calibration")


def package_before(artifact: Path | None, checkpoint: Path) -> Manifest:
    """The plan of the package that a finished run was trained from.

    Raises:
        LanceError: if there is none, or it is damaged.
    """
    with Bundle(artifact or find_artifact(checkpoint)) as bundle:
        return bundle.manifest


def find_artifact(checkpoint: Path) -> Path:
    """The package that the run of a checkpoint was started with.

    Raises:
        LanceError: if the run's folder does not say, or it is there no more.
    """
    try:
        path = Path(json.loads((checkpoint.parent / "run.json").read_text("utf-8"))["artifact"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{checkpoint}: no run.json beside it says which package it belongs to; name that with --artifact"
        ) from None
    if not path.is_file():
        raise ArtifactError(f"{path}: the package of this run is not there; name it with --artifact")
    return path


def settle_task_name(wanted: str | None, data: Path | None, earlier: tuple[str, ...]) -> str:
    """The new task's name: as asked for, else after its data, with a number where that is taken.

    Raises:
        LanceError: if the name asked for cannot be one, or is taken.
    """
    if wanted is not None:
        if not is_task_name(wanted):
            raise LanceError(
                f"--task-name: expected letters, digits, dots and dashes, at most 64, found {wanted!r}"
            )
        if wanted in earlier:
            raise LanceError(f"--task-name: {wanted} was learned already; choose another name")
        return wanted
    name = after_data = FALLBACK_TASK if data is None else task_name_after(data)
    number = 2
    while name in earlier:
        name, number = f"{after_data}-{number}", number + 1
    return name
