"""The two networks of continual-learning benchmarks: a small AlexNet, and a ResNet-18 of reduced widths.

Both as published with GPM (Saha et al., ICLR 2021, arXiv 2103.09762, appendix): no biases anywhere but in the
batch-norms, and one linear head a task, here always the module `head`, which is made new for every task.
"""

import torch
from torch import nn

from lance_host.zoo.resnet import BasicBlock

ALEXNET_SIDE = 32  # pixels; the first linear layer is made for them
REDUCED_WIDTHS = (20, 40, 80, 160)
POOLED = 2  # positions a side that the head of the reduced ResNet reads
POOLING = {1: 2, 2: 3}  # stride of its stem -> side of the averaged windows: 4 -> 2 and 6 -> 2 positions


class ContinualAlexNet(nn.Module):
    """Three convolutions and two linear layers, each with batch-norm, ReLU and dropout.

    Images float32 `[N, 3, 32, 32]` to logits `[N, classes]`; maps of 29, 12 and 5 pixels a side, halved by
    max-pooling (rounded down) to 14, 6 and 2.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 4, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 128, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.conv3 = nn.Conv2d(128, 256, 2, bias=False)
        self.bn3 = nn.BatchNorm2d(256)
        self.fc1 = nn.Linear(256 * 2 * 2, 2048, bias=False)
        self.bn4 = nn.BatchNorm1d(2048)
        self.fc2 = nn.Linear(2048, 2048, bias=False)
        self.bn5 = nn.BatchNorm1d(2048)
        self.head = nn.Linear(2048, classes, bias=False)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.light_dropout = nn.Dropout(0.2)  # behind the first two convolutions
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, 32, 32]` to logits `[N, classes]`."""
        x = self.pool(self.light_dropout(self.relu(self.bn1(self.conv1(images)))))
        x = self.pool(self.light_dropout(self.relu(self.bn2(self.conv2(x)))))
        x = self.pool(self.dropout(self.relu(self.bn3(self.conv3(x))))).flatten(1)  # [N, 1024]
        x = self.dropout(self.relu(self.bn4(self.fc1(x))))
        x = self.dropout(self.relu(self.bn5(self.fc2(x))))
        logits: torch.Tensor = self.head(x)
        return logits


class ReducedResNet18(nn.Module):
    """A 3x3 stem, four stages of two basic blocks with 20, 40, 80 and 160 channels, a 2x2 map, a linear head.

    Images float32 `[N, 3, R, R]` to logits `[N, classes]`.  `stem_stride` is 1 for images of 32 pixels
    (5-Datasets) and 2 for those of 84 (MiniImageNet).
    """

    def __init__(self, classes: int, stem_stride: int = 1) -> None:
        super().__init__()
        first, *_, last = REDUCED_WIDTHS
        self.conv1 = nn.Conv2d(3, first, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        channels, stages = first, []
        for number, width in enumerate(REDUCED_WIDTHS):
            stride = 1 if number == 0 else 2
            stages.append(nn.Sequential(BasicBlock(channels, width, stride), BasicBlock(width, width, 1)))
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.AvgPool2d(POOLING[stem_stride])
        self.head = nn.Linear(last * POOLED * POOLED, classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, R, R]` to logits `[N, classes]`."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [N, 160, 4, 4] of images of 32 pixels
        logits: torch.Tensor = self.head(self.pool(x).flatten(1))
        return logits
