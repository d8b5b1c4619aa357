"""MobileNetV2 (Sandler et al., CVPR 2018), with the state-dict names of torchvision's checkpoints."""

import torch
from torch import nn

STEM, LAST = 32, 1280

# Expansion, output channels, blocks, stride of the first of them: table 2 of the paper.
ROWS: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """Stem, inverted-residual blocks, 1x1 convolution, mean over the positions, linear head.

    Images float32 `[N, 3, R, R]` to logits `[N, classes]`.  The head is `classifier.1`.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, STEM, 3, stride=2)]
        channels = STEM
        for expansion, out, depth, stride in ROWS:
            for number in range(depth):
                layers.append(InvertedResidual(channels, out, expansion, stride if number == 0 else 1))
                channels = out
        layers.append(_conv_norm(channels, LAST, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, R, R]` to logits `[N, classes]`."""
        logits: torch.Tensor = self.classifier(self.features(images).mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """1x1 expansion (unless by 1), depthwise 3x3, linear 1x1; plus the input where the shapes allow it.

    `[N, channels, H, W]` to `[N, out, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, channels: int, out: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = [_conv_norm(channels, hidden, 1)] if expansion != 1 else []
        layers.append(_conv_norm(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, channels, H, W]` to `[N, out, H', W']`."""
        y: torch.Tensor = self.conv(x)
        return y + x if self.has_shortcut else y


def _conv_norm(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation and ReLU6."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())
