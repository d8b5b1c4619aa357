"""The paper's figures against real tensors, counted loops and the published numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lance_edge import accounting
from lance_edge.manifest import Layer
from lance_host.zoo import ZOO

MIB = 1 << 20
BATCH = 128


def conv_layers(net: nn.Module, resolution: int, number: int) -> list[Layer]:
    """The last convolutions of a PyTorch network in module order, as the manifest describes them."""
    convs = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)][-number:]
    seen: dict[nn.Module, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen[module] = (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))

    for _, conv in convs:
        conv.register_forward_hook(note)
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, resolution, resolution))
    return [
        Layer(
            name=name,
            weight=f"{name}.weight",
            weight_shape=tuple(conv.weight.shape),
            input_shape=seen[conv][0],
            output_shape=seen[conv][1],
            stride=tuple(conv.stride),
            padding=tuple(conv.padding) * 2,  # type: ignore[arg-type]
            dilation=tuple(conv.dilation),
            groups=conv.groups,
        )
        for name, conv in convs
    ]


def small_layer(groups: int = 1) -> Layer:
    conv = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=groups)
    return conv_layers(nn.Sequential(nn.Conv2d(3, 4, 1), conv), 6, 1)[0]


@pytest.mark.parametrize(("number", "published_mib"), [(2, 11.72), (4, 17.58)])
def test_bp_bytes_of_mcunet_are_the_published_ones(number: int, published_mib: float) -> None:
    entry = ZOO["mcunet"]
    layers = conv_layers(entry.build(10), entry.preprocessing.resolution, number)
    total = sum(accounting.bp_activation_bytes(layer, BATCH) for layer in layers)
    assert total / MIB == pytest.approx(published_mib, abs=0.005)


def test_bp_bytes_are_those_of_the_tensor() -> None:
    layer = small_layer()
    stored = torch.zeros(BATCH, *layer.input_shape)
    assert accounting.bp_activation_bytes(layer, BATCH) == stored.nbytes


def test_core_and_factor_bytes_are_those_of_the_arrays() -> None:
    layer, ranks = small_layer(), (7, 3, 2, 5)
    core = np.zeros(ranks, np.float32)
    sizes = (BATCH, *layer.input_shape)
    factors = [np.zeros((size, rank), np.float32) for size, rank in zip(sizes, ranks, strict=True)]
    factors_nbytes = sum(factor.nbytes for factor in factors)
    assert accounting.core_bytes(ranks) == core.nbytes
    assert accounting.factor_bytes(layer, BATCH, ranks) == factors_nbytes
    assert accounting.factored_activation_bytes(layer, BATCH, ranks) == core.nbytes + factors_nbytes


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_forward_macs_of_bp_are_the_products_summed(groups: int) -> None:
    """With all ones inside and out, an output without padding is the number of its products."""
    layer = small_layer(groups)
    channels = layer.input_shape[0]
    one = nn.functional.conv2d(torch.ones(1, channels, 3, 3), torch.ones(layer.weight_shape), groups=groups)
    per_value = one[0, 0, 0, 0].item()
    assert accounting.bp_forward_macs(layer, 16) == 16 * math.prod(layer.output_shape) * per_value
    assert accounting.bp_weight_gradient_macs(layer, 16) == accounting.bp_forward_macs(layer, 16)


def test_lance_forward_adds_the_projection_of_the_whole_input() -> None:
    for groups in (1, 4):
        layer = small_layer(groups)
        added = accounting.lance_forward_macs(layer, 16, (5, 3, 2, 2)) - accounting.bp_forward_macs(layer, 16)
        assert added == 16 * (4 * 6 * 6) * (5 + 3 + 2 + 2)


@pytest.mark.parametrize("r0", [5, 16], ids=["r0 < B", "batch mode whole"])
def test_lance_weight_gradient_counts_as_torch_counts_its_contractions(r0: int) -> None:
    """Torch counts two for each multiply-add."""
    layer, batch, r1, r2, r3 = small_layer(), 16, 3, 2, 4
    dy, core = torch.ones(batch, *layer.output_shape), torch.ones(r0, r1, r2, r3)
    with FlopCounterMode(display=False) as counter:
        if r0 < batch:
            dy = torch.einsum("bohw,br->rohw", dy, torch.ones(batch, r0))
        tall = torch.einsum("abcd,hc->abhd", core, torch.ones(6, r2))
        whole = torch.einsum("abhd,wd->abhw", tall, torch.ones(6, r3))
        patches = nn.functional.unfold(whole, 3, stride=2, padding=1)  # [r0, r1 k k, P]
        narrow = torch.einsum("rop,rqp->oq", dy.flatten(2), patches)
        torch.einsum("oik,ci->ock", narrow.reshape(8, r1, 9), torch.ones(4, r1))
    assert (
        2 * accounting.lance_weight_gradient_macs(layer, batch, (r0, r1, r2, r3)) == counter.get_total_flops()
    )


@pytest.mark.parametrize("r0", [5, 16], ids=["r0 < B", "batch mode whole"])
def test_what_each_method_adds_to_forward_is_counted_as_torch_counts_it(r0: int) -> None:
    """The paper's convention, all modes of the unprojected input, for the projection; n^3 for eigenvectors."""
    layer, batch, ranks = small_layer(), 16, (r0, 3, 2, 4)
    x = torch.ones(batch, *layer.input_shape)
    modes = [mode for mode in range(4) if mode > 0 or r0 < batch]
    unfolded = {mode: x.movedim(mode, 0).flatten(1) for mode in range(4)}
    bases = {mode: torch.ones(x.shape[mode], ranks[mode]) for mode in modes}
    with FlopCounterMode(display=False) as projection:
        halves = {mode: bases[mode].T @ unfolded[mode] for mode in modes}
    with FlopCounterMode(display=False) as power:
        for mode in modes:
            _ = unfolded[mode] @ (unfolded[mode].T @ bases[mode])
    with FlopCounterMode(display=False) as gram:
        for matrix in unfolded.values():
            _ = matrix @ matrix.T
    assert halves
    plain = accounting.bp_forward_macs(layer, batch)
    lance = plain + projection.get_total_flops() // 2
    assert accounting.lance_forward_macs(layer, batch, ranks) == lance
    assert accounting.asi_forward_macs(layer, batch, ranks) == lance + power.get_total_flops() // 2
    eigenvectors = sum(size**3 for size in x.shape)
    expected = lance + gram.get_total_flops() // 2 + eigenvectors
    assert accounting.hosvd_forward_macs(layer, batch, ranks) == expected


def test_lance_weight_gradient_takes_channels_per_group() -> None:
    dense, grouped = (
        accounting.lance_weight_gradient_macs(small_layer(groups), 16, (5, 3, 2, 4)) for groups in (1, 2)
    )
    assert dense - grouped == 8 * (4 - 2) * 9 * 3  # only the expansion of channels sees them


def test_kernels_need_not_be_square() -> None:
    layer = replace(small_layer(), weight_shape=(8, 4, 1, 5))
    assert accounting.bp_forward_macs(layer, 1) == 8 * 3 * 3 * 4 * 5


@pytest.mark.parametrize("ranks", [(1, 2, 3), (1, 2, 3, 4, 5)])
def test_refuses_ranks_of_other_than_the_layers_modes(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected 4 \(batch, channels, height, width\), found \(1, 2, 3"):
        accounting.factor_bytes(small_layer(), 16, ranks)
