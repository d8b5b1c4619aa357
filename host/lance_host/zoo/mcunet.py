"""The MCUNet family: small inverted-residual networks for microcontrollers.

Architectures and state-dict names are the published ones (Lin et al., NeurIPS 2020 and 2021,
https://github.com/mit-han-lab/mcunet), so the published checkpoints load strictly.  All networks of
the family are one module with different rows of `ARCHITECTURES`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from lance_edge.errors import ModelError

# (hidden channels, kernel, stride, output channels) of one block; 0 hidden channels: no expansion.
Row = tuple[int, int, int, int]
SKIP: Row = (0, 0, 1, 0)  # a block of which the search left only the shortcut; it keeps its index


@dataclass(frozen=True)
class Architecture:
    """One network: channels of the stem, blocks, channels of the 1x1 conv before the head (0: none)."""

    stem: int
    blocks: tuple[Row, ...]
    feature_mix: int = 0
    bn_eps: float = 1e-5


# One line per spatial resolution: every line but the first begins with a block of stride 2.
# fmt: off
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "mcunet": Architecture(16, (
        (0, 3, 1, 8),
        (24, 5, 2, 16), (96, 7, 1, 16), (80, 3, 1, 16), (80, 5, 1, 16),
        (80, 3, 2, 24), (144, 7, 1, 24), (144, 5, 1, 24),
        (96, 7, 2, 40), (200, 5, 1, 40), (200, 3, 1, 48), (240, 5, 1, 48), (192, 3, 1, 48),
        (288, 5, 2, 96), (384, 5, 1, 96), (288, 5, 1, 96), (384, 3, 1, 96), (480, 5, 1, 160),
    )),
    "mcunet-320kb": Architecture(16, (
        (0, 3, 1, 8),
        (24, 7, 2, 16), (80, 3, 1, 16), (80, 7, 1, 16), (64, 5, 1, 16),
        (80, 5, 2, 24), (120, 5, 1, 24), (120, 5, 1, 24),
        (120, 3, 2, 40), (240, 7, 1, 40), (160, 5, 1, 40), (200, 5, 1, 48), (240, 7, 1, 48), (240, 3, 1, 48),
        (288, 3, 2, 96), (480, 7, 1, 96), (384, 3, 1, 96), (480, 7, 1, 160),
    )),
    "mcunet-512kb": Architecture(32, (
        (0, 3, 1, 16),
        (48, 7, 2, 24), (120, 3, 1, 24), (96, 5, 1, 24),
        (120, 7, 2, 40), (160, 3, 1, 40), (160, 7, 1, 40),
        (120, 7, 2, 80), (240, 3, 1, 80), (240, 7, 1, 80), (320, 3, 1, 96), (288, 5, 1, 96), (288, 5, 1, 96),
        (384, 7, 2, 192), (576, 7, 1, 192), (576, 5, 1, 192), (768, 5, 1, 320),
    )),
    "mcunet-10fps-vww": Architecture(16, (
        (0, 3, 1, 8),
        (48, 5, 2, 16), (64, 3, 1, 16),
        (80, 3, 2, 24), (96, 3, 1, 24), (96, 3, 1, 24),
        (120, 3, 2, 40), (160, 3, 1, 40), (120, 7, 1, 40), (120, 3, 1, 48), (192, 3, 1, 48),
        (240, 7, 2, 96), (480, 5, 1, 96), (384, 7, 1, 160),
    )),
    "mcunet-5fps-vww": Architecture(16, (
        (0, 3, 1, 8),
        (48, 3, 2, 16), (48, 3, 1, 16), (48, 3, 1, 16),
        (48, 7, 2, 24), (144, 3, 1, 24), (120, 5, 1, 24),
        (144, 7, 2, 40), (240, 7, 1, 40), (240, 3, 1, 48), (192, 3, 1, 48),
        (240, 5, 2, 96), (480, 3, 1, 96), (384, 3, 1, 96), (288, 7, 1, 160),
    )),
    "proxyless-w0.3": Architecture(16, (
        (0, 3, 1, 8),
        (24, 5, 2, 16), (48, 3, 1, 16), SKIP, SKIP,
        (48, 7, 2, 16), (48, 3, 1, 16), (48, 5, 1, 16), (48, 5, 1, 16),
        (96, 7, 2, 24), (72, 5, 1, 24), (72, 5, 1, 24), (72, 5, 1, 24),
        (144, 5, 1, 32), (96, 5, 1, 32), (96, 5, 1, 32), (96, 5, 1, 32),
        (192, 7, 2, 64), (384, 7, 1, 64), (192, 7, 1, 64), (192, 7, 1, 64), (384, 7, 1, 96),
    ), feature_mix=384, bn_eps=1e-3),
})
# fmt: on


def build_mcunet(name: str, classes: int) -> "MCUNet":
    """The network `name` of `ARCHITECTURES` with PyTorch's default initialisation.

    Raises:
        ModelError: if `classes` is not positive.
    """
    if classes < 1:
        raise ModelError(f"{name}: expected at least 1 class, found {classes}; check the data's class folders")
    return MCUNet(ARCHITECTURES[name], classes)


class MCUNet(nn.Module):
    """Stem, inverted-residual blocks, mean over the positions, linear head.

    Images float32 `[N, 3, R, R]` to logits `[N, classes]`.  The head is `classifier.linear`.
    """

    def __init__(self, architecture: Architecture, classes: int) -> None:
        super().__init__()
        eps = architecture.bn_eps
        self.first_conv = _conv_bn(3, architecture.stem, kernel=3, stride=2, eps=eps)
        channels = architecture.stem
        blocks: list[nn.Module] = []
        for row in architecture.blocks:
            blocks.append(nn.Identity() if row == SKIP else Block(channels, row, eps))
            channels = channels if row == SKIP else row[3]
        self.blocks = nn.ModuleList(blocks)
        self.feature_mix_layer: nn.Module = nn.Identity()
        if architecture.feature_mix:
            self.feature_mix_layer = _conv_bn(channels, architecture.feature_mix, eps=eps)
            channels = architecture.feature_mix
        self.classifier = nn.Sequential(OrderedDict(linear=nn.Linear(channels, classes)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, R, R]` to logits `[N, classes]`."""
        x = self.first_conv(images)
        for block in self.blocks:
            x = block(x)
        x = self.feature_mix_layer(x)  # [N, C, h, w]
        logits: torch.Tensor = self.classifier(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """1x1 expansion, depthwise conv, linear 1x1; plus the input where the shapes allow it.

    `[N, channels, H, W]` to `[N, out, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, channels: int, row: Row, eps: float) -> None:
        super().__init__()
        hidden, kernel, stride, out = row
        width = hidden or channels
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if hidden:
            layers["inverted_bottleneck"] = _conv_bn(channels, hidden, eps=eps)
        layers["depth_conv"] = _conv_bn(width, width, kernel, stride, groups=width, eps=eps)
        layers["point_linear"] = _conv_bn(width, out, activation=False, eps=eps)
        self.mobile_inverted_conv = nn.Sequential(layers)
        self.has_shortcut = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, channels, H, W]` to `[N, out, H', W']`."""
        y: torch.Tensor = self.mobile_inverted_conv(x)
        return y + x if self.has_shortcut else y


def _conv_bn(
    channels: int,
    out: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
    *,
    eps: float,
) -> nn.Sequential:
    """Convolution without bias, batch normalisation and ReLU6."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = OrderedDict[str, nn.Module](conv=conv, bn=nn.BatchNorm2d(out, eps=eps))
    if activation:
        layers["act"] = nn.ReLU6()
    return nn.Sequential(layers)
