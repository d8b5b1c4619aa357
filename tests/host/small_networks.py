"""A network that is small, and has in it what makes training graphs hard."""

import functools
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import nn

from lance_host.capture import Captured, capture_layers, export

RESOLUTION = 17  # maps of 17, 9 and 5: all odd
CLASSES = 5
HEAD = "head"


class ConvNorm(nn.Sequential):
    """Convolution, batch-norm and, where asked for, ReLU6."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
        activation: bool = True,
    ) -> None:
        conv = nn.Conv2d(
            channels,
            out,
            kernel,
            stride,
            padding=dilation * (kernel // 2),
            groups=groups,
            dilation=dilation,
            bias=bias,
        )
        super().__init__(conv, nn.BatchNorm2d(out, eps=1e-3))
        if activation:
            self.append(nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1, plus the input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = ConvNorm(channels, hidden)
        self.depth = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.project = ConvNorm(hidden, channels, activation=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.project(self.depth(self.expand(x)))
        return x + y


class Downsample(nn.Module):
    """Two 3x3 convolutions, the first strided, the second grouped and dilated; a strided 1x1 beside them.

    Its input has two consumers, so gradients of two branches meet in it.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, out, 3, 2, bias=True)
        self.second = ConvNorm(out, out, 3, groups=3, dilation=2, activation=False)
        self.shortcut = ConvNorm(channels, out, 1, 2, activation=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2)
        self.residual = InvertedResidual(8, 16)
        self.down = Downsample(8, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.residual(self.stem(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


CONVS = (
    "stem.0",
    "residual.expand.0",
    "residual.depth.0",
    "residual.project.0",
    "down.first.0",
    "down.second.0",
    "down.shortcut.0",
)


def randomise_norms(network: nn.Module, generator: torch.Generator) -> None:
    """Running statistics and affine far from the identity, some scales negative."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.3, 2.0),
                    (module.weight, 0.6, 1.6),
                    (module.bias, -0.2, 0.4),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)
                module.weight[0] *= -1


@functools.cache
def _small_net() -> SmallNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallNet()
    randomise_norms(network, torch.Generator().manual_seed(0))
    return network.eval().requires_grad_(False)


def small_net(dtype: torch.dtype = torch.float32) -> SmallNet:
    """The same weights each time, in evaluation mode, no parameter asking for a gradient."""
    network = SmallNet().to(dtype)
    network.load_state_dict(_small_net().state_dict())
    return network.eval().requires_grad_(False)


@functools.cache
def _exported() -> ir.Model:
    return export(small_net(), (3, RESOLUTION, RESOLUTION))


def captured(layers: Sequence[str]) -> Captured:
    """The captured network, exported once: each test that differentiates it has its own copy."""
    return capture_layers(_exported(), layers, HEAD)


def random_batch(seed: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[batch, 3, R, R]` and labels `[batch]`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, generator=generator)
    return images, torch.randint(0, CLASSES, (batch,), generator=generator)


class ConvHead(nn.Module):
    """The classifier is a 1x1 convolution, as SqueezeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, groups=2)
        )
        self.unused = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 7, 1), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(x)).flatten(1)
        return logits
