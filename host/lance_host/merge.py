"""A package and a checkpoint become a fine-tuned network again, in the form its users know."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import onnx_ir as ir
import safetensors.numpy
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import Trained, read_weights
from lance_edge.errors import LanceError
from lance_edge.files import atomic_writer
from lance_edge.input_spec import CLASSES_KEY, PREPROCESSING_KEY
from lance_edge.names import WEIGHTS_MEMBER, head_name
from lance_edge.records import to_json
from lance_host.compile import serialise
from lance_host.graph_file import read_graph
from lance_host.stages import bind

Arrays = Mapping[str, NDArray[np.generic]]


def merge(artifact: Path, checkpoint: Path, output: Path) -> None:
    """Write the fine-tuned network: `.pth` or `.safetensors` (state dict), or `.onnx` (images to logits).

    Raises:
        LanceError: if the ending is unknown, or package and checkpoint do not belong together; nothing is
            written.
    """
    if output.suffix not in WRITERS:
        raise LanceError(
            f"{output}: expected an ending of {', '.join(WRITERS)}, found {output.suffix or 'none'}"
        )
    with Bundle(artifact) as bundle:
        trained = read_weights(checkpoint, bundle)
        data = WRITERS[output.suffix](bundle, trained)
    with atomic_writer(output) as file:
        file.write(data)


def merged_state(bundle: Bundle, weights: Arrays) -> Arrays:
    """The whole state dict: the package's weights, trained ones replaced; without heads of earlier tasks."""
    original = bundle.arrays(WEIGHTS_MEMBER)
    heads = {head_name(task.name, spec.name) for task in bundle.manifest.tasks for spec in task.head}
    return {name: weights.get(name, original[name]) for name in original if name not in heads}


def _pth(bundle: Bundle, trained: Trained) -> bytes:
    buffer, state = io.BytesIO(), merged_state(bundle, trained.weights)
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, buffer)
    return buffer.getvalue()


def _safetensors(bundle: Bundle, trained: Trained) -> bytes:
    return safetensors.numpy.save(dict(merged_state(bundle, trained.weights)))


def _onnx(bundle: Bundle, trained: Trained) -> bytes:
    """Prefix and tail joined, weights constant, batch-norm folded; classes and preprocessing as metadata."""
    manifest, variant = bundle.manifest, trained.variant
    model = ir.serde.deserialize_model(joined_graph(bundle, variant.graphs, "tail"))
    bind(model, trained.weights)
    optimizer.fold_constants(model, input_size_limit=1 << 30, output_size_limit=1 << 30)
    passes.RemoveUnusedNodesPass()(model)
    model.metadata_props[CLASSES_KEY] = json.dumps(list(manifest.classes))
    model.metadata_props[PREPROCESSING_KEY] = json.dumps(to_json(manifest.preprocessing))
    return serialise(model, "inference")


def joined_graph(bundle: Bundle, graphs: Mapping[str, tuple[str, ...]], role: str) -> onnx.ModelProto:
    """Prefix and another graph of a variant as one, from images to that graph's outputs."""
    prefix, tail = (read_graph(bundle, graphs[name]) for name in ("prefix", role))
    read = {value.name for value in tail.graph.input}
    boundary = [value.name for value in prefix.graph.output]
    return onnx.compose.merge_models(
        prefix,
        _with_own_names(tail),
        io_map=[(name, name) for name in boundary if name in read],
        outputs=[value.name for value in tail.graph.output],
    )


def _with_own_names(tail: onnx.ModelProto) -> onnx.ModelProto:
    """Both graphs were cut from one: constants may bear the same name in each."""
    renamed = {item.name: f"tail/{item.name}" for item in tail.graph.initializer}
    for item in tail.graph.initializer:
        item.name = renamed[item.name]
    for node in tail.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    return tail


WRITERS: dict[str, Callable[[Bundle, Trained], bytes]] = {
    ".pth": _pth,
    ".safetensors": _safetensors,
    ".onnx": _onnx,
}
