"""Pooling and resizing."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume
from hypothesis import strategies as st
from onnx import helper

from rule_cases.case import Case, ints

AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def sizes(draw: st.DrawFn, rank: int, low: int, high: int) -> list[int]:
    return [draw(st.integers(low, high)) for _ in range(rank)]


@st.composite
def average_pool(draw: st.DrawFn) -> Case:
    """Padding as PyTorch has it: symmetric, at most half the kernel."""
    rank = draw(st.integers(1, 2))
    kernel = sizes(draw, rank, 1, 3)
    stride = draw(st.sampled_from([kernel, [1] * rank, [2] * rank]))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    size = [k + draw(st.integers(0, 6)) for k in kernel]
    include = draw(st.booleans())

    def function(x: torch.Tensor) -> torch.Tensor:
        return AVERAGE[rank](x, kernel, stride, padding, count_include_pad=include)

    return Case(
        {"x": ("N", 2, *size)},
        function,
        attributes={
            "kernel_shape": kernel,
            "strides": stride,
            "pads": [*padding, *padding],
            "count_include_pad": int(include),
        },
    )


@st.composite
def max_pool(draw: st.DrawFn) -> Case:
    """With many equal values: PyTorch and the runtime both choose the first."""
    rank = draw(st.integers(1, 2))
    kernel = sizes(draw, rank, 1, 3)
    stride = draw(st.sampled_from([kernel, [1] * rank, [2] * rank]))
    dilation = draw(st.sampled_from([[1] * rank, [2] * rank]))
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    size = [d * (k - 1) + 1 + draw(st.integers(0, 6)) for d, k in zip(dilation, kernel, strict=True)]

    def function(x: torch.Tensor) -> torch.Tensor:
        return MAXIMUM[rank](x, kernel, stride, padding, dilation)

    return Case(
        {"x": ("N", 2, *size)},
        function,
        attributes={
            "kernel_shape": kernel,
            "strides": stride,
            "pads": [*padding, *padding],
            "dilations": dilation,
        },
        rounded=("x",) if draw(st.booleans()) else (),
    )


@st.composite
def global_pool(draw: st.DrawFn, function: Any) -> Case:
    rank = draw(st.integers(1, 3))
    shape = ("N", draw(st.integers(1, 3)), *sizes(draw, rank, 1, 4))
    return Case({"x": shape}, lambda x: function(x, tuple(range(2, 2 + rank)), keepdim=True))


MODES: dict[str, dict[str, str | float]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "linear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "corners": {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    "cubic": {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
}


def resize(kind: str, size: list[int], target: list[int], by_scales: bool) -> Case:
    """As `torch.onnx` writes it: by scales, or by sizes of which the batch is computed."""
    rank = len(size)
    name = {"corners": "linear", "cubic": "bicubic"}.get(kind, kind)
    name = {("linear", 2): "bilinear"}.get((name, rank), name)
    corners = None if kind == "nearest" else kind == "corners"

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, target, mode=name, align_corners=corners)

    scales = np.array([1, 1, *(t / s for t, s in zip(target, size, strict=True))], np.float32)
    if by_scales:
        return Case({"x": ("N", 2, *size)}, function, {"scales": scales}, MODES[kind], ("x", "", "scales"))
    return Case(
        {"x": ("N", 2, *size)},
        function,
        {"target": ints(*target)},
        MODES[kind],
        ("x", "", "", "sizes"),
        before=(
            helper.make_node("Shape", ["x"], ["batch_and_channels"], start=0, end=2),
            helper.make_node("Concat", ["batch_and_channels", "target"], ["sizes"], axis=0),
        ),
    )


@st.composite
def resizes(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(MODES)))
    rank = 2 if kind == "cubic" else draw(st.integers(1, 2))
    size = sizes(draw, rank, 2, 6)
    if draw(st.booleans()):
        factor = draw(st.integers(1, 3))
        return resize(kind, size, [factor * n for n in size], by_scales=True)
    target = sizes(draw, rank, 2, 9)
    assume(target != size)
    return resize(kind, size, target, by_scales=False)


def average(size: list[int], **attributes: Any) -> Case:
    def function(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            x,
            attributes["kernel_shape"],
            attributes.get("strides", 1),
            attributes.get("pads", [0, 0])[:2],
            bool(attributes.get("ceil_mode", 0)),
            bool(attributes.get("count_include_pad", 0)),
        )

    return Case({"x": ("N", 3, *size)}, function, attributes=attributes)


FIXED: dict[str, list[Case]] = {
    "AveragePool": [
        average([6, 8], kernel_shape=[2, 4], strides=[2, 4]),  # tiles
        average([7, 9], kernel_shape=[2, 4], strides=[2, 4]),  # and a rest that no window reads
        average([7, 6], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),  # one window for each position
        average([7, 6], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        average([12, 13], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0]),  # a map too large for pairs
        average([7, 8], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        Case(
            {"x": ("N", 1, 7, 8)},
            lambda x: F.conv2d(x, torch.full((1, 1, 2, 3), 1 / 6, dtype=x.dtype), stride=2, dilation=(2, 1)),
            attributes={"kernel_shape": [2, 3], "strides": [2, 2], "dilations": [2, 1]},
            opset=19,
        ),
        Case(
            {"x": ("N", 2, 5, 6)},
            lambda x: F.avg_pool2d(F.pad(x, (0, 1, 1, 0)), 2),
            attributes={
                "kernel_shape": [2, 2],
                "strides": [2, 2],
                "pads": [1, 0, 0, 1],
                "count_include_pad": 1,
            },
        ),
    ],
    "MaxPool": [
        Case(
            {"x": ("N", 2, 6, 4)},
            lambda x: F.max_pool2d(x, 2),
            attributes={"kernel_shape": [2, 2], "strides": [2, 2]},
        ),
        Case(
            {"x": ("N", 2, 7, 6)},
            lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
            attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        ),
    ],
    "Resize": [
        resize("nearest", [3, 4], [6, 8], by_scales=True),
        resize("nearest", [3, 4], [6, 8], by_scales=False),
        resize("nearest", [6, 8], [3, 4], by_scales=True),
        resize("linear", [12, 13], [24, 26], by_scales=True),  # a map too large for pairs
        resize("linear", [4, 5], [4, 10], by_scales=True),  # one axis alone
    ],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "GlobalAveragePool": global_pool(torch.mean),
    "GlobalMaxPool": global_pool(torch.amax),
    "AveragePool": average_pool(),
    "MaxPool": max_pool(),
    "Resize": resizes(),
}
