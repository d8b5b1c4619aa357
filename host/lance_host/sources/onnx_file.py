"""A network from an `.onnx` file: read, brought to one opset and a free batch, checked against ONNX Runtime."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import nn

from lance_edge.errors import ModelError
from lance_host.inputs import USUAL_SIZE
from lance_host.model_source import ModelSource
from lance_host.runtime import open_session
from lance_host.sources.onnx_network import OnnxNetwork
from lance_host.text import one_line
from lance_host.traverse import descendants

OPSET = 18
PROBABILITIES = ("Softmax", "LogSoftmax")
# Of two float32 runtimes through a whole network, relative to the largest logit; a wrong operator is far off.
TOLERANCE = 1e-3


def onnx_source(text: str) -> ModelSource:
    """The network of an ONNX file with one float32 input, the batch first, and one output of logits.

    Raises:
        ModelError: if the file cannot be read, or is not such a network.
    """
    path = Path(text)
    proto = _load(text, path)
    with _explained(text):
        _drop_probabilities(proto.graph)
        images = _images(proto.graph)
        shape = _sample_shape(images)
    is_channels_last = len(shape) == 3 and shape[0] not in (1, 3) and shape[2] in (1, 3)
    return ModelSource(
        name=path.name,
        build=functools.partial(_build, text, proto, shape, is_channels_last),
        input_shape=(shape[2], *shape[:2]) if is_channels_last else shape,
        build_for_arrays=functools.partial(_build, text, proto, shape, False),
    )


class _explained:  # noqa: N801 - reads like a statement
    """Whatever goes wrong within is a refusal that names the file."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModelError):
            raise ModelError(f"--model {self._text}: {error}") from None
        if isinstance(error, Exception):  # protobuf, the checker, converter and runtime raise many kinds
            raise ModelError(
                f"--model {self._text}: cannot be used ({one_line(error)}); export it again with opset {OPSET}"
                " and a dynamic batch, and try it with onnx.checker"
            ) from error


def _load(text: str, path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"--model {text}: no such file; give the path of an ONNX model")
    with _explained(text):
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
        opset = max(
            (entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0
        )
        return onnx.version_converter.convert_version(proto, OPSET) if opset < OPSET else proto


def _drop_probabilities(graph: onnx.GraphProto) -> None:
    """A classifier that ends with a softmax: what it is taken of are the logits."""
    last = next((node for node in graph.node if graph.output[0].name in node.output), None)
    if last is not None and last.op_type in PROBABILITIES:
        graph.output[0].name = last.input[0]
        graph.node.remove(last)


def _images(graph: onnx.GraphProto) -> Any:
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        kinds = ", ".join(
            f"{v.name} ({onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type)})" for v in inputs
        )
        raise ModelError(
            f"expected one float32 input, found {kinds or 'none'}; export the image classifier alone"
        )
    if len(graph.output) != 1:
        names = ", ".join(value.name for value in graph.output)
        raise ModelError(f"expected one output, the logits, found {names}; export the network with logits only")
    return inputs[0]


def _sample_shape(images: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The input without its batch; of an image what the file leaves open is colour, and of the usual size."""
    dims = [dim.dim_value for dim in images.type.tensor_type.shape.dim]
    usual = [0, 3, USUAL_SIZE, USUAL_SIZE]
    if len(dims) < 2 or (0 in dims[1:] and len(dims) != 4):
        raise ModelError(f"its input {images.name} has the shape {dims}; expected [N, 3, H, W], or fixed sizes")
    return tuple(dim or usual[axis] for axis, dim in enumerate(dims))[1:]


def _build(
    text: str, proto: onnx.ModelProto, shape: Sequence[int], is_channels_last: bool, classes: int
) -> nn.Module:
    with _explained(text):
        network = OnnxNetwork(_normalised(proto, shape), is_channels_last)
        _check(network, proto, shape, is_channels_last)
        return network


def _normalised(proto: onnx.ModelProto, shape: Sequence[int]) -> ir.Model:
    """The graph with a free batch, functions inlined and constants folded."""
    model = ir.serde.deserialize_model(proto)
    passes.InlinePass()(model)
    passes.RemoveInitializersFromInputsPass()(model)
    images = model.graph.inputs[0]
    batch = images.shape[0] if images.shape is not None else None
    images.shape = ir.Shape(["N", *shape])
    of_images = descendants(model.graph, [images])
    for node in model.graph:
        if isinstance(batch, int) and node.op_type == "Reshape" and node.inputs[0] in of_images:
            _free_reshape(node, batch)
        for value in node.outputs:
            value.shape = None
    optimizer.fold_constants(model, onnx_shape_inference=True)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _free_reshape(node: ir.Node, batch: int) -> None:
    """A shape that begins with the batch size of the export: let it begin with that of the operand."""
    target = node.inputs[1]
    tensor = None if target is None else ir.convenience.get_const_tensor(target)
    if target is None or tensor is None or tensor.size < 1 or tensor.numpy()[0] != batch:
        return
    freed = tensor.numpy().copy()
    freed[0] = 0
    value = ir.Value(name=f"{target.name}/{node.name}/freed", const_value=ir.tensor(freed))
    assert node.graph is not None
    node.graph.register_initializer(value)
    node.replace_input_with(1, value)
    node.attributes.pop("allowzero", None)


def _check(network: OnnxNetwork, proto: onnx.ModelProto, shape: Sequence[int], is_channels_last: bool) -> None:
    """The module gives what ONNX Runtime gives for the file."""
    batch = _images(proto.graph).type.tensor_type.shape.dim[0].dim_value or 2
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    session = open_session(proto.SerializeToString())
    (expected,) = session.run(None, {_images(proto.graph).name: images})
    samples = torch.from_numpy(images)
    if is_channels_last:
        samples = samples.permute(0, 3, 1, 2)
    with torch.no_grad():
        found = network.eval()(samples).numpy()
    error = (
        np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6)
        if found.shape == expected.shape
        else 1.0
    )
    if not error <= TOLERANCE:
        raise ModelError(
            f"its logits {list(expected.shape)} come out {error:.1e} different in PyTorch, expected at most"
            f" {TOLERANCE:.0e}; please report this network"
        )
