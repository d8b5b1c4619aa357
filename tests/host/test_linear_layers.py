"""Linear layers, compressed over (batch, tokens, features): gradients, figures, selection."""

import functools

import numpy as np
import pytest
import torch
from gradient_check import check_gradients
from graph_runner import Device, random_basis
from literal_method import ranks_of
from torch import nn
from vision_transformer import VisionTransformer, deit_tiny, small

from lance_edge import accounting
from lance_edge.errors import ModelError
from lance_edge.manifest import Schedule
from lance_host.capture import Captured, capture, clone
from lance_host.extras import Extras, norm_modules
from lance_host.layers import list_layers, select_layers
from lance_host.methods import METHODS
from lance_host.step import differentiate

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.xdist_group("captures")]

MEBIBYTE = 2**20
CLASSES, BATCH, PARTS = 5, 6, (4, 2)
WAYS: list[tuple[str, Schedule]] = [
    (method, schedule) for method in METHODS for schedule in METHODS[method].schedules
]


class Rows(nn.Module):
    """Linear layers of flat features, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 12), nn.Linear(12, 9, bias=False)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))
        return logits


class Positions(nn.Module):
    """Linear layers over the channels of a map, as in ConvNeXt, after a convolution; one over windows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 10, bias=False)
        self.window, self.head = nn.Linear(10, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.wide(torch.tanh(self.conv(x)).permute(0, 2, 3, 1)))  # [N, 4, 4, 10]
        windows = y.reshape(-1, 2, 2, 2, 2, 10).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 10)  # [4 N, 4, 10]
        z = torch.tanh(self.window(windows) + windows[..., :8])
        logits: torch.Tensor = self.head(z.reshape(-1, 16, 8).mean(1))
        return logits


class Strewn(nn.Module):
    """Tokens of all samples stand side by side: no row belongs to a sample as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2)[:, :, :8].transpose(0, 1)  # [3, N, 8]
        logits: torch.Tensor = self.head(self.mix(tokens).mean(0))
        return logits


NETWORKS = {
    "transformer": (small, 32, "4"),
    "transformer, 2 layers": (small, 32, "2"),
    "rows": (Rows, 4, "2"),
    "positions and windows": (Positions, 8, "3"),
}


@functools.cache
def _network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name][0]()
    return network.eval().requires_grad_(False)


@functools.cache
def _captured(name: str, extras: bool = False) -> Captured:
    network, (_, size, selection) = _network(name), NETWORKS[name]
    more = Extras(biases=extras, norms=norm_modules(network) if extras else ())
    return capture(network, size, select_layers(network, selection, "head"), "head", more)


def random_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, size, size, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def check(name: str, method: str, schedule: Schedule, batch_share: float, *, extras: bool = False) -> None:
    captured, size = clone(_captured(name, extras)), NETWORKS[name][1]
    names = [layer.name for layer in captured.layers] if METHODS[method].compresses else []
    ranks = ranks_of(captured.layers, BATCH, 0.5, batch_share)
    rng = np.random.default_rng(0)
    projections = {
        f"{layer.name}/U{mode}": random_basis(rng, length, rank)
        for layer in captured.layers
        for mode, (length, rank) in enumerate(zip((BATCH, *layer.input_shape), ranks[layer.name], strict=True))
        if names and (mode > 0 or rank < BATCH or schedule == "by layer")
    }
    fixed = ranks if METHODS[method].fixes_ranks else {}
    device = Device.of(differentiate(captured, method, fixed, BATCH, schedule))
    check_gradients(device, _network(name), random_batch(size), projections, PARTS, compress=names)


@pytest.mark.parametrize(("method", "schedule"), WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_the_literal_method(name: str, method: str, schedule: Schedule) -> None:
    check(name, method, schedule, 0.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_batch_mode_may_be_whole(name: str) -> None:
    check(name, "lance", "one pass", 1.0)


@pytest.mark.parametrize("method", ["bp", "lance"])
def test_biases_and_norms_of_a_transformer_train_too(method: str) -> None:
    names = [str(value.name) for value in _captured("transformer", True).parameters]
    block, biases = "blocks.1", {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    # norm1 is before the first trained layer: it is of the frozen part.
    norms = {f"{norm}.{part}" for norm in ("blocks.1.norm2", "norm") for part in ("weight", "bias")}
    assert set(names[6:]) == {f"{block}.{layer}.bias" for layer in biases} | norms
    check("transformer", method, "one pass", 0.5, extras=True)


def test_layers_are_described_by_their_modes() -> None:
    described = {name: _captured(name).layers for name in ("transformer", "rows", "positions and windows")}
    fc2 = described["transformer"][-1]
    assert (fc2.name, fc2.weight_shape, fc2.input_shape, fc2.output_shape) == (
        *("blocks.1.mlp.fc2", (24, 96)),
        *((17, 96), (17, 24)),
    )
    assert fc2.modes == ("batch", "tokens", "features")
    assert [layer.modes for layer in described["rows"]] == [("batch", "features")] * 2
    assert [layer.input_shape for layer in described["positions and windows"]] == [(3, 8, 8), (16, 8), (16, 10)]


def test_rows_that_belong_to_no_sample_are_refused() -> None:
    with pytest.raises(ModelError, match="expected the rows of one sample after the other in the input of a"):
        capture(Strewn().eval(), 4, ["mix"], "head")


def test_the_projections_inside_of_multihead_attention_are_no_layers() -> None:
    network = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 3))
    assert select_layers(network, "all") == ["1"]


# --- figures ---


def test_multiply_adds_are_those_of_the_contractions() -> None:
    layer = _captured("transformer").layers[-1]  # 17 tokens, 96 -> 24
    ranks = (r0, r1, r2) = (3, 2, 5)
    assert accounting.bp_forward_macs(layer, 6) == 6 * 17 * 96 * 24
    assert accounting.bp_activation_bytes(layer, 6) == 4 * 6 * 17 * 96
    assert accounting.factored_activation_bytes(layer, 6, ranks) == 4 * (30 + 6 * r0 + 17 * r1 + 96 * r2)
    on_batch, rebuilt = r0 * 17 * 24 * 6, r0 * r2 * 17 * r1
    product, expanded = r0 * r2 * 17 * 24, 24 * 96 * r2
    expected = on_batch + rebuilt + product + expanded
    assert accounting.lance_weight_gradient_macs(layer, 6, ranks) == expected


# --- DeiT-Tiny ---


@functools.cache
def _deit_tiny(depth: int = 12) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return deit_tiny(CLASSES, depth).eval()


@pytest.mark.parametrize(
    ("selection", "names", "mebibytes"),
    [
        ("2", ("mlp.fc1", "mlp.fc2"), 92.34),
        ("4", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), 129.28),
    ],
)
def test_bp_bytes_of_deit_tiny_are_the_published_ones(
    selection: str, names: tuple[str, ...], mebibytes: float
) -> None:
    """They are the last layers of all kinds in module order, the head left out: those of the last block."""
    network = _deit_tiny()
    chosen = select_layers(network, selection, "head")
    assert chosen == [f"blocks.11.{name}" for name in names]
    listed = [layer for layer in list_layers(network, (3, 224, 224), "head") if layer.name in chosen]
    found = sum(layer.bp_bytes(128) for layer in listed) / MEBIBYTE
    assert found == pytest.approx(mebibytes, abs=0.0051)  # printed with two decimals


@pytest.mark.parametrize("method", ["bp", "lance"])
def test_gradients_of_deit_tiny_at_its_own_size(method: str) -> None:
    """Of two blocks instead of twelve: what is before the last one is the frozen part."""
    network = _deit_tiny(2)
    captured = clone(_captured_deit_tiny())
    names = [layer.name for layer in captured.layers] if METHODS[method].compresses else []
    ranks = {layer.name: (2, 20, 40) for layer in captured.layers} if names else {}
    rng = np.random.default_rng(0)
    images, labels = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(2)), torch.arange(3)
    projections = {
        f"{layer.name}/U{mode}": random_basis(rng, length, rank)
        for layer in captured.layers
        if names
        for mode, (length, rank) in enumerate(zip((3, *layer.input_shape), ranks[layer.name], strict=True))
    }
    device = Device.of(differentiate(captured, method, ranks, 3))
    check_gradients(device, network, (images, labels), projections, (2, 1), compress=names)


@functools.cache
def _captured_deit_tiny() -> Captured:
    network = _deit_tiny(2)
    return capture(network, 224, select_layers(network, "4", "head"), "head")
