"""Batch-norm folded into convolutions of every rank and use: the logits stay those of PyTorch in float64."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from graph_runner import Device, relative_error
from torch import nn
from torch.nn.utils import parametrizations

from lance_host.capture import capture
from lance_host.step import differentiate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# float32 against float64 through four layers: some 1e-7 each, relative to the largest entry.
TOLERANCE = 1e-5
CLASSES, CHANNELS, BATCH = 4, 5, 6


class Block(nn.Module):
    """Convolution and batch-norm `times` times in a row, the same modules each time."""

    def __init__(self, conv: nn.Module, norm: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.conv, self.norm, self.times = conv, norm, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.relu(self.norm(self.conv(x)))
        return x


class StandardisedConv(nn.Conv2d):
    """Weight standardisation (arXiv 1903.10520): each filter with mean 0 and variance 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) / std, self.bias, padding=1)


class Classifier(nn.Module):
    """A block, the mean over all positions, and two linear layers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.hidden = block, nn.Linear(CHANNELS, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.block(x).flatten(2).mean(2)
        logits: torch.Tensor = self.head(torch.tanh(self.hidden(features)))
        return logits


# A block, and the positions of its input.  Where there are as many channels as filters, a scale along the wrong
# axis has a fitting shape.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: Block(nn.Conv1d(CHANNELS, CHANNELS, 3, bias=False), nn.BatchNorm1d(CHANNELS)), (9,)),
    "2-D": (lambda: Block(nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)), (6, 5)),
    "3-D": (lambda: Block(nn.Conv3d(CHANNELS, CHANNELS, 3), nn.BatchNorm3d(CHANNELS)), (4, 5, 4)),
    "called twice": (
        lambda: Block(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), times=2),
        (6, 5),
    ),
    "weight norm": (
        lambda: Block(parametrizations.weight_norm(nn.Conv2d(CHANNELS, CHANNELS, 3)), nn.BatchNorm2d(CHANNELS)),
        (6, 5),
    ),
    "weight standardisation": (
        lambda: Block(StandardisedConv(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)),
        (6, 5),
    ),
}


def network_of(block: str) -> nn.Module:
    torch.manual_seed(0)
    network = Classifier(BLOCKS[block][0]())
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 2.0),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
    return network.eval()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_frozen_block_gives_the_gradients_of_pytorch_behind_it(block: str) -> None:
    network, sample = network_of(block), (CHANNELS, *BLOCKS[block][1])
    captured = capture(network, sample, ["hidden"], "head")
    names = [str(value.name) for value in captured.parameters]
    images, labels = torch.randn(BATCH, *sample), torch.arange(BATCH) % CLASSES
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    device = Device.of(differentiate(captured, "bp", {}, BATCH))
    loss, found = device.gradients(weights, images.numpy(), labels.numpy(), (4, 2))

    exact = copy.deepcopy(network).double()
    parameters = dict(exact.named_parameters())
    expected = nn.functional.cross_entropy(exact(images.double()), labels)
    assert loss == pytest.approx(expected.item(), rel=TOLERANCE)
    truth = torch.autograd.grad(expected, [parameters[name] for name in names])
    for name, gradient in zip(names, truth, strict=True):
        assert relative_error(found[name], np.asarray(gradient)) < TOLERANCE, name


@pytest.mark.parametrize(("block", "norms"), [("1-D", 0), ("3-D", 0), ("called twice", 0), ("weight norm", 1)])
def test_a_norm_stays_only_where_the_weight_is_computed(block: str, norms: int) -> None:
    captured = capture(network_of(block), (CHANNELS, *BLOCKS[block][1]), ["hidden"], "head")
    assert [node.op_type for node in captured.model.graph].count("BatchNormalization") == norms
