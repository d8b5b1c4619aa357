"""Operators that pick values by position."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume
from hypothesis import strategies as st

from rule_cases.case import Case, ints, shapes


@st.composite
def slices(draw: st.DrawFn) -> Case:
    """Any starts, ends and steps on some axes, out of range and from the end as well."""
    shape = draw(shapes(1, 4))
    rank = len(shape)
    fixed = [axis for axis in range(rank) if shape[axis] != "N"]
    assume(fixed)
    axes = draw(st.lists(st.sampled_from(fixed), min_size=1, unique=True))
    found: dict[int, slice] = {}
    for axis in axes:
        step = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        start, stop = draw(st.integers(-6, 6)), draw(st.integers(-6, 6))
        if not range(int(shape[axis]))[slice(start, stop, step)]:  # the slice must not be empty
            start, stop = (0, 2**31) if step > 0 else (2**31, -(2**31))
        found[axis] = slice(start, stop, step)
    signed = [axis - rank if draw(st.booleans()) else axis for axis in axes]

    def function(x: torch.Tensor) -> torch.Tensor:
        for axis, taken in found.items():
            positions = np.arange(x.shape[axis])[taken]
            x = x.index_select(axis, torch.from_numpy(positions.copy()))
        return x

    constants = {
        "starts": ints(*(taken.start for taken in found.values())),
        "ends": ints(*(taken.stop for taken in found.values())),
        "axes": ints(*signed),
        "steps": ints(*(taken.step for taken in found.values())),
    }
    return Case({"x": shape}, function, constants)


@st.composite
def gather(draw: st.DrawFn) -> Case:
    """Indices of 0 to 2 axes, some twice, some from the end; a permutation; a run."""
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(1, len(shape) - 1))
    size = int(shape[axis])
    kind = draw(st.sampled_from(["any", "permutation", "run"]))
    if kind == "any":
        dims = draw(st.lists(st.integers(1, 3), max_size=2))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        indices = rng.integers(-size, size, dims)
    elif kind == "permutation":
        indices = np.array(draw(st.permutations(range(size))))
    else:
        start = draw(st.integers(0, size - 1))
        indices = np.arange(start, draw(st.integers(start + 1, size)))
    signed = axis - len(shape) if draw(st.booleans()) else axis

    def function(x: torch.Tensor) -> torch.Tensor:
        return x[(slice(None),) * axis + (torch.from_numpy(np.asarray(indices % size)),)]

    return Case({"x": shape}, function, {"indices": np.asarray(indices, np.int64)}, {"axis": signed})


@st.composite
def gather_nd(draw: st.DrawFn) -> Case:
    grid = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    rest = tuple(draw(shapes(0, 2)))
    count = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    indices = np.stack([rng.integers(-size, size, count) for size in grid], axis=-1)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x[tuple(torch.from_numpy(indices[..., k] % size) for k, size in enumerate(grid))]

    return Case({"x": (*grid, *rest)}, function, {"indices": indices})


@st.composite
def scatter_nd(draw: st.DrawFn) -> Case:
    size, rest = draw(st.integers(1, 5)), tuple(draw(shapes(0, 2)))
    add = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    count = draw(st.integers(1, size))
    rows = rng.integers(0, size, count) if add else rng.permutation(size)[:count]

    def function(x: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        return x.index_put((torch.from_numpy(rows),), updates, accumulate=add)

    return Case(
        {"x": (size, *rest), "updates": (count, *rest)},
        function,
        {"indices": rows[:, None].astype(np.int64)},
        {"reduction": "add" if add else "none"},
        operands=("x", "indices", "updates"),
    )


@st.composite
def triangle(draw: st.DrawFn) -> Case:
    shape = ("N", draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    upper, diagonal = draw(st.booleans()), draw(st.integers(-2, 2))
    function = torch.triu if upper else torch.tril
    return Case({"x": shape}, lambda x: function(x, diagonal), {"k": np.array(diagonal)}, {"upper": int(upper)})


@st.composite
def cumulative_sum(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 3))
    axis = draw(st.integers(1, len(shape) - 1))
    reverse, exclusive = draw(st.booleans()), draw(st.booleans())

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.flip(axis).cumsum(axis) if reverse else x.cumsum(axis)
        y = y.flip(axis) if reverse else y
        return y - x if exclusive else y

    attributes = {"reverse": int(reverse), "exclusive": int(exclusive)}
    return Case({"x": shape}, function, {"axis": np.array(axis)}, attributes)


TORCH_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@st.composite
def pad(draw: st.DrawFn) -> Case:
    """Two spatial axes; zeros may also be cut off (negative widths)."""
    mode = draw(st.sampled_from(sorted(TORCH_MODES)))
    height, width = draw(st.integers(3, 9)), draw(st.integers(3, 9))
    least = -1 if mode == "constant" else 0
    top, left, bottom, right = (draw(st.integers(least, 2)) for _ in range(4))

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (left, right, top, bottom), mode=TORCH_MODES[mode])

    constants: dict[str, Any] = {"pads": ints(0, 0, top, left, 0, 0, bottom, right)}
    operands: tuple[str, ...] = ("x", "pads")
    if draw(st.booleans()):
        constants = {"pads": ints(top, left, bottom, right), "axes": ints(2, -1)}
        operands = ("x", "pads", "", "axes")
    return Case({"x": ("N", 2, height, width)}, function, constants, {"mode": mode}, operands, opset=19)


FIXED: dict[str, list[Case]] = {
    "Slice": [
        Case({"x": ("N", 5)}, lambda x: x[:, 1:3], {"starts": ints(0, 1), "ends": ints(2**62, 3)}),
    ],
    "Gather": [
        Case(
            {"table": (5, 3)},
            lambda table: table[torch.tensor([[0, 4], [4, 4]])],
            {"indices": ints(0, 4, 4, 4).reshape(2, 2)},
        ),
    ],
    "Pad": [
        Case(
            {"x": ("N", 5, 3)},
            lambda x: F.pad(x.transpose(1, 2), (2, 1), mode="reflect").transpose(1, 2),
            {"pads": ints(0, 2, 0, 0, 1, 0)},
            {"mode": "reflect"},
        ),
        Case(
            {"x": ("N", 5, 1, 1)},
            lambda x: torch.cat([x[:, 1:2], x, x[:, 3:4]], 1),
            {"pads": ints(0, 1, 0, 0, 0, 1, 0, 0)},
            {"mode": "reflect"},
        ),
    ],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "Slice": slices(),
    "Gather": gather(),
    "GatherND": gather_nd(),
    "ScatterND": scatter_nd(),
    "Trilu": triangle(),
    "CumSum": cumulative_sum(),
    "Pad": pad(),
}
