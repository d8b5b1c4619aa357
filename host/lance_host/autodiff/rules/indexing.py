"""Operators that pick values by position: the gradient goes back to where they were picked."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lance_host.autodiff.emit import Emit, dims, static_dim, static_dims
from lance_host.autodiff.rules.common import (
    Thunk,
    constant_of,
    operand,
    optional,
    rank_of,
    reshaped_like,
    result,
    unsupported,
)
from lance_host.autodiff.rules.linear_map import adjoint, responses

WHOLE = 2**31 - 1  # exporters write this, or more, for the end of a slice that takes everything


def put_back(emit: Emit, dy: ir.Value, axis: int, rank: int, picked: NDArray[np.int64], size: int) -> ir.Value:
    """The adjoint of picking the positions `picked` of an axis with `size` positions.

    A run of positions is padded with zeros; anything else is gathered from where it was put, zeros from a
    row of zeros, and summed where a position was picked more than once.
    """
    if np.array_equal(picked, np.arange(len(picked)) + picked[0]):
        first = int(picked[0])
        return emit.pad(dy, _on_axis(axis, rank, first), _on_axis(axis, rank, size - first - len(picked)))
    where_put = [np.flatnonzero(picked == position) for position in range(size)]
    most = max(len(found) for found in where_put)
    table = np.full((size, most), len(picked), np.int64)
    for position, found in enumerate(where_put):
        table[position, : len(found)] = found
    if (table == len(picked)).any():
        dy = emit.pad(dy, [0] * rank, _on_axis(axis, rank, 1))
    if most == 1:
        return emit("Gather", dy, emit.constant(table[:, 0].copy()), axis=axis)
    return emit.sum(emit("Gather", dy, emit.constant(table), axis=axis), axis + 1)


def _on_axis(axis: int, rank: int, number: int) -> list[int]:
    return [number if index == axis else 0 for index in range(rank)]


# --- slices -----------------------------------------------------------------------------------------------


def slice_(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Zeros where nothing was taken."""
    rank = rank_of(operand(node, 0))

    def dx() -> ir.Value:
        gradient, before, after = dy, [0] * rank, [0] * rank
        for axis, picked, size in _slices(node):
            if np.array_equal(picked, np.arange(len(picked)) + picked[0]):  # all runs of positions in one Pad
                before[axis], after[axis] = int(picked[0]), size - int(picked[0]) - len(picked)
            else:
                gradient = put_back(emit, gradient, axis, rank, picked, size)
        return emit.pad(gradient, before, after)

    return (dx,)


def _slices(node: ir.Node) -> list[tuple[int, NDArray[np.int64], int]]:
    """Axis, positions taken and size, for each axis that is not the batch."""
    x, y = operand(node, 0), result(node)
    starts, ends = (constant_of(operand(node, index)).ravel() for index in (1, 2))
    axes = constant_of(optional(node, 3), np.arange(len(starts))).ravel() % rank_of(x)
    steps = constant_of(optional(node, 4), np.ones_like(starts)).ravel()
    found = []
    for axis, start, end, step in zip(
        axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True
    ):
        size = dims(x)[axis]
        if isinstance(size, int):
            picked = np.arange(size)[slice(start, end, step)]
            found.append((axis, picked, size))
        elif step != 1 or start != 0 or (end < WHOLE and dims(y)[axis] != size):
            raise unsupported(node, "a slice of the batch cannot be trained")
    return found


# --- gathering ----------------------------------------------------------------------------------------


def gather(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Picks along one axis; with computed indices only rows of a table (an embedding)."""
    x, indices = operand(node, 0), operand(node, 1)
    shape = dims(x)
    axis = node.attributes.get_int("axis", 0) % len(shape)

    def dx() -> ir.Value:
        if ir.convenience.get_const_tensor(indices) is None:
            return _add_rows(emit, node, dy)
        size = static_dim(x, axis)
        picked = constant_of(indices) % size
        rows = emit.reshape(dy, *_open(shape[:axis]), picked.size, *_open(shape[axis + 1 :]))
        return put_back(emit, rows, axis, len(shape), picked.ravel(), size)

    return (dx,)


def _open(shape: Sequence[int | str]) -> list[int]:
    """Dimensions for a Reshape; the batch's is inferred."""
    return [dim if isinstance(dim, int) else -1 for dim in shape]


def _add_rows(emit: Emit, node: ir.Node, dy: ir.Value) -> ir.Value:
    if node.attributes.get_int("axis", 0) != 0:
        raise unsupported(node, "a Gather with computed indices is supported for rows of a table only")
    table = emit.constant(np.zeros(static_dims(operand(node, 0)), np.float32))
    indices = emit("Unsqueeze", operand(node, 1), emit.constant([-1]))
    return emit("ScatterND", table, indices, dy, reduction="add")


def gather_nd(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Picks by constant coordinates of the first axes, `[..., k] -> [...]`: one axis of all their positions."""
    x = operand(node, 0)

    def dx() -> ir.Value:
        picked, grid = _flat_coordinates(node)
        rest = dims(x)[len(grid) :]
        rows = emit.reshape(dy, picked.size, *_open(rest))
        size = int(np.prod(grid))
        return reshaped_like(emit, put_back(emit, rows, 0, 1 + len(rest), picked, size), x)

    return (dx,)


def _flat_coordinates(node: ir.Node) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The position of each picked entry in the flattened first axes, and the sizes of these."""
    indices = constant_of(operand(node, 1))
    depth = indices.shape[-1]
    grid = tuple(dim for dim in dims(operand(node, 0))[:depth] if isinstance(dim, int))
    if len(grid) != depth or node.attributes.get_int("batch_dims", 0):
        raise unsupported(node, "GatherND over the batch is not supported")
    coordinates = indices.reshape(-1, depth).T % np.array(grid)[:, None]
    return np.ravel_multi_index(tuple(coordinates), grid).astype(np.int64), grid


def scatter_nd(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """y = x with `updates` written (or added) at some places."""
    indices = operand(node, 1)
    reduction = node.attributes.get_string("reduction", "none")
    if reduction not in ("none", "add"):
        raise unsupported(node, f"ScatterND with the reduction {reduction} is not supported")

    def of_updates() -> ir.Value:
        return emit("GatherND", dy, indices)

    def dx() -> ir.Value:
        if reduction == "add":
            return dy
        written = of_updates()
        return emit("ScatterND", dy, indices, emit("Sub", written, written))

    return dx, dx, of_updates


def triangle(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Trilu: the same triangle of the gradient."""
    diagonal = optional(node, 1)
    return (lambda: emit("Trilu", dy, diagonal, upper=node.attributes.get_int("upper", 1)),)


def cumulative_sum(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """The same from the other end."""
    get = node.attributes.get_int

    def dx() -> ir.Value:
        reverse = 1 - get("reverse", 0)
        return emit("CumSum", dy, operand(node, 1), reverse=reverse, exclusive=get("exclusive", 0))

    return (dx,)


# --- padding ------------------------------------------------------------------------------------------


def pad(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Zeros are cut off again; what repeats the border or mirrors it is summed by its linear map."""
    x, rank = operand(node, 0), rank_of(operand(node, 0))
    axes = constant_of(optional(node, 3), np.arange(rank)).ravel() % rank
    before, after = constant_of(operand(node, 1)).reshape(2, -1)
    widths = {int(axis): (int(b), int(a)) for axis, b, a in zip(axes, before, after, strict=True)}
    mode = node.attributes.get_string("mode", "constant")

    def crop() -> ir.Value:
        pairs = [widths.get(axis, (0, 0)) for axis in range(rank)]
        return emit.pad(dy, [-b for b, _ in pairs], [-a for _, a in pairs])

    def fold() -> ir.Value:
        maps = {}
        for axis, width in widths.items():
            if any(width):
                size = static_dim(x, axis)
                unit = np.eye(size, dtype=np.float32)
                maps[axis] = responses(node, [unit, np.array([0, width[0], 0, width[1]])], {"mode": mode})
        return adjoint(emit, dy, x, maps)

    return (crop if mode == "constant" else fold,)
