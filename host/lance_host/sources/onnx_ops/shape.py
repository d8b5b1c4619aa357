"""Where values stand: shapes, parts and enlargement.

An operator whose operands besides the first only say the shape of its result reads that shape from `Op.dims`.
"""

import torch
import torch.nn.functional as F  # noqa: N812

from lance_host.sources.onnx_ops.op import Op, Tensor, Tensors

# The shape of their result says all that their other operands do.
SHAPED = frozenset({"Expand", "Reshape", "Resize"})


def reshape(op: Op, x: Tensors) -> Tensor:
    """Reshape and Flatten."""
    if len(op.dims) == 2 and op.dims[0] is None and op.operand_dims[:1] == (None,):
        return x[0].flatten(1)  # without numbers: behind a head they are those of the old classes
    growing = sum(dim is None or dim < 0 for dim in op.dims)
    if growing > 1:
        raise op.refuse("more than one dimension depends on the batch; reshape it once")
    return x[0].reshape([-1 if dim is None else dim for dim in op.dims])


def squeeze(op: Op, x: Tensors) -> Tensor:
    """Without axes: all of size 1 but the batch."""
    axes = op.integers(1)
    return reshape(op, x) if axes is None else x[0].squeeze(tuple(axes))


def unsqueeze(op: Op, x: Tensors) -> Tensor:
    """Axes are those of the result."""
    y, axes = x[0], op.integers(1) or []
    rank = y.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        y = y.unsqueeze(axis)
    return y


def expand(op: Op, x: Tensors) -> Tensor:
    """The last operand is the network's input, which has the batch."""
    return x[0].expand([x[-1].shape[0] if dim is None else dim for dim in op.dims])


def transpose(op: Op, x: Tensors) -> Tensor:
    """By default all axes turn round."""
    return x[0].permute(list(op.get("perm", reversed(range(x[0].ndim)))))


def slice_(op: Op, x: Tensors) -> Tensor:
    """Positions of some axes, forward."""
    starts, ends = op.integers(1) or [], op.integers(2) or []
    axes = op.integers(3) or list(range(len(starts)))
    steps = op.integers(4) or [1] * len(starts)
    if min(steps) < 1:
        raise op.refuse(f"a step of {min(steps)} is not supported; flip by another operator")
    y = x[0]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index = [slice(None)] * y.ndim
        index[axis] = slice(start, min(end, 2**31), step)
        y = y[tuple(index)]
    return y


def split(op: Op, x: Tensors) -> tuple[Tensor, ...]:
    """By sizes, else in equal parts of which the last may be smaller."""
    axis, sizes = op.get("axis", 0), op.integers(1)
    if sizes is not None:
        return torch.split(x[0], sizes, axis)
    return torch.split(x[0], -(-x[0].shape[axis] // op.outputs), axis)


def tile(op: Op, x: Tensors) -> Tensor:
    """Repeats of every axis."""
    return x[0].repeat(op.integers(1) or [])


def depth_to_space(op: Op, x: Tensors) -> Tensor:
    """Blocks of channels to blocks of positions; where a block's channels stand is the mode."""
    b, (n, c, h, w) = op.get("blocksize", 1), x[0].shape
    if op.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x[0], b)
    parts = x[0].reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)  # [N, C / b^2, H, b, W, b]
    return parts.reshape(n, c // b**2, h * b, w * b)


def space_to_depth(op: Op, x: Tensors) -> Tensor:
    """The inverse of mode DCR."""
    b, (n, c, h, w) = op.get("blocksize", 1), x[0].shape
    parts = x[0].reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)  # [N, b, b, C, H / b, W / b]
    return parts.reshape(n, c * b**2, h // b, w // b)


def resize(op: Op, x: Tensors) -> Tensor:
    """What PyTorch's two modes are in ONNX."""
    mode, align = op.get("mode", "nearest"), op.get("coordinate_transformation_mode", "half_pixel")
    size = [dim for dim in op.dims[2:] if dim is not None]
    rounding = op.get("nearest_mode", "round_prefer_floor")
    if mode == "nearest" and (align, rounding) == ("asymmetric", "floor"):
        return F.interpolate(x[0], size, mode="nearest")
    if mode == "linear" and align in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(x[0], size, mode="bilinear", align_corners=align == "align_corners")
    found = f"{mode} with {align}" + (f" and {rounding}" if mode == "nearest" else "")
    raise op.refuse(
        f"{found} is not supported; use nearest with asymmetric and floor, or linear with half_pixel or"
        " align_corners"
    )
