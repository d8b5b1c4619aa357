"""Arithmetic and functions of one value."""

from collections.abc import Callable

import numpy as np
import torch
from graph_runner import Shape
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rule_cases.case import Case, broadcast, number, unary


def binary(function: Callable[..., torch.Tensor], positive: tuple[str, ...] = ()) -> st.SearchStrategy[Case]:
    return broadcast(2).map(lambda found: Case({"a": found[0], "b": found[1]}, function, positive=positive))


def binary_cases(function: Callable[..., torch.Tensor], positive: tuple[str, ...] = ()) -> list[Case]:
    shapes: list[tuple[Shape, Shape]] = [
        (("N", 4), ("N", 4)),
        (("N", 4, 3), (4, 1)),
        ((5,), ("N", 5)),
        ((1, 4), ("N", 1)),
        ((), ("N", 3)),
        (("N", 1, 1, 3), (2, 5, 1)),
    ]
    return [Case({"a": a, "b": b}, function, positive=positive) for a, b in shapes]


def power(exponent: float, positive: bool = True) -> Case:
    return Case(
        {"a": ("N", 4)}, lambda a: a**exponent, {"b": number(exponent)}, positive=("a",) if positive else ()
    )


@st.composite
def extremum(draw: st.DrawFn, function: Callable[..., torch.Tensor]) -> Case:
    """Of one or two operands: of three, PyTorch has no function that shares among equal ones."""
    names = ["a", "b"][: draw(st.integers(1, 2))]
    found = draw(broadcast(len(names)))

    def nested(*values: torch.Tensor) -> torch.Tensor:
        return function(*values) if len(values) > 1 else values[0] * 1.0

    rounded = tuple(names) if draw(st.booleans()) else ()
    return Case(dict(zip(names, found, strict=True)), nested, rounded=rounded)


@st.composite
def where(draw: st.DrawFn) -> Case:
    """A constant condition, broadcast with two operands."""
    a, b, condition = draw(broadcast(3))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    mask = np.asarray(rng.random([1 if dim == "N" else int(dim) for dim in condition]) < 0.5)
    return Case(
        {"a": a, "b": b},
        lambda a, b: torch.where(torch.from_numpy(mask), a, b),
        {"c": mask},
        operands=("c", "a", "b"),
    )


THROUGH_DOUBLE = Case(
    {"x": ("N", 4)},
    lambda x: x * 1.0,
    attributes={"to": TensorProto.DOUBLE},
    outputs=("wide",),
    after=(helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.FLOAT),),
)
NOT_DROPPED = Case({"x": ("N", 4)}, lambda x: x * 1.0, {"ratio": number(0.5), "training": np.array(False)})
COMPUTED_CONDITION = Case(
    {"x": ("N", 5)},
    lambda x: torch.where(x > 0.3, x, 0.1 * x),
    {"limit": number(0.3), "tenth": number(0.1)},
    operands=("is_large", "x", "less"),
    before=(
        helper.make_node("Greater", ["x", "limit"], ["is_large"]),
        helper.make_node("Mul", ["x", "tenth"], ["less"]),
    ),
)
THREE_OPERANDS = Case(
    {"a": ("N", 4), "b": (4,), "c": ("N", 1)},
    lambda a, b, c: torch.maximum(torch.maximum(a, b), c),  # random reals: none are equal
)

FIXED: dict[str, list[Case]] = {
    "Add": binary_cases(torch.add),
    "Sub": binary_cases(torch.sub),
    "Mul": binary_cases(torch.mul),
    "Div": binary_cases(torch.div, positive=("b",)),
    "Pow": [
        *(power(exponent) for exponent in (2.0, 3.0, 0.5, 1.0, 1.7, -1.0, -2.5)),
        *(power(exponent, positive=False) for exponent in (2.0, 3.0, 4.0)),
    ],
    "Max": [THREE_OPERANDS],
    "Where": [COMPUTED_CONDITION],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "Add": binary(torch.add),
    "Sub": binary(torch.sub),
    "Mul": binary(torch.mul),
    "Div": binary(torch.div, positive=("b",)),
    "Pow": binary(torch.pow, positive=("a",)),
    "Min": extremum(torch.minimum),
    "Max": extremum(torch.maximum),
    "Where": where(),
    "Neg": unary(torch.neg),
    "Identity": unary(torch.clone),
    "Dropout": st.just(NOT_DROPPED),
    "Cast": st.just(THROUGH_DOUBLE),
    "Abs": unary(torch.abs),
    "Reciprocal": unary(torch.reciprocal, positive=True),
    "Sqrt": unary(torch.sqrt, positive=True),
    "Exp": unary(torch.exp),
    "Log": unary(torch.log, positive=True),
    "Sin": unary(torch.sin),
    "Cos": unary(torch.cos),
    "Erf": unary(torch.erf),
}
