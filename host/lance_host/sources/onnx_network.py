"""An ONNX graph as a PyTorch module: everything behind it treats it like any other network.

Convolutions, linear layers (Gemm, or MatMul with its Add) and batch-norms become layers, named after their
weights in the file, so that they can be chosen, replaced and trained; the rest is the table of `onnx_ops`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn

from lance_edge.errors import ModelError
from lance_host.shapes import PROBES, infer_shapes
from lance_host.sources.onnx_layers import LAYERS, Weights, fuse_biases, module_path, place
from lance_host.sources.onnx_ops import OPS
from lance_host.sources.onnx_ops.op import Op
from lance_host.sources.onnx_ops.shape import SHAPED

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One computation: operands and results by name; by the layer of that name, or by the table."""

    op: Op
    layer: str | None
    operands: tuple[str, ...]
    results: tuple[str, ...]


class OnnxNetwork(nn.Module):
    """The graph, computed node by node: images `[N, C, H, W]` to logits `[N, classes]`."""

    def __init__(self, model: ir.Model, is_channels_last: bool) -> None:
        """Make the layers and the plan.

        Args:
            model: with one input and one output, constants folded, and a batch dimension called `N`.
            is_channels_last: whether it takes `[N, H, W, C]`; the module takes channels first in any case.

        Raises:
            ModelError: naming the first operator that is not known here.
        """
        super().__init__()
        graph = model.graph
        first, second = (infer_shapes(model, batch) for batch in PROBES)
        for node in graph:
            if node.op_type in SHAPED:
                node.resize_inputs(1)
        passes.RemoveUnusedNodesPass()(model)  # the shape arithmetic
        fuse_biases(graph)
        self._images, self._logits = str(graph.inputs[0].name), str(graph.outputs[0].name)
        self._is_channels_last = is_channels_last
        self._constants: dict[str, str] = {}  # operand -> buffer
        nodes = [node for node in graph if node.op_type != "Constant"]
        self._steps = [self._step(node, number, first, second) for number, node in enumerate(nodes)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to `[N, classes]`."""
        values = {name: self.get_buffer(buffer) for name, buffer in self._constants.items()}
        values[self._images] = images.permute(0, 2, 3, 1) if self._is_channels_last else images
        for step in self._steps:
            tensors = [values[name] for name in step.operands]
            if step.layer is not None:
                results = self.get_submodule(step.layer)(*tensors)
            else:
                results = OPS[step.op.kind](step.op, tensors)
            values.update(
                zip(step.results, results if isinstance(results, tuple) else (results,), strict=False)
            )
        return values[self._logits]

    def _step(self, node: ir.Node, number: int, first: Shapes, second: Shapes) -> Step:
        op, operands = _describe(node, first, second), [value for value in node.inputs if value is not None]
        results = tuple(str(value.name) for value in node.outputs)
        layer = self._make_layer(node, number, op, first)
        if layer is not None:
            return Step(op, layer, (str(operands[0].name),), results)
        if node.op_type not in OPS:
            domain = f"{node.domain}." if node.domain else ""
            raise ModelError(
                f"operator {domain}{node.op_type} (node {node.name}) is not known; known are"
                f" {', '.join(sorted({*OPS, *LAYERS}))}"
            )
        if node.op_type == "Expand":  # it reads the batch size of the images
            return Step(op, None, (self._operand(operands[0]), self._images), results)
        return Step(op, None, tuple(map(self._operand, operands)), results)

    def _make_layer(self, node: ir.Node, number: int, op: Op, shapes: Shapes) -> str | None:
        """The name of the layer that a node becomes, `None` if it is to be computed by the table."""
        arrays = {index: array for index, array in op.constants.items() if array.dtype == np.float32}
        operand = node.inputs[0]
        if node.op_type not in LAYERS or 1 not in arrays or 0 in op.constants or operand is None:
            return None
        layer = LAYERS[node.op_type](op, Weights(arrays), shapes[str(operand.name)][2:])
        if layer is None:
            return None
        place(self, module_path(node, number), layer)
        return next((name for name, module in self.named_modules() if module is layer), None)

    def _operand(self, value: ir.Value) -> str:
        """The name of an operand; a constant one becomes a buffer."""
        name, tensor = str(value.name), ir.convenience.get_const_tensor(value)
        if tensor is not None and name not in self._constants:
            buffer = f"constant_{len(self._constants)}"
            self.register_buffer(buffer, torch.from_numpy(np.array(tensor.numpy())))
            self._constants[name] = buffer
        return name


def _describe(node: ir.Node, first: Shapes, second: Shapes) -> Op:
    constants = {}
    for index, value in enumerate(node.inputs):
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is not None:
            constants[index] = tensor.numpy()
    return Op(
        name=node.name or str(node.outputs[0].name),
        kind=node.op_type,
        attributes={attribute.name: attribute.value for attribute in node.attributes.values()},
        constants=constants,
        present=frozenset(index for index, value in enumerate(node.inputs) if value is not None),
        outputs=len(node.outputs),
        dims=_dims(node.outputs[0], first, second),
        operand_dims=_dims(node.inputs[0], first, second) if node.inputs else (),
    )


def _dims(value: ir.Value | None, first: Shapes, second: Shapes) -> tuple[int | None, ...]:
    """The shape as `Op` has it; `()` where it is not known."""
    name = "" if value is None else str(value.name)
    pairs = zip(first.get(name, ()), second.get(name, ()), strict=True)
    return tuple(a if a == b else None if (a, b) == PROBES else -1 for a, b in pairs)
