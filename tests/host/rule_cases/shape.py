"""Operators that move values."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from graph_runner import Array, Shape
from hypothesis import strategies as st
from onnx import helper

from rule_cases.case import Case, broadcast, ints, shapes


def moved(
    shape: Shape, function: Callable[..., torch.Tensor], operand: Array | None = None, **attributes: Any
) -> Case:
    constants = {} if operand is None else {"operand": operand}
    return Case({"x": shape}, function, constants, attributes)


def merged(sizes: list[int], cuts: list[bool]) -> list[int]:
    """Multiply neighbours together unless there is a cut between them."""
    found = [sizes[0]]
    for size, cut in zip(sizes[1:], cuts, strict=True):
        if cut:
            found.append(size)
        else:
            found[-1] *= size
    return found


@st.composite
def reshape(draw: st.DrawFn) -> Case:
    """From one grouping of the same factors to another, the batch alone or with its neighbours."""
    factors = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    cuts = st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1)
    before, after = merged(factors, draw(cuts)), merged(factors, draw(cuts))
    target = [-1, *after] if draw(st.booleans()) else [-1, *after[1:]]
    return moved(("N", *before), lambda x: x.reshape(target), ints(*target))


@st.composite
def flatten(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 4))
    rank = len(shape)
    axis = draw(st.integers(-rank, rank))
    split = axis % rank if axis < rank else rank

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(math.prod(x.shape[:split]), -1)

    return moved(shape, function, axis=axis)


@st.composite
def with_ones(draw: st.DrawFn, squeeze: bool) -> Case:
    """Axes of size 1, removed or inserted, counted from either end."""
    shape = list(draw(shapes(1, 3)))
    rank = len(shape) + 2
    axes = sorted(draw(st.lists(st.integers(0, rank - 1), min_size=2, max_size=2, unique=True)))
    wide = list(shape)
    for axis in axes:
        wide.insert(axis, 1)
    signed = [axis - rank if draw(st.booleans()) else axis for axis in axes]
    if squeeze:
        return moved(tuple(wide), lambda x: x.squeeze(axes), ints(*signed))
    return moved(tuple(shape), lambda x: x.unsqueeze(axes[0]).unsqueeze(axes[1]), ints(*signed))


@st.composite
def transpose(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 4))
    perm = draw(st.permutations(range(len(shape))))
    return moved(shape, lambda x: x.permute(perm), perm=perm)


@st.composite
def concat(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(1, len(shape) - 1))
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    inputs = {name: (*shape[:axis], draw(st.integers(1, 3)), *shape[axis + 1 :]) for name in names}
    signed = axis - len(shape) if draw(st.booleans()) else axis
    return Case(inputs, lambda *parts: torch.cat(parts, axis), attributes={"axis": signed})


@st.composite
def split(draw: st.DrawFn) -> Case:
    """Some of the parts, in another order, are all that is used of them."""
    shape = list(draw(shapes(2, 4)))
    axis = draw(st.integers(1, len(shape) - 1))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    shape[axis] = sum(sizes)
    used = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=len(sizes), unique=True))
    signed = axis - len(shape) if draw(st.booleans()) else axis
    return Case(
        {"x": tuple(shape)},
        lambda x: torch.cat([x.split(sizes, axis)[index] for index in used], axis),
        {"sizes": ints(*sizes)},
        {"axis": signed},
        outputs=tuple(f"part{index}" for index in range(len(sizes))),
        after=(helper.make_node("Concat", [f"part{index}" for index in used], ["y"], axis=signed),),
    )


@st.composite
def expand(draw: st.DrawFn) -> Case:
    """To a constant shape, in which a 1 keeps what is there (the batch)."""
    found = draw(broadcast(2))
    target = [1 if dim == "N" else int(dim) for dim in found[1]]

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.expand(torch.broadcast_shapes(x.shape, tuple(target)))

    return moved(found[0], function, np.array(target, np.int64))


@st.composite
def tile(draw: st.DrawFn) -> Case:
    shape = draw(shapes(1, 4))
    repeats = [draw(st.integers(1, 3)) for _ in shape]
    return moved(shape, lambda x: x.repeat(repeats), ints(*repeats))


@st.composite
def depth_to_space(draw: st.DrawFn) -> Case:
    block, channels, height, width = (draw(st.integers(1, 3)) for _ in range(4))
    mode = draw(st.sampled_from(["DCR", "CRD"]))

    def columns_first(x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(-1, block, block, channels, height, width).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(-1, channels, height * block, width * block)

    function = columns_first if mode == "DCR" else lambda x: torch.pixel_shuffle(x, block)
    return moved(("N", channels * block**2, height, width), function, blocksize=block, mode=mode)


@st.composite
def space_to_depth(draw: st.DrawFn) -> Case:
    block, channels, height, width = (draw(st.integers(1, 3)) for _ in range(4))

    def function(x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(-1, channels, height, block, width, block).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(-1, channels * block**2, height, width)

    return moved(("N", channels, height * block, width * block), function, blocksize=block)


FIXED: dict[str, list[Case]] = {
    "Reshape": [
        moved(("N", 6, 4), lambda x: x.reshape(-1, 4), ints(-1, 4)),
        moved(("N", 6, 4), lambda x: x.reshape(-1, 2, 3, 4), ints(0, 2, -1, 4)),
        moved((2, 6), lambda x: x.reshape(3, 4), ints(3, 4)),
    ],
    "Squeeze": [moved((1, 3, 1), lambda x: x.squeeze())],
    "Transpose": [moved(("N", 3, 4), lambda x: x.permute(2, 1, 0))],
    "Concat": [Case({"a": (2, 3), "b": (4, 3)}, lambda a, b: torch.cat([a, b]), attributes={"axis": 0})],
    "Expand": [
        moved((1, 4), lambda x: x.expand(3, 2, 5, 4), ints(3, 2, 5, 1)),
        Case(
            {"token": (1, 1, 4), "x": ("N", 3, 4)},
            lambda token, x: torch.cat([token.expand(len(x), -1, -1), x], 1),
            {"tail": ints(1, 4)},
            operands=("token", "shape"),
            before=(
                helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
                helper.make_node("Concat", ["batch", "tail"], ["shape"], axis=0),
            ),
            outputs=("tokens",),
            after=(helper.make_node("Concat", ["tokens", "x"], ["y"], axis=1),),
        ),
    ],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "Reshape": reshape(),
    "Flatten": flatten(),
    "Squeeze": with_ones(squeeze=True),
    "Unsqueeze": with_ones(squeeze=False),
    "Transpose": transpose(),
    "Concat": concat(),
    "Split": split(),
    "Expand": expand(),
    "Tile": tile(),
    "DepthToSpace": depth_to_space(),
    "SpaceToDepth": space_to_depth(),
}
