"""What the rules share: their form, and reading a node.

A rule is given the node and the gradient `dy` of its output, and returns one thunk for each input; only
the thunks of inputs that need a gradient are called.  Inputs behind the last thunk have no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit, dims

Thunk = Callable[[], ir.Value]
Rule = Callable[[Emit, ir.Node, ir.Value], Sequence[Thunk]]


@dataclass(frozen=True)
class OfAllOutputs:
    """The rule of an operator of which several outputs have a gradient; `None` stands for one without."""

    rule: Callable[[Emit, ir.Node, Sequence[ir.Value | None]], Sequence[Thunk]]


def unsupported(node: ir.Node, what: str) -> ModelError:
    """The error of a rule that does not cover this use of its operator."""
    return ModelError(f"{node.name}: {what}; train only layers behind it (smaller --layers)")


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = optional(node, index)
    if value is None:
        raise ModelError(f"{node.name}: input {index} is missing")
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def result(node: ir.Node) -> ir.Value:
    """The first output."""
    return node.outputs[0]


def rank_of(value: ir.Value) -> int:
    """The number of axes."""
    return len(dims(value))


def constant_of(value: ir.Value | None, default: Any = None) -> Any:
    """The number or array that a value is known to hold."""
    if value is None:
        return default
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ModelError(
            f"{value.name}: expected a constant, found a computed value;"
            " train only layers behind it (smaller --layers)"
        )
    return tensor.numpy()


def scale_by(emit: Emit, value: ir.Value, factor: float) -> ir.Value:
    """`factor value`, and nothing emitted for a factor of 1."""
    return value if factor == 1.0 else emit("Mul", value, float(factor))


def sum_to(emit: Emit, gradient: ir.Value, output: ir.Value, operand: ir.Value) -> ir.Value:
    """Undo broadcasting: sum `gradient` (of `output`'s shape) to the shape of `operand`."""
    return sum_dims(emit, gradient, dims(output), dims(operand))


def sum_dims(
    emit: Emit, gradient: ir.Value, wide: Sequence[int | str], narrow: Sequence[int | str]
) -> ir.Value:
    """Sum over those axes of `wide`, the first of the gradient's, that broadcasting made of `narrow`."""
    lead = len(wide) - len(narrow)
    stretched = [lead + i for i, dim in enumerate(narrow) if dim == 1 and wide[lead + i] != 1]
    if stretched:
        gradient = emit.sum(gradient, *stretched, keepdims=True)
    if lead:
        gradient = emit.sum(gradient, *range(lead))
    return gradient


def reshaped_like(emit: Emit, gradient: ir.Value, value: ir.Value) -> ir.Value:
    """Give a gradient the shape of `value`, of which one dimension may depend on the batch."""
    shape = dims(value)
    if sum(isinstance(dim, str) for dim in shape) > 1:
        return emit("Reshape", gradient, emit("Shape", value))
    return emit.reshape(gradient, *(dim if isinstance(dim, int) else -1 for dim in shape))
