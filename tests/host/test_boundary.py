"""Between prefix and tail stand tensors of samples: a device may compute them image by image, and keep them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import Array, Device, relative_error
from torch import nn

from lance_host.capture import capture
from lance_host.step import Step, differentiate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-5  # float32 against float64, through a few layers
RESOLUTION, CHANNELS, CLASSES, BATCH = 6, 4, 3, 5


class TokensFirst(nn.Module):
    """The tail reads frozen tokens whose first axis is that of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frozen = torch.relu(self.stem(x))
        tokens = frozen.flatten(2).permute(2, 0, 1)  # [P, N, C]
        trained = self.conv(frozen).mean((2, 3))
        logits: torch.Tensor = self.head((tokens * trained).mean(0))
        return logits


class Windows(nn.Module):
    """The tail reads frozen windows, four for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], CHANNELS, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, CHANNELS, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frozen = torch.relu(self.stem(x))
        gated = torch.sigmoid(self.windows(frozen)) * self.windows(self.conv(frozen))  # [4 N, C, 4]
        logits: torch.Tensor = self.head(gated.mean(2).reshape(x.shape[0], 4, CHANNELS).mean(1))
        return logits


def differentiated(network: nn.Module) -> Step:
    return differentiate(capture(network, RESOLUTION, ["conv"], "head"), "bp", {}, BATCH)


@pytest.mark.parametrize("kind", [TokensFirst, Windows])
def test_boundary_tensors_have_the_samples_first_and_gradients_are_right(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = kind().eval().requires_grad_(False)
    device = Device.of(differentiated(network))
    assert all(spec.shape[0] == "N" and set(spec.shape[1:]) <= {*range(99)} for spec in device.stages.boundary)
    images, labels = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION), torch.randint(0, CLASSES, (BATCH,))
    truth = copy.deepcopy(network).double()
    names = ("conv.weight", "head.weight", "head.bias")
    trained = [dict(truth.named_parameters())[name].requires_grad_() for name in names]
    expected = torch.autograd.grad(F.cross_entropy(truth(images.double()), labels), trained)
    weights: dict[str, Array] = {
        name: p.detach().float().numpy() for name, p in zip(names, trained, strict=True)
    }
    _, found = device.gradients(weights, images.numpy(), np.asarray(labels), [2, 3])
    for name, gradient in zip(names, expected, strict=True):
        assert relative_error(found[name], gradient) < TOLERANCE, name
