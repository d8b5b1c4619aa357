"""Resizing of maps `[N, C, positions...]`."""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lance_host.autodiff.emit import Emit, dims, static_dims
from lance_host.autodiff.rules.common import Thunk, operand, optional, rank_of, result, scale_by, unsupported
from lance_host.autodiff.rules.linear_map import Matrix, adjoint, responses


def resize(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Nearest, linear and cubic interpolation, each a linear map along each axis."""
    x, y = operand(node, 0), result(node)
    samples_and_channels = zip(dims(x)[:2], dims(y)[:2], strict=True)
    if any(before != after for before, after in samples_and_channels if isinstance(after, int)):
        raise unsupported(node, "Resize of batch or channels is not supported")

    def dx() -> ir.Value:
        sizes = list(zip(static_dims(x, start=2), static_dims(y, start=2), strict=True))
        maps = {2 + axis: _weights_along(node, 2 + axis, *size) for axis, size in enumerate(sizes)}
        factors = [out // size for size, out in sizes]
        if all(_is_block_copy(maps[2 + axis], factor) for axis, factor in enumerate(factors)):
            means = emit("AveragePool", dy, kernel_shape=factors, strides=factors)
            return scale_by(emit, means, float(math.prod(factors)))
        changed = {axis: matrix for axis, matrix in maps.items() if not _is_block_copy(matrix, 1)}
        return adjoint(emit, dy, x, changed)

    return (dx,)


def _is_block_copy(matrix: Matrix, factor: int) -> bool:
    return np.array_equal(matrix, np.repeat(np.eye(len(matrix)), max(factor, 1), axis=1))


def _weights_along(node: ir.Node, axis: int, size: int, out: int) -> Matrix:
    """The weights along one axis, `[in, out]`."""
    rank = rank_of(operand(node, 0))
    shape = [size, *(size if a == axis else 1 for a in range(1, rank))]
    unit = np.eye(size, dtype=np.float32).reshape(shape)
    scales = optional(node, 2)
    given = ir.convenience.get_const_tensor(scales) if scales is not None else None
    attributes = {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name not in ("axes", "keep_aspect_ratio_policy")
    }
    if given is not None and given.size:
        axes = node.attributes.get_ints("axes", tuple(range(rank)))
        factor = (
            given.numpy()[[a % rank for a in axes].index(axis)] if axis in [a % rank for a in axes] else 1.0
        )
        factors = np.array([factor if a == axis else 1.0 for a in range(rank)], np.float32)
        return responses(node, [unit, None, factors], attributes)
    sizes = np.array([size, *(out if a == axis else 1 for a in range(1, rank))], np.int64)
    return responses(node, [unit, None, None, sizes], attributes)
