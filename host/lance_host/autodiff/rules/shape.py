"""Operators that move values and change none: the gradient is moved back."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lance_host.autodiff.emit import Emit, dims, static_dim, static_dims
from lance_host.autodiff.rules.common import (
    Thunk,
    constant_of,
    operand,
    rank_of,
    reshaped_like,
    result,
    sum_to,
)


def reshape(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Reshape, Flatten, Squeeze, Unsqueeze: give the gradient the input's shape back."""
    return (lambda: reshaped_like(emit, dy, operand(node, 0)),)


def transpose(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """The inverse permutation."""
    rank = rank_of(operand(node, 0))
    perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
    return (lambda: emit.transpose(dy, *(int(i) for i in np.argsort(perm))),)


def concat(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Each input's part of the gradient."""
    axis = node.attributes.get_int("axis", 0) % rank_of(result(node))
    sizes = [static_dim(operand(node, i), axis) for i in range(len(node.inputs))]
    edges = np.cumsum([0, *sizes])

    def part(index: int) -> Thunk:
        start, stop = int(edges[index]), int(edges[index + 1])
        return lambda: emit("Slice", dy, emit.constant([start]), emit.constant([stop]), emit.constant([axis]))

    return [part(index) for index in range(len(sizes))]


def split(emit: Emit, node: ir.Node, dys: Sequence[ir.Value | None]) -> Sequence[Thunk]:
    """The gradients of the parts side by side; a part without one is zeros around its neighbours."""
    rank = rank_of(operand(node, 0))
    axis = node.attributes.get_int("axis", 0) % rank
    sizes = [static_dim(part, axis) for part in node.outputs]

    def widened(dy: ir.Value, before: int, after: int) -> ir.Value:
        zeros = [0] * rank
        return emit.pad(
            dy, [*zeros[:axis], before, *zeros[axis + 1 :]], [*zeros[:axis], after, *zeros[axis + 1 :]]
        )

    def dx() -> ir.Value:
        present = [index for index, dy in enumerate(dys) if dy is not None]
        parts = []
        for number, index in enumerate(present):
            previous = present[number - 1] + 1 if number else 0
            before = sum(sizes[previous:index])
            after = sum(sizes[index + 1 :]) if index == present[-1] else 0
            dy = dys[index]
            assert dy is not None
            parts.append(widened(dy, before, after))
        return parts[0] if len(parts) == 1 else emit("Concat", *parts, axis=axis)

    return (dx,)


def expand(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Sum over what was repeated."""
    return (lambda: sum_to(emit, dy, result(node), operand(node, 0)),)


def tile(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """`[r d] -> [r, d]`, then sum over the copies."""
    x = operand(node, 0)
    repeats = [int(count) for count in constant_of(operand(node, 1))]

    def dx() -> ir.Value:
        shape: list[int] = []
        copies = []
        for size, count in zip(dims(x), repeats, strict=True):
            if count > 1:
                copies.append(len(shape))
                shape.append(count)
            shape.append(size if isinstance(size, int) else -1)
        return emit.sum(emit.reshape(dy, *shape), *copies) if copies else dy

    return (dx,)


def depth_to_space(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """`[b, b, c]` (DCR) or `[c, b, b]` (CRD) channels become blocks of b x b positions; and back."""
    block = node.attributes.get_int("blocksize", 1)
    channels, height, width = static_dims(operand(node, 0), start=1)

    def dx() -> ir.Value:
        if node.attributes.get_string("mode", "DCR") == "DCR":
            return emit("SpaceToDepth", dy, blocksize=block)
        blocks = emit.reshape(dy, 0, channels // block**2, height, block, width, block)
        return emit.reshape(emit.transpose(blocks, 0, 1, 3, 5, 2, 4), 0, channels, height, width)

    return (dx,)


def space_to_depth(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """The inverse."""
    return (lambda: emit("DepthToSpace", dy, blocksize=node.attributes.get_int("blocksize", 1)),)
