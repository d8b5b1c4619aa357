"""ResNets of basic blocks: ResNet-18 and ResNet-34.

The architecture is that of He et al., arXiv 1512.03385, with the stride in the first convolution of a
block; the state-dict names are those of torchvision's checkpoints, which load strictly.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

# Blocks of each of the four stages, all but the first of which begin with a stride of 2.
DEPTHS: Mapping[str, tuple[int, ...]] = MappingProxyType({"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)})
WIDTHS = (64, 128, 256, 512)


def build_resnet(name: str, classes: int) -> "ResNet":
    """The network `name` of `DEPTHS` with PyTorch's default initialisation."""
    return ResNet(DEPTHS[name], WIDTHS, classes)


class ResNet(nn.Module):
    """A 7x7 stem, four stages of basic blocks, mean over the positions, linear head.

    Images float32 `[N, 3, R, R]` to logits `[N, classes]`.  The head is `fc`.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = widths[0], []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stages.append(_stage(channels, width, depth, stride=1 if number == 0 else 2))
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, R, R]` to logits `[N, classes]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, C, R / 32, R / 32]
        logits: torch.Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, plus the input; a strided 1x1 brings it to shape where they change it.

    `[N, channels, H, W]` to `[N, out, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        # Behind the two others, so that it comes last where convolutions are counted in module order.
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, channels, H, W]` to `[N, out, H', W']`."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: torch.Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


def _stage(channels: int, out: int, depth: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels, out, stride)
    return nn.Sequential(first, *(BasicBlock(out, out, 1) for _ in range(depth - 1)))
