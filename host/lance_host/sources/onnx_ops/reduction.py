"""Reductions over axes, and pooling."""

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812

from lance_host.sources.onnx_ops.op import Op, Rule, Tensor, Tensors
from lance_host.sources.onnx_ops.padding import explicit_pads, pad_widths

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _axes(op: Op, x: Tensor) -> list[int]:
    axes = op.integers(1) or []
    return axes if axes or op.get("noop_with_empty_axes", 0) else list(range(x.ndim))


def reduce(function: Callable[..., Tensor]) -> Rule:
    """A function of tensor, axes and whether they stay; over no axes, of each value by itself."""

    def reduced(op: Op, x: Tensors) -> Tensor:
        axes = _axes(op, x[0])
        if not axes:  # PyTorch takes no axes for all
            return function(x[0][None], dim=[0], keepdim=False)
        return function(x[0], dim=axes, keepdim=bool(op.get("keepdims", 1)))

    return reduced


def sum_square(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    """Sum of squares."""
    return x.square().sum(dim, keepdim)


def pool(kind: str) -> Rule:
    """`max` or `average`."""

    def pooled(op: Op, x: Tensors) -> Tensor:
        kernel = list(op.get("kernel_shape", ()))
        stride, ceil = list(op.get("strides", [1] * len(kernel))), bool(op.get("ceil_mode", 0))
        pads = explicit_pads(op, x[0].shape[2:], kernel, stride, [1] * len(kernel))
        half = len(pads) // 2
        if pads[:half] != pads[half:]:
            fill = float("-inf") if kind == "max" else 0.0
            if kind == "average" and not op.get("count_include_pad", 0):
                raise op.refuse("uneven padding that is not counted; pad evenly")
            x, pads = [F.pad(x[0], pad_widths(pads), value=fill)], [0] * len(pads)
        if kind == "max":
            dilation = list(op.get("dilations", [1] * len(kernel)))
            return MAX_POOL[len(kernel)](x[0], kernel, stride, pads[:half], dilation, ceil)
        counted = bool(op.get("count_include_pad", 0))
        return AVERAGE_POOL[len(kernel)](x[0], kernel, stride, pads[:half], ceil, counted)

    return pooled


def global_pool(function: Callable[..., Tensor]) -> Rule:
    """Over all positions, which stay as one."""
    return lambda op, x: function(x[0], dim=list(range(2, x[0].ndim)), keepdim=True)
