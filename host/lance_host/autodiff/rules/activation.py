"""Activation functions.

Masks come from the output where that has the input's sign, because the output is what the next layer keeps
anyway.  They multiply: the runtime's `Where` is slower than a cast and a product.
"""

import math
from collections.abc import Sequence

import onnx_ir as ir

from lance_host.autodiff.emit import Emit
from lance_host.autodiff.rules.common import Thunk, constant_of, operand, result, scale_by, sum_to
from lance_host.autodiff.rules.elementwise import slope


@slope
def sigmoid(emit: Emit, node: ir.Node) -> ir.Value:
    """1 / (1 + e^-x): slope y (1 - y)."""
    y = result(node)
    return emit("Mul", y, emit("Sub", 1.0, y))


@slope
def tanh(emit: Emit, node: ir.Node) -> ir.Value:
    """Slope 1 - y^2."""
    y = result(node)
    return emit("Sub", 1.0, emit("Mul", y, y))


def relu(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """max(x, 0)."""
    return (lambda: emit.keep(dy, emit("Greater", result(node), 0.0)),)


def clip(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """A gradient strictly inside the limits, as PyTorch's hardtanh has it."""
    limits = [
        (op, constant_of(node.inputs[index] if index < len(node.inputs) else None))
        for index, op in ((1, "Greater"), (2, "Less"))
    ]

    def dx() -> ir.Value:
        masks = [emit(op, result(node), float(limit)) for op, limit in limits if limit is not None]
        if not masks:
            return dy
        return emit.keep(dy, emit("And", *masks) if len(masks) == 2 else masks[0])

    return (dx,)


@slope
def leaky_relu(emit: Emit, node: ir.Node) -> ir.Value:
    """1 above 0, alpha below; y has the sign of x where alpha is not negative."""
    alpha = float(node.attributes.get_float("alpha", 0.01))
    above = _where_positive(emit, result(node) if alpha >= 0 else operand(node, 0))
    return emit("Add", emit("Mul", above, 1.0 - alpha), alpha)


def prelu(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Leaky ReLU whose alpha is learned, and broadcast to x."""
    x, alpha = operand(node, 0), operand(node, 1)

    def dx() -> ir.Value:
        rise = emit("Mul", _where_positive(emit, x), emit("Sub", 1.0, alpha))
        return emit("Mul", dy, emit("Add", rise, alpha))

    return dx, lambda: sum_to(emit, emit("Mul", dy, emit("Min", x, 0.0)), result(node), alpha)


def _where_positive(emit: Emit, value: ir.Value) -> ir.Value:
    """1 where the value is above 0, else 0."""
    return emit("Cast", emit("Greater", value, 0.0), to=int(ir.DataType.FLOAT))


@slope
def elu(emit: Emit, node: ir.Node) -> ir.Value:
    """x above 0; alpha (e^x - 1) below, with the slope y + alpha."""
    below = emit("Add", result(node), float(node.attributes.get_float("alpha", 1.0)))
    return emit("Where", emit("Greater", operand(node, 0), 0.0), 1.0, below)


@slope
def celu(emit: Emit, node: ir.Node) -> ir.Value:
    """x above 0; alpha (e^(x / alpha) - 1) below, with the slope y / alpha + 1."""
    alpha = float(node.attributes.get_float("alpha", 1.0))
    return emit("Add", scale_by(emit, emit("Min", result(node), 0.0), 1 / alpha), 1.0)


@slope
def selu(emit: Emit, node: ir.Node) -> ir.Value:
    """gamma x above 0; gamma alpha (e^x - 1) below, with the slope y + gamma alpha."""
    alpha = float(node.attributes.get_float("alpha", 1.67326319217681884765625))
    gamma = float(node.attributes.get_float("gamma", 1.05070102214813232421875))
    below = emit("Add", result(node), gamma * alpha)
    return emit("Where", emit("Greater", operand(node, 0), 0.0), gamma, below)


@slope
def softplus(emit: Emit, node: ir.Node) -> ir.Value:
    """log(1 + e^x)."""
    return emit("Sigmoid", operand(node, 0))


@slope
def softsign(emit: Emit, node: ir.Node) -> ir.Value:
    """x / (1 + |x|): slope (1 - |y|)^2."""
    rest = emit("Sub", 1.0, emit("Abs", result(node)))
    return emit("Mul", rest, rest)


def hard_sigmoid(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """clip(alpha x + beta, 0, 1)."""
    alpha = float(node.attributes.get_float("alpha", 0.2))
    return (lambda: emit.keep(scale_by(emit, dy, alpha), _inside(emit, result(node))),)


def _inside(emit: Emit, value: ir.Value) -> ir.Value:
    """Whether a value is between 0 and 1."""
    return emit("And", emit("Greater", value, 0.0), emit("Less", value, 1.0))


@slope
def hard_swish(emit: Emit, node: ir.Node) -> ir.Value:
    """x h with h = clip(x / 6 + 1/2, 0, 1): slope h, plus x / 6 where h is between 0 and 1."""
    x = operand(node, 0)
    h = emit("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    return emit("Add", h, emit.keep(emit("Mul", x, 1 / 6), _inside(emit, h)))


@slope
def mish(emit: Emit, node: ir.Node) -> ir.Value:
    """x t with t = tanh(log(1 + e^x)): slope t + x sigmoid(x) (1 - t^2)."""
    x = operand(node, 0)
    t = emit("Tanh", emit("Softplus", x))
    rest = emit("Sub", 1.0, emit("Mul", t, t))
    return emit("Add", t, emit("Mul", emit("Mul", x, emit("Sigmoid", x)), rest))


@slope
def gelu(emit: Emit, node: ir.Node) -> ir.Value:
    """x Phi(x): slope Phi(x) + x phi(x) with the normal distribution's Phi and phi, or their tanh form."""
    x = operand(node, 0)
    square = emit("Mul", x, x)
    if node.attributes.get_string("approximate", "none") == "tanh":
        # Phi = (1 + t) / 2 with t = tanh(u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        c = math.sqrt(2 / math.pi)
        u = emit("Mul", x, emit("Add", emit("Mul", square, 0.044715 * c), c))
        t = emit("Tanh", u)
        du = emit("Add", emit("Mul", square, 1.5 * 0.044715 * c), 0.5 * c)  # u' / 2
        density = emit("Mul", emit("Sub", 1.0, emit("Mul", t, t)), du)
        cumulative = emit("Add", emit("Mul", t, 0.5), 0.5)
    else:
        erf = emit("Erf", emit("Mul", x, math.sqrt(0.5)))
        cumulative = emit("Add", emit("Mul", erf, 0.5), 0.5)
        density = emit("Mul", emit("Exp", emit("Mul", square, -0.5)), 1 / math.sqrt(2 * math.pi))
    return emit("Add", cumulative, emit("Mul", x, density))


def log_softmax(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """dx = dy - softmax(x) sum(dy)."""
    axis = node.attributes.get_int("axis", -1)

    def dx() -> ir.Value:
        total = emit.sum(dy, axis, keepdims=True)
        return emit("Sub", dy, emit("Mul", emit("Exp", result(node)), total))

    return (dx,)


def softmax(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """dx = y (dy - sum(dy y))."""
    axis = node.attributes.get_int("axis", -1)

    def dx() -> ir.Value:
        y = result(node)
        inner = emit.sum(emit("Mul", dy, y), axis, keepdims=True)
        return emit("Mul", y, emit("Sub", dy, inner))

    return (dx,)
