"""Padding: its own operator, and that of convolutions and pools."""

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812

from lance_host.sources.onnx_ops.op import Op, Tensor, Tensors

MODES = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}  # ONNX -> PyTorch


def pad(op: Op, x: Tensors) -> Tensor:
    """A number, the edge or a reflection around all axes, or around some."""
    name = op.get("mode", "constant")
    if name not in MODES:
        raise op.refuse(f"mode {name} is not supported; use {', '.join(MODES)}")
    pads, rank, axes = op.integers(1) or [], x[0].ndim, op.integers(3)
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes or range(rank)):
        before[axis], after[axis] = pads[place], pads[place + len(pads) // 2]
    widths = [width for axis in reversed(range(rank)) for width in (before[axis], after[axis])]
    while widths and widths[-2:] == [0, 0]:
        widths = widths[:-2]  # PyTorch's other modes take the last dimensions only
    return F.pad(x[0], widths, MODES[name], op.number(2) if name == "constant" else None)


def explicit_pads(
    op: Op, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The padding of a convolution or pool before and behind each dimension, `auto_pad` worked out."""
    mode, rank = op.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", ""):
        return list(op.get("pads", [0] * 2 * rank))
    before, behind = [], []
    for length, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-length // s) - 1) * s + d * (k - 1) + 1 - length, 0) if mode.startswith("SAME") else 0
        small, large = total // 2, total - total // 2
        before.append(small if mode != "SAME_LOWER" else large)
        behind.append(large if mode != "SAME_LOWER" else small)
    return before + behind


def pad_widths(pads: Sequence[int]) -> list[int]:
    """ONNX pads (all begins, all ends) as PyTorch wants them (last dimension first, begin and end)."""
    half = len(pads) // 2
    return [width for axis in reversed(range(half)) for width in (pads[axis], pads[axis + half])]
