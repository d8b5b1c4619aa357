"""The building blocks of common networks, through export, differentiation and micro-batches, against autograd.

The first convolution is trained, so the gradient passes the whole block.
"""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import Array, Device, relative_error
from torch import nn

from lance_host.capture import capture
from lance_host.step import differentiate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Truth is PyTorch in float64, the graphs run in float32: through a few layers the difference is some 1e-6 of
# a gradient's largest entry.
TOLERANCE = 1e-5
RESOLUTION, CHANNELS, CLASSES = 8, 8, 5
BATCH, PARTS = 6, (3, 1, 2)


class SqueezeAndExcitation(nn.Module):
    """A gate for each channel, from the mean over all positions (arXiv 1709.01507)."""

    def __init__(self, gate: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(CHANNELS, 2, 1), nn.Conv2d(2, CHANNELS, 1)
        self.gate, self.activation = gate, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = F.adaptive_avg_pool2d(x, 1)
        gate: torch.Tensor = self.gate(self.expand(self.activation(self.reduce(squeezed))))
        return x * gate


class Tokens(nn.Module):
    """Positions as tokens, with a class token in front, through a transformer block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)
        attended: torch.Tensor = self.block(tokens)
        return attended[:, 0, :, None, None]


class Attention(nn.Module):
    """Queries, keys and values from one product, two heads, scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, tokens, 3, 2, CHANNELS // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, CHANNELS)
        result: torch.Tensor = x + self.out(y)
        return result


class MultiHead(nn.Module):
    """PyTorch's own module, which puts tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return result


class Windows(nn.Module):
    """Attention within windows of 2 x 2 positions that are shifted by one, as in Swin (arXiv 2103.14030)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        shifted = torch.roll(x, (-1, -1), (2, 3))
        windows = shifted.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        y = self.attention(windows).reshape(n, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4)
        return torch.roll(y.reshape(n, c, h, w), (1, 1), (2, 3))


class Shuffle(nn.Module):
    """Half of the channels through a convolution, then both halves interleaved (arXiv 1807.11164)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS // 2, CHANNELS // 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([left, self.conv(right)], 1), 2)


class Pyramid(nn.Module):
    """Two scales that meet: a strided branch, resized and added."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.down, self.mode = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.interpolate(self.down(x), scale_factor=2, mode=self.mode)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "squeeze-and-excitation": lambda: SqueezeAndExcitation(nn.Sigmoid(), nn.ReLU()),
    "squeeze-and-excitation, hard": lambda: SqueezeAndExcitation(nn.Hardsigmoid(), nn.Hardswish()),
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU(approximate="tanh"),
    "HardSwish": nn.Hardswish,
    "Mish": nn.Mish,
    "PReLU": lambda: nn.PReLU(CHANNELS),
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "batch norm alone": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(CHANNELS)),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "average pool": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(3),
    "transposed convolution": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, 2, 1),
    "reflected border": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect"),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(CHANNELS // 4, CHANNELS, 1)),
    "channel shuffle": Shuffle,
    "nearest": lambda: Pyramid("nearest"),
    "bilinear": lambda: Pyramid("bilinear"),
    "attention": lambda: Tokens(Attention()),
    "attention, tokens first": lambda: Tokens(MultiHead()),
    "attention in windows": Windows,
    "transformer encoder layer": lambda: Tokens(nn.TransformerEncoderLayer(CHANNELS, 2, 12, batch_first=True)),
    "transformer encoder layer, norm first": lambda: Tokens(
        nn.TransformerEncoderLayer(CHANNELS, 2, 12, activation="gelu", batch_first=True, norm_first=True)
    ),
}


class Network(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = (
            nn.Conv2d(3, CHANNELS, 3, padding=1),
            block,
            nn.Linear(CHANNELS, CLASSES),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.block(self.stem(x)))  # else the mean undoes an instance norm
        logits: torch.Tensor = self.head(y.mean((2, 3)))
        return logits


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_gradients_through_a_block_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    network = Network(BLOCKS[name]()).eval().requires_grad_(False)
    device = Device.of(differentiate(capture(network, RESOLUTION, ["stem"], "head"), "bp", {}, BATCH))
    images, labels = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION), torch.randint(0, CLASSES, (BATCH,))
    truth = copy.deepcopy(network).double()
    trained = {
        key: p.requires_grad_() for key, p in truth.named_parameters() if key.startswith(("stem.w", "head"))
    }
    loss = F.cross_entropy(truth(images.double()), labels)
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    weights: dict[str, Array] = {key: p.detach().float().numpy() for key, p in trained.items()}
    found_loss, found = device.gradients(weights, images.numpy(), np.asarray(labels), PARTS)
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        assert relative_error(found[key], gradient) < TOLERANCE, key
