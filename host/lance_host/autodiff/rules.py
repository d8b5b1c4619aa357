"""The table of backward rules: one entry for each operator.

A rule is given the node and the gradient `dy` of its output, and returns one thunk for each input; only
the thunks of inputs that need a gradient are called.  Formulas are those of the ONNX operator texts,
differentiated; each is checked against PyTorch autograd in `tests/host/test_rules.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff import conv
from lance_host.autodiff.emit import Emit, dims, static_dims

Thunk = Callable[[], ir.Value]
Rule = Callable[[Emit, ir.Node, ir.Value], Sequence[Thunk]]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ModelError(f"{node.name}: input {index} is missing")
    return value


def _constant_of(value: ir.Value | None, default: Any = None) -> Any:
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


def sum_to(emit: Emit, gradient: ir.Value, output: ir.Value, operand: ir.Value) -> ir.Value:
    """Undo broadcasting: sum `gradient` (of `output`'s shape) to the shape of `operand`."""
    wide, narrow = dims(output), dims(operand)
    lead = len(wide) - len(narrow)
    stretched = [lead + i for i, dim in enumerate(narrow) if dim == 1 and wide[lead + i] != 1]
    if stretched:
        gradient = emit.sum(gradient, *stretched, keepdims=True)
    if lead:
        gradient = emit.sum(gradient, *range(lead))
    return gradient


# --- elementwise ----------------------------------------------------------------------------------


def _identity(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    return (lambda: dy,)


def _neg(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    return (lambda: emit("Neg", dy),)


def _add(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    a, b = _input(node, 0), _input(node, 1)
    y = node.outputs[0]
    return (lambda: sum_to(emit, dy, y, a), lambda: sum_to(emit, dy, y, b))


def _sub(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    a, b = _input(node, 0), _input(node, 1)
    y = node.outputs[0]
    return (lambda: sum_to(emit, dy, y, a), lambda: emit("Neg", sum_to(emit, dy, y, b)))


def _mul(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    a, b = _input(node, 0), _input(node, 1)
    y = node.outputs[0]
    return (
        lambda: sum_to(emit, emit("Mul", dy, b), y, a),
        lambda: sum_to(emit, emit("Mul", dy, a), y, b),
    )


def _div(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    a, b = _input(node, 0), _input(node, 1)
    y = node.outputs[0]  # y = a / b, so dy/db = -y / b
    return (
        lambda: sum_to(emit, emit("Div", dy, b), y, a),
        lambda: emit("Neg", sum_to(emit, emit("Div", emit("Mul", dy, y), b), y, b)),
    )


def _relu(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    # The mask from the output, not the input: the output is what the next layer keeps anyway.
    def dx() -> ir.Value:
        mask = emit("Greater", node.outputs[0], emit.constant(0.0))
        return emit("Where", mask, dy, emit.constant(0.0))

    return (dx,)


def _clip(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    low = _constant_of(node.inputs[1] if len(node.inputs) > 1 else None)
    high = _constant_of(node.inputs[2] if len(node.inputs) > 2 else None)

    def dx() -> ir.Value:
        y = node.outputs[0]  # strictly inside the limits, as PyTorch's hardtanh has it
        masks = []
        if low is not None:
            masks.append(emit("Greater", y, emit.constant(float(low))))
        if high is not None:
            masks.append(emit("Less", y, emit.constant(float(high))))
        if not masks:
            return dy
        mask = emit("And", *masks) if len(masks) == 2 else masks[0]
        return emit("Where", mask, dy, emit.constant(0.0))

    return (dx,)


def _sigmoid(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    y = node.outputs[0]  # dx = dy y (1 - y)
    return (lambda: emit("Mul", dy, emit("Mul", y, emit("Sub", emit.constant(1.0), y))),)


def _tanh(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    y = node.outputs[0]  # dx = dy (1 - y^2)
    return (lambda: emit("Mul", dy, emit("Sub", emit.constant(1.0), emit("Mul", y, y))),)


def _hard_sigmoid(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    slope = float(node.attributes.get_float("alpha", 0.2))

    def dx() -> ir.Value:
        y = node.outputs[0]
        mask = emit("And", emit("Greater", y, emit.constant(0.0)), emit("Less", y, emit.constant(1.0)))
        return emit("Where", mask, emit("Mul", dy, emit.constant(slope)), emit.constant(0.0))

    return (dx,)


def _hard_swish(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    def dx() -> ir.Value:
        # y = x clip(x / 6 + 1/2, 0, 1): slope 0 below -3, x / 3 + 1/2 between, 1 above 3.
        x = _input(node, 0)
        slope = emit("Add", emit("Mul", x, emit.constant(1 / 3)), emit.constant(0.5))
        slope = emit("Where", emit("Less", x, emit.constant(3.0)), slope, emit.constant(1.0))
        slope = emit("Where", emit("Greater", x, emit.constant(-3.0)), slope, emit.constant(0.0))
        return emit("Mul", dy, slope)

    return (dx,)


# --- shape ----------------------------------------------------------------------------------------


def _reshape(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Reshape, Flatten, Squeeze, Unsqueeze: give the gradient the input's shape back."""

    def dx() -> ir.Value:
        shape = [dim if isinstance(dim, int) else -1 for dim in dims(_input(node, 0))]
        return emit.reshape(dy, *shape)

    return (dx,)


def _transpose(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    rank = len(dims(_input(node, 0)))
    perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
    return (lambda: emit.transpose(dy, *(int(i) for i in np.argsort(perm))),)


def _concat(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    axis = node.attributes.get_int("axis", 0) % len(dims(node.outputs[0]))
    sizes = [static_dims(_input(node, i), axis)[0] for i in range(len(node.inputs))]
    edges = np.cumsum([0, *sizes])

    def slice_of(index: int) -> Thunk:
        start, stop = int(edges[index]), int(edges[index + 1])
        return lambda: emit("Slice", dy, emit.constant([start]), emit.constant([stop]), emit.constant([axis]))

    return [slice_of(i) for i in range(len(sizes))]


# --- reductions and pooling ---------------------------------------------------------------------------


def _reduced_axes(node: ir.Node) -> list[int]:
    rank = len(dims(_input(node, 0)))
    axes = _constant_of(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is None or axes.size == 0:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(axis) % rank for axis in axes.ravel())


def _spread(emit: Emit, node: ir.Node, dy: ir.Value, scale: float) -> ir.Value:
    """The gradient of a reduction: `dy` times `scale`, repeated along the reduced axes."""
    x, axes = _input(node, 0), _reduced_axes(node)
    if axes and not node.attributes.get_int("keepdims", 1):
        dy = emit("Unsqueeze", dy, emit.constant(axes))
    ones = emit.constant(np.full([1 if isinstance(d, str) else d for d in dims(x)], scale, np.float32))
    return emit(
        "Mul",
        dy,
        ones if all(isinstance(dims(x)[a], int) for a in axes) else emit("Expand", ones, emit("Shape", x)),
    )


def _reduce_sum(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    return (lambda: _spread(emit, node, dy, 1.0),)


def _reduce_mean(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    def dx() -> ir.Value:
        shape = dims(_input(node, 0))
        count = 1
        for axis in _reduced_axes(node):
            size = shape[axis]
            if isinstance(size, str):
                raise ModelError(
                    f"{node.name}: a mean over the batch depends on the micro-batch, so it cannot be trained;"
                    " train only layers behind it (smaller --layers)"
                )
            count *= size
        return _spread(emit, node, dy, 1.0 / count)

    return (dx,)


def _global_average_pool(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    size = static_dims(_input(node, 0), start=2)
    ones = np.full((1, 1, *size), 1.0 / float(np.prod(size)), np.float32)
    return (lambda: emit("Mul", dy, emit.constant(ones)),)


# --- products -------------------------------------------------------------------------------------


def _matmul(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    a, b = _input(node, 0), _input(node, 1)
    rank_a, rank_b = len(dims(a)), len(dims(b))
    if min(rank_a, rank_b) < 2:
        raise ModelError(f"{node.name}: MatMul with a vector is not supported; reshape it to a matrix")

    def swapped(value: ir.Value, rank: int) -> ir.Value:
        return emit.transpose(value, *range(rank - 2), rank - 1, rank - 2)

    def da() -> ir.Value:
        return _sum_batch(emit, emit("MatMul", dy, swapped(b, rank_b)), node.outputs[0], a)

    def db() -> ir.Value:
        if rank_b == 2 and rank_a > 2:  # a shared matrix: one product over all rows instead of many
            rows = emit.reshape(a, -1, static_dims(a, rank_a - 1)[0])
            dy_rows = emit.reshape(dy, -1, static_dims(b)[1])
            return emit("Gemm", rows, dy_rows, transA=1)
        return _sum_batch(emit, emit("MatMul", swapped(a, rank_a), dy), node.outputs[0], b)

    return da, db


def _sum_batch(emit: Emit, gradient: ir.Value, output: ir.Value, operand: ir.Value) -> ir.Value:
    """Undo the broadcasting of MatMul's leading dimensions."""
    wide, narrow = dims(output)[:-2], dims(operand)[:-2]
    lead = len(wide) - len(narrow)
    stretched = [lead + i for i, dim in enumerate(narrow) if dim == 1 and wide[lead + i] != 1]
    if stretched:
        gradient = emit.sum(gradient, *stretched, keepdims=True)
    return emit.sum(gradient, *range(lead)) if lead else gradient


def _gemm(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    a, b = _input(node, 0), _input(node, 1)
    get = node.attributes.get_int
    trans_a, trans_b = get("transA", 0), get("transB", 0)
    alpha = float(node.attributes.get_float("alpha", 1.0))
    beta = float(node.attributes.get_float("beta", 1.0))

    def da() -> ir.Value:
        if trans_a:
            return emit("Gemm", b, dy, transA=trans_b, transB=1, alpha=alpha)
        return emit("Gemm", dy, b, transB=1 - trans_b, alpha=alpha)

    def db() -> ir.Value:
        if trans_b:
            return emit("Gemm", dy, a, transA=1, transB=trans_a, alpha=alpha)
        return emit("Gemm", a, dy, transA=1 - trans_a, alpha=alpha)

    def dc() -> ir.Value:
        bias = sum_to(emit, dy, node.outputs[0], _input(node, 2))
        return bias if beta == 1.0 else emit("Mul", bias, emit.constant(beta))

    return da, db, dc


def _conv(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    geo = conv.geometry(node)
    return (
        lambda: conv.input_gradient(emit, geo, _input(node, 1), dy),
        lambda: conv.weight_gradient(emit, geo, _input(node, 0), dy),
        lambda: emit.sum(dy, 0, 2, 3),
    )


def _log_softmax(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    axis = node.attributes.get_int("axis", -1)

    def dx() -> ir.Value:  # dx = dy - softmax(x) sum(dy)
        total = emit.sum(dy, axis, keepdims=True)
        return emit("Sub", dy, emit("Mul", emit("Exp", node.outputs[0]), total))

    return (dx,)


def _softmax(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    axis = node.attributes.get_int("axis", -1)

    def dx() -> ir.Value:  # dx = y (dy - sum(dy y))
        y = node.outputs[0]
        inner = emit.sum(emit("Mul", dy, y), axis, keepdims=True)
        return emit("Mul", y, emit("Sub", dy, inner))

    return (dx,)


RULES: dict[str, Rule] = {
    "Add": _add,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Flatten": _reshape,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": _identity,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "Mul": _mul,
    "Neg": _neg,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Softmax": _softmax,
    "Squeeze": _reshape,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
