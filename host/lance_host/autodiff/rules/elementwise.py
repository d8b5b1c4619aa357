"""Arithmetic and functions of one value, element by element.

For a function of one input a rule states the slope dy/dx alone, from the output where that is as cheap as
from the input, because the output is what the next layer keeps anyway.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.rules.common import (
    Rule,
    Thunk,
    constant_of,
    operand,
    optional,
    result,
    sum_to,
)


def slope(of: Callable[[Emit, ir.Node], ir.Value]) -> Rule:
    """The rule `dx = dy * slope` of a function of one input."""

    def rule(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
        return (lambda: emit("Mul", dy, of(emit, node)),)

    return rule


# --- arithmetic -------------------------------------------------------------------------------------


def identity(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = x."""
    return (lambda: dy,)


def negate(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = -x."""
    return (lambda: emit("Neg", dy),)


def add(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = a + b."""
    a, b, y = operand(node, 0), operand(node, 1), result(node)
    return (lambda: sum_to(emit, dy, y, a), lambda: sum_to(emit, dy, y, b))


def subtract(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = a - b."""
    a, b, y = operand(node, 0), operand(node, 1), result(node)
    return (lambda: sum_to(emit, dy, y, a), lambda: emit("Neg", sum_to(emit, dy, y, b)))


def multiply(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = a b."""
    a, b, y = operand(node, 0), operand(node, 1), result(node)
    return (
        lambda: sum_to(emit, emit("Mul", dy, b), y, a),
        lambda: sum_to(emit, emit("Mul", dy, a), y, b),
    )


def divide(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = a / b, so dy/db = -y / b."""
    a, b, y = operand(node, 0), operand(node, 1), result(node)
    return (
        lambda: sum_to(emit, emit("Div", dy, b), y, a),
        lambda: emit("Neg", sum_to(emit, emit("Div", emit("Mul", dy, y), b), y, b)),
    )


def power(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = a^b: da = b a^(b-1), db = y log a (0 where a is 0, as PyTorch has it)."""
    a, b, y = operand(node, 0), operand(node, 1), result(node)

    def da() -> ir.Value:
        return sum_to(emit, emit("Mul", dy, _power_slope(emit, a, b, y)), y, a)

    def db() -> ir.Value:
        base = emit("Where", emit("Greater", a, 0.0), a, 1.0)
        return sum_to(emit, emit("Mul", dy, emit("Mul", y, emit("Log", base))), y, b)

    return da, db


def _power_slope(emit: Emit, a: ir.Value, b: ir.Value, y: ir.Value) -> ir.Value:
    tensor = ir.convenience.get_const_tensor(b)
    if tensor is None or tensor.size != 1:
        return emit("Mul", b, emit("Pow", a, emit("Sub", b, 1.0)))
    exponent = float(tensor.numpy().item())
    if exponent == 2.0:  # the runtime's Pow takes ten times as long as a product
        return emit("Mul", a, 2.0)
    if exponent == 3.0:
        return emit("Mul", emit("Mul", a, a), 3.0)
    if exponent == 0.5:
        return emit("Div", 0.5, y)
    return emit("Mul", emit("Pow", a, exponent - 1.0), exponent)


def extremum(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Min and Max: operands that are equal share the gradient, as PyTorch has it."""
    y = result(node)

    def is_chosen(index: int) -> ir.Value:
        return emit("Cast", emit("Equal", operand(node, index), y), to=int(ir.DataType.FLOAT))

    def thunk(index: int) -> Thunk:
        def dx() -> ir.Value:
            chosen = [is_chosen(i) for i in range(len(node.inputs))]
            count = reduce(lambda total, one: emit("Add", total, one), chosen)
            return sum_to(emit, emit("Mul", chosen[index], emit("Div", dy, count)), y, operand(node, index))

        return dx

    return [thunk(index) for index in range(len(node.inputs))]


def where(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = a where the condition holds, else b."""
    condition, a, b, y = operand(node, 0), operand(node, 1), operand(node, 2), result(node)

    def no_gradient() -> ir.Value:
        raise AssertionError("a condition carries no gradient")

    return (
        no_gradient,
        lambda: sum_to(emit, emit.keep(dy, condition), y, a),
        lambda: sum_to(emit, emit.keep(dy, emit("Not", condition)), y, b),
    )


def cast(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Between floating-point types; what is cast to integers carries no gradient."""
    x = operand(node, 0)
    return (lambda: emit("Cast", dy, to=int(x.dtype or ir.DataType.FLOAT)),)


def dropout(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Nothing is dropped at inference; `seed_dropouts` has replaced those that drop."""
    if constant_of(optional(node, 2), False):
        raise ModelError(
            f"{node.name}: this Dropout draws another mask each time it runs, so backward cannot repeat it;"
            " export the network in evaluation mode"
        )
    return (lambda: dy,)


# --- functions of one value ---------------------------------------------------------------------------


@slope
def absolute(emit: Emit, node: ir.Node) -> ir.Value:
    """|x|."""
    return emit("Sign", operand(node, 0))


@slope
def reciprocal(emit: Emit, node: ir.Node) -> ir.Value:
    """1 / x."""
    y = result(node)
    return emit("Neg", emit("Mul", y, y))


@slope
def square_root(emit: Emit, node: ir.Node) -> ir.Value:
    """x^(1/2)."""
    return emit("Div", 0.5, result(node))


@slope
def exponential(emit: Emit, node: ir.Node) -> ir.Value:
    """e^x."""
    return result(node)


@slope
def logarithm(emit: Emit, node: ir.Node) -> ir.Value:
    """log x."""
    return emit("Reciprocal", operand(node, 0))


@slope
def sine(emit: Emit, node: ir.Node) -> ir.Value:
    """sin x."""
    return emit("Cos", operand(node, 0))


@slope
def cosine(emit: Emit, node: ir.Node) -> ir.Value:
    """cos x."""
    return emit("Neg", emit("Sin", operand(node, 0)))


@slope
def error_function(emit: Emit, node: ir.Node) -> ir.Value:
    """erf x: slope 2 / sqrt(pi) e^(-x^2)."""
    x = operand(node, 0)
    return emit("Mul", emit("Exp", emit("Neg", emit("Mul", x, x))), 2 / math.sqrt(math.pi))
