"""Exact multiply-adds of an emitted graph, counted node by node from inferred shapes."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from lance_host.shapes import infer_shapes


def graph_macs(model: ir.Model, batch: int, ranks: Mapping[str, int] = MappingProxyType({})) -> int:
    """Multiply-adds of all convolutions and matrix products when the micro-batch has `batch` samples.

    Elementwise operators, reductions and data movement are not counted, as in the paper.

    Args:
        ranks: sizes of the dimensions that vary from step to step, by name.
    """
    shapes = infer_shapes(model, batch, ranks)
    return sum(_node_macs(node, shapes) for node in model.graph)


def _node_macs(node: ir.Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    def shape(value: ir.Value | None) -> tuple[int, ...]:
        assert value is not None
        assert value.name is not None
        return tuple(value.const_value.shape.numpy()) if value.const_value is not None else shapes[value.name]

    if node.op_type == "Conv":  # every output value reads C/groups k_h k_w inputs
        return math.prod(shape(node.outputs[0])) * math.prod(shape(node.inputs[1])[1:])
    if node.op_type == "ConvTranspose":  # every input value writes O/groups k_h k_w outputs
        return math.prod(shape(node.inputs[0])) * math.prod(shape(node.inputs[1])[1:])
    if node.op_type == "MatMul":
        return math.prod(shape(node.outputs[0])) * shape(node.inputs[0])[-1]
    if node.op_type == "Gemm":
        inner = shape(node.inputs[0])[0 if node.attributes.get_int("transA", 0) else 1]
        return math.prod(shape(node.outputs[0])) * inner
    return 0
