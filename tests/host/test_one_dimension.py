"""1-D convolutions train as they are: gradients and checkpoints have the shapes of PyTorch's weights."""

import numpy as np
import pytest
import torch
from graph_runner import Device, random_basis, relative_error
from torch import nn

from lance_host.capture import capture
from lance_host.extras import Extras, norm_modules
from lance_host.layers import list_layers, select_layers
from lance_host.search_tables import candidate_table
from lance_host.step import differentiate

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SAMPLE, CLASSES, BATCH = (6, 21), 4, 6
LAYERS = ("first", "depthwise", "pointwise", "grouped")


class Windows(nn.Module):
    """Every kind of 1-D convolution, with a norm that is folded and one that stays, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv1d(6, 8, 3, bias=False), nn.BatchNorm1d(8)
        self.first, self.first_norm = nn.Conv1d(8, 10, 5, stride=2, padding=2), nn.BatchNorm1d(10)
        self.depthwise = nn.Conv1d(10, 10, 3, padding=1, groups=10, bias=False)
        self.pointwise, self.norm = nn.Conv1d(10, 10, 1), nn.GroupNorm(2, 10)
        self.grouped = nn.Conv1d(10, 12, 3, padding="same", dilation=2, groups=2, padding_mode="circular")
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem_norm(self.stem(x)))
        x = torch.tanh(self.first_norm(self.first(x)))
        x = x + self.norm(self.pointwise(torch.tanh(self.depthwise(x))))
        logits: torch.Tensor = self.head(torch.tanh(self.grouped(x)).mean(2))
        return logits


def windows() -> Windows:
    torch.manual_seed(0)
    network = Windows()
    for norm in (network.stem_norm, network.first_norm):
        for tensor, low, high in (
            (norm.weight, 0.5, 2.0),
            (norm.bias, -0.5, 0.5),
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 2.0),
        ):
            assert tensor is not None
            nn.init.uniform_(tensor, low, high)
    return network.eval()


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("method", ["bp", "lance"])
def test_gradients_are_those_of_autograd(method: str, everything: bool) -> None:
    """LANCE with whole ranks: projections that change nothing."""
    network, rng = windows(), np.random.default_rng(0)
    extras = Extras(everything, norm_modules(network) if everything else ())
    captured = capture(network, SAMPLE, LAYERS, "head", extras)
    sizes = {layer.name: (BATCH, *layer.input_shape) for layer in captured.layers}
    projections = {
        f"{name}/U{mode}": random_basis(rng, size, size)
        for name, modes in sizes.items()
        for mode, size in enumerate(modes)
        if method == "lance"
    }
    ranks = sizes if method == "lance" else {}
    device = Device.of(differentiate(captured, method, ranks, BATCH + 1))  # the batch mode is projected, too
    samples, labels = torch.randn(BATCH, *SAMPLE), torch.arange(BATCH) % CLASSES
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    loss, found = device.gradients({**weights, **projections}, samples.numpy(), labels.numpy(), (4, 2))

    exact = windows().double()
    parameters = dict(exact.named_parameters())
    expected = nn.functional.cross_entropy(exact(samples.double()), labels)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert {f"{layer}.weight" for layer in LAYERS} < set(found)
    assert ("first_norm.weight" in found, "grouped.bias" in found) == (everything, everything)
    truth = torch.autograd.grad(expected, [parameters[name] for name in found])
    for name, gradient in zip(found, truth, strict=True):
        # float32 against float64 through five layers and, with LANCE, two changes of basis of each mode;
        # `relative_error` compares shapes as well.
        assert relative_error(found[name], gradient) < 2e-5, name


def test_they_are_maps_of_height_1_to_the_methods() -> None:
    first, depthwise, pointwise, grouped = capture(windows(), SAMPLE, LAYERS, "head").layers
    assert (first.weight_shape, first.input_shape) == ((10, 8, 1, 5), (8, 1, 19))
    assert (first.output_shape, first.stride, first.padding) == ((10, 1, 10), (1, 2), (0, 2, 0, 2))
    assert (depthwise.groups, pointwise.weight_shape) == (10, (10, 10, 1, 1))
    assert (grouped.dilation, grouped.groups, grouped.weight_shape) == ((1, 2), 2, (12, 5, 1, 3))


def test_they_are_listed_and_counted() -> None:
    network = windows()
    assert select_layers(network, "conv:2", head="head") == ["pointwise", "grouped"]
    rows = {one.name: one for one in list_layers(network, SAMPLE, "head")}
    assert list(rows) == ["stem", *LAYERS]
    assert (rows["first"].kind, rows["depthwise"].kind) == ("1-D 5, stride 2", "1-D 3, depthwise")
    assert (rows["first"].weight_shape, rows["first"].input_shape) == ((10, 8, 5), (8, 19))


def test_a_network_without_any_such_layer_says_what_could_train() -> None:
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    table = candidate_table(list_layers(network, (2, 5, 5, 5), "3"), 1, "3")
    assert table.startswith("No layer that could be trained (nn.Conv1d, nn.Conv2d or nn.Linear")
