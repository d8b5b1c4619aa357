"""Operators that reduce over axes: the gradient is repeated along them, or goes to those that were chosen."""

from collections.abc import Sequence

import onnx_ir as ir

from lance_host.autodiff.emit import Emit, dims
from lance_host.autodiff.rules.common import (
    Thunk,
    constant_of,
    operand,
    optional,
    rank_of,
    result,
    scale_by,
    unsupported,
)


def reduced_axes(node: ir.Node) -> list[int]:
    """The axes of a Reduce operator, counted from the front."""
    rank = rank_of(operand(node, 0))
    axes = constant_of(optional(node, 1))
    if axes is None or axes.size == 0:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(axis) % rank for axis in axes.ravel())


def _kept(emit: Emit, node: ir.Node, value: ir.Value) -> ir.Value:
    """A value of the output's shape, with the reduced axes as axes of size 1."""
    axes = reduced_axes(node)
    if axes and not node.attributes.get_int("keepdims", 1):
        return emit("Unsqueeze", value, emit.constant(axes))
    return value


def repeat(emit: Emit, value: ir.Value, x: ir.Value, axes: Sequence[int]) -> ir.Value:
    """Repeat a value, of size 1 on `axes`, to the shape of `x`."""
    shape = [dim if axis in axes else 1 for axis, dim in enumerate(dims(x))]
    if any(isinstance(dim, str) for dim in shape):
        return emit("Expand", value, emit("Shape", x))
    fixed = [dim for dim in shape if isinstance(dim, int)]
    return value if max(fixed, default=1) == 1 else emit("Expand", value, emit.constant(fixed))


def reduce_sum(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Every summand has the gradient of the sum."""
    return (lambda: repeat(emit, _kept(emit, node, dy), operand(node, 0), reduced_axes(node)),)


def reduce_mean(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """As a sum, divided by the number of summands."""
    x = operand(node, 0)

    def dx() -> ir.Value:
        axes, count = reduced_axes(node), 1
        for axis in axes:
            size = dims(x)[axis]
            if isinstance(size, str):
                raise unsupported(
                    node, "a mean over the batch depends on the micro-batch, so it cannot be trained"
                )
            count *= size
        return repeat(emit, scale_by(emit, _kept(emit, node, dy), 1 / count), x, axes)

    return (dx,)


def reduce_extremum(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """ReduceMax and ReduceMin: values that are equal share the gradient, as PyTorch's amax has it."""
    return (
        lambda: share(
            emit, operand(node, 0), _kept(emit, node, result(node)), _kept(emit, node, dy), reduced_axes(node)
        ),
    )


def share(emit: Emit, x: ir.Value, extreme: ir.Value, dy: ir.Value, axes: Sequence[int]) -> ir.Value:
    """`dy` (of size 1 on `axes`) in equal parts to where `x` is `extreme`."""
    chosen = emit("Cast", emit("Equal", x, extreme), to=int(ir.DataType.FLOAT))
    count = emit.sum(chosen, *axes, keepdims=True) if axes else chosen
    return emit("Mul", chosen, emit("Div", dy, count))


def reduce_l1(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """sum |x|."""
    return (lambda: emit("Mul", emit("Sign", operand(node, 0)), _kept(emit, node, dy)),)


def reduce_l2(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """(sum x^2)^(1/2): x / y, and 0 where all is 0, as PyTorch has it."""

    def dx() -> ir.Value:
        length = emit("Max", _kept(emit, node, result(node)), 1e-30)
        return emit("Mul", operand(node, 0), emit("Div", _kept(emit, node, dy), length))

    return (dx,)


def reduce_sum_square(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """sum x^2."""
    return (lambda: emit("Mul", operand(node, 0), emit("Mul", _kept(emit, node, dy), 2.0)),)


def reduce_log_sum_exp(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """log sum e^x: e^(x - y)."""

    def dx() -> ir.Value:
        share_of_each = emit("Exp", emit("Sub", operand(node, 0), _kept(emit, node, result(node))))
        return emit("Mul", share_of_each, _kept(emit, node, dy))

    return (dx,)
