"""Pooling of maps `[N, C, positions...]`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit, static_dims
from lance_host.autodiff.rules.common import (
    Thunk,
    operand,
    rank_of,
    reshaped_like,
    result,
    scale_by,
)
from lance_host.autodiff.rules.linear_map import Matrix, adjoint, responses
from lance_host.autodiff.rules.reduction import repeat, share


def global_average_pool(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """The mean over all positions."""
    x = operand(node, 0)
    size = static_dims(x, start=2)
    return (lambda: repeat(emit, scale_by(emit, dy, 1 / math.prod(size)), x, range(2, 2 + len(size))),)


def global_max_pool(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """The largest of all positions; values that are equal share the gradient."""
    x = operand(node, 0)
    return (lambda: share(emit, x, result(node), dy, range(2, rank_of(x))),)


# --- windows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The windows of a pooling operator along each spatial axis; `pads` is all begins, then all ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]

    @property
    def tile(self) -> bool:
        """Whether they lie side by side, whole, from the first position on."""
        reach = tuple(size * stride for size, stride in zip(self.out_size, self.strides, strict=True))
        return (
            self.kernel == self.strides
            and not any(self.pads)
            and set(self.dilations) == {1}
            and all(end <= size for end, size in zip(reach, self.in_size, strict=True))
        )

    @property
    def apart(self) -> bool:
        """Whether no two of them share a position."""
        return set(self.dilations) == {1} and all(
            k <= s for k, s in zip(self.kernel, self.strides, strict=True)
        )

    @property
    def slide(self) -> bool:
        """Whether there is one for each position."""
        return set(self.strides) == set(self.dilations) == {1}


def windows(node: ir.Node) -> Windows:
    """The windows of a pooling node.

    Raises:
        ModelError: if its sizes are not known, or padding is to be derived from them.
    """
    get = node.attributes.get_ints
    in_size = static_dims(operand(node, 0), start=2)
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise ModelError(f"{node.name}: auto_pad is not supported; export with explicit pads")
    ones, zeros = (1,) * len(in_size), (0,) * (2 * len(in_size))
    return Windows(
        kernel=tuple(get("kernel_shape", ones)),
        strides=tuple(get("strides", ones)),
        pads=tuple(get("pads", zeros)),
        dilations=tuple(get("dilations", ones)),
        in_size=in_size,
        out_size=static_dims(result(node), start=2),
    )


# --- average pooling ----------------------------------------------------------------------------------


def average_pool(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Each window's gradient, divided among its positions."""
    x, shape = operand(node, 0), windows(node)

    def dx() -> ir.Value:
        if shape.tile:
            return _spread_tiles(emit, dy, shape)
        axes = range(2, 2 + len(shape.kernel))
        maps = {axis: _average_along(node, axis, shape) for axis in axes}
        if shape.slide:
            return _average_again(emit, dy, shape, [maps[axis] for axis in axes])
        return adjoint(emit, dy, x, maps)

    return (dx,)


def _spread_tiles(emit: Emit, dy: ir.Value, shape: Windows) -> ir.Value:
    """Repeat into blocks; nobody reads what lies behind the last window."""
    scales = emit.constant(np.array([1, 1, *shape.kernel], np.float32))
    spread = emit(
        "Resize",
        scale_by(emit, dy, 1 / math.prod(shape.kernel)),
        None,
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    unread = [i - o * k for i, o, k in zip(shape.in_size, shape.out_size, shape.kernel, strict=True)]
    return emit.pad(spread, [0] * (2 + len(unread)), [0, 0, *unread])


def _average_along(node: ir.Node, axis: int, shape: Windows) -> Matrix:
    """The weights along one axis, `[in, out]`."""
    rank, spatial = 2 + len(shape.kernel), axis - 2

    def alone(values: Sequence[int], neutral: int) -> list[int]:
        return [value if index == spatial else neutral for index, value in enumerate(values)]

    half = len(shape.kernel)
    attributes: dict[str, int | list[int]] = {
        "kernel_shape": alone(shape.kernel, 1),
        "strides": alone(shape.strides, 1),
        "pads": [*alone(shape.pads[:half], 0), *alone(shape.pads[half:], 0)],
    }
    for name in ("ceil_mode", "count_include_pad"):
        attributes[name] = node.attributes.get_int(name, 0)
    if set(shape.dilations) != {1}:
        attributes["dilations"] = alone(shape.dilations, 1)
    size = shape.in_size[spatial]
    unit = np.eye(size, dtype=np.float32).reshape([size, *(size if a == axis else 1 for a in range(1, rank))])
    return responses(node, [unit], attributes)


def _average_again(emit: Emit, dy: ir.Value, shape: Windows, maps: Sequence[Matrix]) -> ir.Value:
    """With stride 1 a position is in as many windows as a window has positions: pool the gradient.

    The pool below divides by the whole kernel, so what a window at the border was divided by (its weights'
    largest entries) comes first.
    """
    kernel = math.prod(shape.kernel)
    weight = maps[0].max(0)  # [out]
    for matrix in maps[1:]:
        weight = np.multiply.outer(weight, matrix.max(0))
    corrected = emit("Mul", dy, emit.constant((weight * kernel).astype(np.float32)))
    if np.allclose(weight * kernel, 1.0):
        corrected = dy
    mirrored = [k - 1 - pad for k, pad in zip(shape.kernel * 2, shape.pads, strict=True)]
    return emit(
        "AveragePool", corrected, kernel_shape=shape.kernel, pads=mirrored, count_include_pad=1, ceil_mode=0
    )


# --- max pooling --------------------------------------------------------------------------------------


def max_pool(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """The gradient goes to the position that was chosen: forward is made to say which.

    Comparing with the maximum instead would give it to all of several equal values, and the same patch
    twice in an image makes exactly equal values.
    """
    x, shape = operand(node, 0), windows(node)
    positions = math.prod(static_dims(x, start=1))
    if node.attributes.get_int("storage_order", 0):
        raise ModelError(f"{node.name}: storage_order 1 is not supported; export with storage_order 0")

    def dx() -> ir.Value:
        # Not MaxUnpool: boards refuse it, for it writes wherever its indices say.
        chosen = emit("Cast", _indices(node), to=int(ir.DataType.INT32))  # half the bytes, if it is saved
        batch = emit("Shape", dy, start=0, end=1)
        zeros = emit("ConstantOfShape", emit("Mul", batch, emit.constant([positions])))  # [N C P]
        reduction = "none" if shape.apart else "add"
        values = emit.reshape(dy, -1)
        flat = emit("ScatterElements", zeros, emit.reshape(chosen, -1), values, reduction=reduction)
        return reshaped_like(emit, flat, x)

    return (dx,)


def _indices(node: ir.Node) -> ir.Value:
    """The position of each maximum in the flattened input, as a second output of the forward node."""
    if len(node.outputs) < 2:
        node.resize_outputs(2)
        node.outputs[1].name = f"{result(node).name}/indices"
    return node.outputs[1]
