"""Reductions over axes."""

from collections.abc import Callable
from typing import Any

import torch
from graph_runner import Shape
from hypothesis import strategies as st

from rule_cases.case import Case, ints, shapes


def reduction(
    function: Callable[..., torch.Tensor], shape: Shape, axes: tuple[int, ...] | None, **attributes: Any
) -> Case:
    keepdims = bool(attributes.get("keepdims", 1))
    dim = tuple(range(len(shape))) if axes is None else axes
    constants = {} if axes is None else {"axes": ints(*axes)}
    return Case({"x": shape}, lambda x: function(x, dim=dim, keepdim=keepdims), constants, attributes)


@st.composite
def reductions(draw: st.DrawFn, function: Callable[..., torch.Tensor], ties: bool = False) -> Case:
    """Any axes that are not the batch, counted from either end, or all of them."""
    shape = draw(shapes(1, 4))
    rank = len(shape)
    fixed = [axis for axis in range(rank) if shape[axis] != "N"]
    axes = None
    if fixed and draw(st.booleans()):
        chosen = draw(st.lists(st.sampled_from(fixed), min_size=1, unique=True))
        axes = tuple(axis - rank * draw(st.integers(0, 1)) for axis in chosen)
    elif fixed != list(range(rank)):
        shape = tuple(4 if dim == "N" else dim for dim in shape)
    case = reduction(function, shape, axes, keepdims=draw(st.integers(0, 1)))
    return Case(**{**vars(case), "rounded": ("x",)}) if ties and draw(st.booleans()) else case


def length(x: torch.Tensor, dim: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return torch.linalg.vector_norm(x, 2, dim, keepdim)


def absolute(x: torch.Tensor, dim: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return torch.linalg.vector_norm(x, 1, dim, keepdim)


FIXED: dict[str, list[Case]] = {
    "ReduceSum": [
        reduction(torch.sum, ("N", 4, 3), (0,), keepdims=0),
        reduction(torch.sum, ("N", 4, 3), (0, 2), keepdims=1),
        reduction(torch.sum, ("N", 4), None, keepdims=0),
        Case({"x": ("N", 4)}, lambda x: x * 1.0, attributes={"noop_with_empty_axes": 1}),
    ],
    "ReduceMean": [Case({"x": ("N", 4)}, lambda x: x * 1.0, attributes={"noop_with_empty_axes": 1})],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "ReduceSum": reductions(torch.sum),
    "ReduceMean": reductions(torch.mean),
    "ReduceMax": reductions(torch.amax, ties=True),
    "ReduceMin": reductions(torch.amin, ties=True),
    "ReduceL1": reductions(absolute),
    "ReduceL2": reductions(length),
    "ReduceSumSquare": reductions(lambda x, dim, keepdim: (x * x).sum(dim, keepdim)),
    "ReduceLogSumExp": reductions(torch.logsumexp),
}
