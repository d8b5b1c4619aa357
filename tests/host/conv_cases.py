"""Convolutions of every kind, as ONNX nodes and as PyTorch calls."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import Array, graph_of_nodes
from hypothesis import strategies as st
from onnx import helper


@dataclass(frozen=True)
class ConvCase:
    """`pads` is top, left, bottom, right."""

    channels: int
    out: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.size)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out, self.channels // self.groups, *self.kernel)

    @property
    def out_size(self) -> tuple[int, int]:
        sizes = []
        for axis in (0, 1):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            padded = self.size[axis] + self.pads[axis] + self.pads[axis + 2]
            sizes.append((padded - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def model(self) -> ir.Model:
        """x, w -> y."""
        node = helper.make_node(
            "Conv",
            ["x", "w"],
            ["y"],
            name="conv",
            strides=self.stride,
            pads=self.pads,
            dilations=self.dilation,
            group=self.groups,
        )
        return graph_of_nodes([node], {"x": ("N", *self.input_shape), "w": self.weight_shape}, {})

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        top, left, bottom, right = self.pads
        return F.pad(x, (left, right, top, bottom))

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.padded(x), weight, stride=self.stride, dilation=self.dilation, groups=self.groups)

    def weight_gradient(self, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.nn.grad.conv2d_weight(
            self.padded(x), self.weight_shape, dy, self.stride, 0, self.dilation, self.groups
        )

    def sample(self, rng: np.random.Generator, batch: int) -> dict[str, Array]:
        """Random x, w and dy, float32."""
        shapes = {
            "x": (batch, *self.input_shape),
            "w": self.weight_shape,
            "dy": (batch, self.out, *self.out_size),
        }
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def depthwise(channels: int, size: tuple[int, int], kernel: tuple[int, int], **rest: object) -> ConvCase:
    return ConvCase(channels, channels, size, kernel, groups=channels, **rest)  # type: ignore[arg-type]


CASES: dict[str, ConvCase] = {
    "pointwise": ConvCase(6, 5, (4, 4)),
    "pointwise odd": ConvCase(6, 5, (5, 3)),
    "pointwise one position": ConvCase(6, 5, (1, 1)),
    "pointwise strided": ConvCase(6, 5, (8, 6), stride=(2, 2)),
    "pointwise strided odd": ConvCase(6, 5, (7, 9), stride=(2, 3)),
    "pointwise strided, rest unread": ConvCase(6, 5, (8, 9), stride=(3, 4)),
    "pointwise padded": ConvCase(6, 5, (4, 5), pads=(1, 1, 1, 1)),
    "pointwise grouped": ConvCase(6, 9, (4, 5), groups=3),
    "3x3 same": ConvCase(4, 5, (6, 6), (3, 3), pads=(1, 1, 1, 1)),
    "3x3 valid odd": ConvCase(4, 5, (7, 5), (3, 3)),
    "3x3 full padding": ConvCase(4, 5, (5, 6), (3, 3), pads=(3, 3, 3, 3)),
    "3x3 strided": ConvCase(4, 5, (8, 8), (3, 3), (2, 2), (1, 1, 1, 1)),
    "3x3 strided odd": ConvCase(4, 5, (9, 7), (3, 3), (2, 2), (1, 1, 1, 1)),
    "3x3 strided by 3, rest unread": ConvCase(4, 5, (8, 10), (3, 3), (3, 3)),
    "3x3 dilated": ConvCase(4, 5, (9, 8), (3, 3), pads=(2, 2, 2, 2), dilation=(2, 2)),
    "3x3 strided dilated": ConvCase(4, 5, (11, 9), (3, 3), (2, 3), (2, 1, 2, 1), (2, 3)),
    "5x3 asymmetric everything": ConvCase(4, 6, (9, 7), (5, 3), (2, 1), (0, 2, 3, 1), (1, 2), groups=2),
    "2x4 even kernel": ConvCase(3, 4, (6, 7), (2, 4), pads=(1, 2, 0, 1)),
    "3x3 grouped": ConvCase(6, 4, (6, 5), (3, 3), pads=(1, 1, 1, 1), groups=2),
    "3x3 grouped strided dilated": ConvCase(6, 9, (9, 10), (3, 3), (2, 2), (1, 2, 1, 2), (2, 2), groups=3),
    "depthwise 3x3": depthwise(6, (5, 5), (3, 3), pads=(1, 1, 1, 1)),
    "depthwise 5x5 on an odd map": depthwise(5, (7, 5), (5, 5), pads=(2, 2, 2, 2)),
    "depthwise 7x7 larger than its map": depthwise(4, (5, 3), (7, 7), pads=(3, 3, 3, 3)),
    "depthwise strided": depthwise(6, (8, 6), (3, 3), stride=(2, 2), pads=(1, 1, 1, 1)),
    "depthwise strided, rest unread": depthwise(6, (8, 7), (3, 2), stride=(3, 3)),
    "depthwise dilated asymmetric": depthwise(4, (7, 8), (3, 3), pads=(1, 0, 2, 3), dilation=(2, 2)),
    "depthwise 1x1": depthwise(4, (3, 4), (1, 1)),
    "depthwise with two filters a channel": ConvCase(4, 8, (6, 5), (3, 3), pads=(1, 1, 1, 1), groups=4),
    "depthwise on a map too large for pairs": depthwise(3, (9, 8), (3, 3), pads=(1, 1, 1, 1)),
    "one channel": ConvCase(1, 1, (6, 5), (3, 3), pads=(1, 1, 1, 1)),
}


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """Any valid geometry: kernels up to 4, strides and dilations up to 3, padding 0 to kernel, any groups."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["any", "depthwise"]))
    per_group, out_per_group = (1, 1) if kind == "depthwise" else pair(1, 3)
    kernel, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 3)
    pads = (*(draw(st.integers(0, k)) for k in kernel), *(draw(st.integers(0, k)) for k in kernel))
    low = (max(1, dilation[a] * (kernel[a] - 1) + 1 - pads[a] - pads[a + 2]) for a in (0, 1))
    size = tuple(draw(st.integers(least, least + 5)) for least in low)
    return ConvCase(
        groups * per_group, groups * out_per_group, (size[0], size[1]), kernel, stride, pads, dilation, groups
    )
