"""Products and norms; with constant weights most of them are layers (`onnx_layers.py`)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from lance_host.sources.onnx_ops.op import Op, Rule, Tensor, Tensors
from lance_host.sources.onnx_ops.padding import explicit_pads, pad_widths

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(op: Op, x: Tensors) -> Tensor:
    """Of any rank, with a weight that may be computed."""
    kernel = x[1].shape[2:]
    stride, dilation = (list(op.get(name, [1] * len(kernel))) for name in ("strides", "dilations"))
    pads = explicit_pads(op, x[0].shape[2:], kernel, stride, dilation)
    bias = x[2] if len(x) > 2 else None
    padded = F.pad(x[0], pad_widths(pads))
    return CONV[len(kernel)](padded, x[1], bias, stride, 0, dilation, op.get("group", 1))


def conv_transpose(op: Op, x: Tensors) -> Tensor:
    """Explicit pads crop the result."""
    if op.get("auto_pad", "NOTSET") != "NOTSET" or op.get("output_shape", None):
        raise op.refuse("auto_pad and output_shape are not supported; export with explicit pads")
    rank = x[1].ndim - 2
    stride, dilation = (list(op.get(name, [1] * rank)) for name in ("strides", "dilations"))
    more, bias = list(op.get("output_padding", [0] * rank)), x[2] if len(x) > 2 else None
    y = CONV_TRANSPOSE[rank](x[0], x[1], bias, stride, 0, more, op.get("group", 1), dilation)
    return F.pad(y, [-width for width in pad_widths(list(op.get("pads", [0] * 2 * rank)))])


def gemm(op: Op, x: Tensors) -> Tensor:
    """alpha A' B' + beta C."""
    a = x[0].transpose(0, 1) if op.get("transA", 0) else x[0]
    b = x[1].transpose(0, 1) if op.get("transB", 0) else x[1]
    y = a @ b * float(op.get("alpha", 1.0))
    return y + x[2] * float(op.get("beta", 1.0)) if len(x) > 2 else y


def einsum(op: Op, x: Tensors) -> Tensor:
    """The same letters as in PyTorch."""
    return torch.einsum(op.get("equation", ""), *x)


def batch_norm(op: Op, x: Tensors) -> Tensor:
    """As in inference: with the statistics that it is given."""
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=op.get("epsilon", 1e-5))


def layer_norm(op: Op, x: Tensors) -> Tensor:
    """Over the axes from `axis` on."""
    axis = op.get("axis", -1) % x[0].ndim
    return F.layer_norm(x[0], x[0].shape[axis:], x[1], x[2] if len(x) > 2 else None, op.get("epsilon", 1e-5))


def group_norm(op: Op, x: Tensors) -> Tensor:
    """Scale and shift per channel, before opset 21 per group."""
    groups, channels = op.get("num_groups", 1), x[0].shape[1]
    scale, shift = (value.repeat_interleave(channels // len(value)) for value in x[1:])
    return F.group_norm(x[0], groups, scale, shift, op.get("epsilon", 1e-5))


def instance_norm(op: Op, x: Tensors) -> Tensor:
    """Over the positions of each channel."""
    return F.instance_norm(x[0], weight=x[1], bias=x[2], eps=op.get("epsilon", 1e-5))


def softmax(function: Callable[..., Tensor]) -> Rule:
    """Over one axis."""
    return lambda op, x: function(x[0], dim=op.get("axis", -1))
