"""Small edits of a graph."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A new initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def take_over(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put `value` in the place of the node's output, under its name."""
    y = node.outputs[0]
    value.name, y.name = y.name, f"{y.name}/before"
    ir.convenience.replace_all_uses_with(y, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def known_integer(node: ir.Node, index: int, default: int | None = None) -> int | None:
    """The one integer that an operand is known to hold."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return default
    tensor = ir.convenience.get_const_tensor(value)
    return int(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None
