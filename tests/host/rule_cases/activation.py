"""Activation functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st

from rule_cases.case import Case, number, shapes, unary

SLOPES = (0.01, 0.3, 1.0, 2.0)


def with_attributes(
    function: Callable[..., torch.Tensor], **choices: tuple[float | str, ...]
) -> st.SearchStrategy[Case]:
    """A function of x and attributes, which are drawn."""
    drawn = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})

    def case(shape: Any, attributes: dict[str, Any]) -> Case:
        return Case({"x": shape}, lambda x: function(x, **attributes), attributes=attributes)

    return st.builds(case, shapes(1, 4), drawn)


def clip(low: float | None, high: float | None) -> Case:
    constants = {"low": low, "high": high}
    present = {name: number(value) for name, value in constants.items() if value is not None}
    operands = ("x", *(name if name in present else "" for name in constants))

    def clamp(x: torch.Tensor) -> torch.Tensor:
        return x if not present else x.clamp(low, high)

    return Case({"x": ("N", 6)}, clamp, present, operands=operands)


@st.composite
def prelu(draw: st.DrawFn) -> Case:
    """A slope for each channel, or one for all."""
    shape = draw(shapes(2, 4))
    channels = shape[1] if draw(st.booleans()) else 1
    slope = (channels, *[1] * (len(shape) - 2))
    return Case({"x": shape, "slope": slope}, lambda x, slope: torch.where(x > 0, x, slope * x))


@st.composite
def along_axis(draw: st.DrawFn, function: Callable[..., torch.Tensor]) -> Case:
    shape = draw(shapes(1, 4))
    rank = len(shape)
    axis = draw(st.sampled_from([axis for axis in range(-rank, rank) if shape[axis] != "N"] or [0]))
    return Case({"x": shape}, lambda x: function(x, axis), attributes={"axis": axis})


FIXED: dict[str, list[Case]] = {
    "Clip": [clip(0.0, 6.0), clip(None, 0.5), clip(0.1, None), clip(None, None)],
    "Softmax": [Case({"x": ("N", 5)}, lambda x: x.softmax(-1))],
    "LogSoftmax": [Case({"x": ("N", 5)}, lambda x: x.log_softmax(-1))],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "Relu": unary(torch.relu),
    "LeakyRelu": with_attributes(lambda x, alpha: F.leaky_relu(x, alpha), alpha=(-0.5, 0.0, *SLOPES)),
    "PRelu": prelu(),
    "Clip": st.builds(lambda low, width: clip(low, low + width), st.floats(-2, 1), st.floats(0.5, 2)),
    "Sigmoid": unary(torch.sigmoid),
    "HardSigmoid": with_attributes(
        lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), alpha=(1 / 6, 0.2, 0.4), beta=(0.1, 0.5)
    ),
    "HardSwish": unary(lambda x: F.hardswish(x)),
    "Tanh": unary(torch.tanh, tolerance=1e-3),  # 1 - y^2 loses digits where all of y is close to 1
    "Gelu": st.sampled_from(["none", "tanh"]).flatmap(
        lambda kind: unary(lambda x: F.gelu(x, approximate=kind), opset=20, approximate=kind)
    ),
    "Mish": unary(lambda x: F.mish(x)),
    "Elu": with_attributes(lambda x, alpha: F.elu(x, alpha), alpha=(-0.5, *SLOPES)),
    "Celu": with_attributes(lambda x, alpha: F.celu(x, alpha), alpha=SLOPES),
    "Selu": with_attributes(
        lambda x, alpha, gamma: gamma * torch.where(x > 0, x, alpha * torch.expm1(x)),
        alpha=(1.6732632, 0.5),
        gamma=(1.050701, 2.0),
    ),
    "Softplus": unary(lambda x: F.softplus(x)),
    "Softsign": unary(lambda x: F.softsign(x)),
    "Softmax": along_axis(torch.softmax),
    "LogSoftmax": along_axis(torch.log_softmax),
}
