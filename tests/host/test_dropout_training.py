"""A network with dropout, compiled: trained as PyTorch does with the same masks, and used without any."""

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from lance_edge.manifest import DROPOUT_SEEDS, LOSS, gradient_name
from lance_host.build import tap_inputs
from lance_host.capture import Captured, capture_layers, export
from lance_host.compile import Compiled, compile_variant, serialise
from lance_host.runtime import open_session
from lance_host.trainable import check_trainable
from lance_host.verify import run_graphs

SAMPLES, SIDE, CLASSES = 5, 8, 3
PRIME = 2**31 - 1


class Net(nn.Module):
    """Dropout in front of the trained layers, between them, and behind; max-pooling reads what is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(24, 10, bias=False)
        self.head = nn.Linear(10, CLASSES, bias=False)
        self.before, self.between, self.behind = nn.Dropout(0.3), nn.Dropout(0.2), nn.Dropout(0.5)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.before(self.stem(images).relu())
        x = self.pool(self.between(self.norm(self.conv(x)).relu())).flatten(1)
        logits: torch.Tensor = self.head(self.behind(self.hidden(x).relu()))
        return logits


def literal_mask(seeds: np.ndarray, stream: int, size: int, ratio: float) -> np.ndarray:
    """`[N, size]`, by the formula at the head of `autodiff/dropout.py`, in Python's whole numbers."""
    mask = np.zeros((len(seeds), size), np.float32)
    for row, seed in enumerate(seeds.tolist()):
        start = (48271 * seed + 1 + stream * 1_013_904_223 % PRIME) % PRIME
        for position in range(size):
            number = (start + 69621 * position) % PRIME
            number = (number * number + start) % PRIME
            number = (number * number + 1_013_904_223) % PRIME
            mask[row, position] = (number >= int(ratio * PRIME)) / (1 - ratio)
    return mask


@pytest.fixture(scope="module")
def network() -> Iterator[Net]:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 2)
        net.norm.running_mean.uniform_(-0.2, 0.2)
    return net.eval()


@pytest.fixture(scope="module")
def captured(network: Net) -> Captured:
    exported = export(network, (3, SIDE, SIDE), dropout=True)
    assert not network.training
    return capture_layers(exported, ("conv", "hidden"), "head")


@pytest.fixture(scope="module")
def compiled(captured: Captured) -> Compiled:
    check_trainable(captured, "2")
    return compile_variant(captured, "bp", {}, {}, SAMPLES)


def material() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((SAMPLES, 3, SIDE, SIDE), dtype=np.float32)
    return images, rng.integers(0, CLASSES, SAMPLES), rng.integers(0, PRIME, SAMPLES)


def weights(network: Net) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("dropped", [True, False])
def test_gradients_are_those_with_the_same_masks(network: Net, compiled: Compiled, dropped: bool) -> None:
    """Frozen layers drop nothing: their features may be kept.  float32 sums in another order: to 1e-5."""
    images, labels, seeds = material()
    if not dropped:
        seeds = np.full(SAMPLES, -1)
    found = run_graphs(compiled, {**weights(network), DROPOUT_SEEDS: seeds}, images, labels)
    x = functional.conv2d(torch.from_numpy(images), network.stem.weight).relu()
    x = network.norm(network.conv(x)).relu()  # [N, 6, 4, 4]
    ones = np.ones((SAMPLES, 96), np.float32)
    x = x * torch.from_numpy(literal_mask(seeds, 0, 96, 0.2) if dropped else ones).reshape(x.shape)
    x = network.hidden(network.pool(x).flatten(1)).relu()
    x = x * torch.from_numpy(literal_mask(seeds, 1, 10, 0.5) if dropped else ones[:, :10])
    loss = functional.cross_entropy(network.head(x), torch.from_numpy(labels))
    trained = ("conv.weight", "hidden.weight", "head.weight")
    expected = torch.autograd.grad(loss, [network.get_parameter(name) for name in trained])
    np.testing.assert_allclose(found[LOSS], SAMPLES * loss.item(), rtol=1e-5)
    for name, gradient in zip(trained, expected, strict=True):
        np.testing.assert_allclose(found[gradient_name(name)], gradient.numpy(), rtol=1e-4, atol=1e-5)


def test_only_training_graphs_know_of_dropout(compiled: Compiled) -> None:
    for role in compiled.variant.graphs:
        graph = onnx.load_from_string(compiled.graph(role)).graph
        if role != "backward":  # which may be given the masks, or make them again
            assert (DROPOUT_SEEDS in {value.name for value in graph.input}) == (role == "forward"), role
        assert not [node for node in graph.node if node.op_type == "Dropout"]


def test_calibration_sees_inputs_without_dropout(network: Net, captured: Captured) -> None:
    images, _, _ = material()
    model, taps = tap_inputs(captured, weights(network))
    session = open_session(serialise(model, "taps"))
    (found,) = session.run([taps["hidden"]], {"images": images})
    x = network.norm(network.conv(network.stem(torch.from_numpy(images)).relu())).relu()
    np.testing.assert_allclose(found, network.pool(x).flatten(1).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_without_the_option_nothing_is_dropped(network: Net) -> None:
    plain = capture_layers(export(network, (3, SIDE, SIDE)), ("conv", "hidden"), "head")
    compiled = compile_variant(plain, "bp", {}, {}, SAMPLES)
    for role in compiled.variant.graphs:
        graph = onnx.load_from_string(compiled.graph(role)).graph
        assert DROPOUT_SEEDS not in {value.name for value in graph.input}
