"""Dropout from seeds: as random as it must be, and the same wherever it is computed."""

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graph_runner import (
    Array,
    Device,
    append_gradients,
    graph_of_nodes,
    random_basis,
    relative_error,
    run_graph,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn

from lance_edge.errors import ModelError
from lance_edge.manifest import Schedule
from lance_edge.names import DROPOUT_SEEDS, INPUTS_ROLE, activation_name
from lance_host.autodiff.dropout import PRIME, drop_nothing, seed_dropouts
from lance_host.build import tap_inputs
from lance_host.capture import Captured, capture, clone
from lance_host.compile import inference_tails, layer_inputs
from lance_host.stages import cut_stages
from lance_host.step import differentiate

SIZE = (4, 50)


def two_dropouts(ratio: float) -> ir.Model:
    """y = dropout(dropout(x)), both in training mode."""
    constants = {"ratio": np.array(ratio, np.float32), "training": np.array(True)}
    nodes = [
        helper.make_node("Dropout", ["x", "ratio", "training"], ["half"]),
        helper.make_node("Dropout", ["half", "ratio", "training"], ["y"]),
    ]
    return graph_of_nodes(nodes, {"x": ("N", *SIZE)}, constants)


def one_dropout(ratio: float) -> ir.Model:
    constants = {"ratio": np.array(ratio, np.float32), "training": np.array(True)}
    node = helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="drop")
    return graph_of_nodes([node], {"x": ("N", *SIZE)}, constants)


def seed_all(model: ir.Model) -> ir.Value | None:
    """Every Dropout, as if all of the graph trained."""
    return seed_dropouts(model.graph, [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)])


def masks(model: ir.Model, seeds: Array) -> Array:
    """What the graph makes of ones."""
    ones = np.ones((len(seeds), *SIZE), np.float32)
    (result,) = run_graph(model, {"x": ones, DROPOUT_SEEDS: seeds}).values()
    return result


def seeded(model: ir.Model) -> ir.Model:
    assert seed_all(model) is not None
    return model


@settings(max_examples=20, deadline=None, derandomize=True)
@given(ratio=st.floats(0.05, 0.9), first=st.integers(0, PRIME - 2001))
def test_as_many_are_dropped_as_asked_for_and_the_mean_stays(ratio: float, first: int) -> None:
    mask = masks(seeded(one_dropout(ratio)), np.arange(first, first + 100))
    count = mask.size
    # A sum of independent draws is within 5 standard deviations, but for one in a million of them.
    assert abs((mask == 0).sum() - ratio * count) < 5 * np.sqrt(count * ratio * (1 - ratio))
    np.testing.assert_allclose(mask[mask > 0], 1 / (1 - ratio), rtol=1e-6)


def test_neighbours_samples_and_layers_are_independent() -> None:
    """Correlations of n independent pairs have the standard deviation n^(-1/2)."""
    dropped = (masks(seeded(one_dropout(0.5)), np.arange(500)) == 0).reshape(500, -1).astype(float)
    both = (masks(seeded(two_dropouts(0.5)), np.arange(500)) == 0).reshape(500, -1)
    pairs = {
        "next position": (dropped[:, :-1], dropped[:, 1:]),
        "next row": (dropped[:, : -SIZE[1]], dropped[:, SIZE[1] :]),
        "next sample": (dropped[:-1], dropped[1:]),
        "same position, two samples on": (dropped[:-2], dropped[2:]),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size), name
    assert abs(both.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / both.size)  # two layers, two masks


def test_each_sample_has_its_mask_whatever_the_micro_batch() -> None:
    model, seeds = seeded(one_dropout(0.3)), np.array([5, 2**31 - 2, 17, 0])
    whole = masks(model, seeds)
    parts = np.concatenate([masks(model, seeds[:1]), masks(model, seeds[1:])])
    np.testing.assert_array_equal(whole, parts)
    assert len(np.unique(whole.reshape(4, -1), axis=0)) == 4


def test_a_negative_seed_drops_nothing() -> None:
    found = masks(seeded(one_dropout(0.3)), np.array([-1, 3]))
    np.testing.assert_array_equal(found[0], 1)
    assert (found[1] == 0).any()


def test_the_gradient_is_the_mask() -> None:
    model = seeded(two_dropouts(0.4))
    append_gradients(model, ["x"])
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((3, *SIZE)).astype(np.float32) for _ in range(2))
    seeds = np.array([1, 2, 3])
    found = run_graph(model, {"x": x, "dy": dy, DROPOUT_SEEDS: seeds})["grad_x"]
    np.testing.assert_allclose(found, dy * masks(seeded(two_dropouts(0.4)), seeds), rtol=1e-6)


def test_without_dropout_nothing_changes() -> None:
    node = helper.make_node("Dropout", ["x"], ["y"])  # at inference: the identity
    model = graph_of_nodes([node], {"x": ("N", 3)}, {})
    assert seed_all(model) is None
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_a_dropout_that_was_not_seeded_cannot_be_trained() -> None:
    with pytest.raises(ModelError, match=r"drop: this Dropout draws another mask .*evaluation mode"):
        append_gradients(one_dropout(0.5), ["x"])


def test_the_batch_must_come_first() -> None:
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
    node = helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="drop")
    model = graph_of_nodes([node], {"x": (7, "N")}, constants)
    with pytest.raises(ModelError, match=r"drop: expected the batch as first axis .*found \(7, 'N'\)"):
        seed_all(model)


def test_without_masks_the_graph_is_that_of_evaluation() -> None:
    model = one_dropout(0.5)
    drop_nothing(model, seed_all(model))
    assert [value.name for value in model.graph.inputs] == ["x"]
    x = np.arange(3 * 4 * 50, dtype=np.float32).reshape(3, *SIZE)
    np.testing.assert_array_equal(run_graph(model, {"x": x})["y"], x)


# --- a network in training ---


class Dropping(nn.Module):
    """Dropout in the frozen part, before and behind trained layers, and before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen = nn.Conv2d(3, 6, 3, 2), nn.Dropout(0.5)
        self.first, self.conv, self.second = nn.Dropout(0.2), nn.Conv2d(6, 8, 3), nn.Dropout(0.4)
        self.wide, self.third = nn.Linear(8, 10), nn.Dropout(0.5)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.relu(self.frozen(self.stem(x))))
        x = self.second(torch.relu(self.conv(x))).flatten(2).transpose(1, 2)
        logits: torch.Tensor = self.head(self.third(torch.tanh(self.wide(x))).mean(1))
        return logits


class Masks(nn.Module):
    """The mask of a stream, in plain integers, as the head of `dropout.py` writes it."""

    def __init__(self, stream: int, ratio: float, seeds: Sequence[int]) -> None:
        super().__init__()
        self.stream, self.ratio, self.seeds = stream, ratio, seeds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [[self._is_kept(seed, j) for j in range(x[0].numel())] for seed in self.seeds]
        return x * torch.tensor(kept, dtype=x.dtype).reshape(x.shape) / (1 - self.ratio)

    def _is_kept(self, seed: int, j: int) -> bool:
        p = 2**31 - 1
        s = (48271 * seed + (1 + self.stream * 1013904223 % p)) % p
        h = ((s + 69621 * j) % p) ** 2 + s
        h = ((h % p) ** 2 + 1013904223) % p
        return h >= int(self.ratio * p)


LAYERS, DROPPED = ("conv", "wide"), ("first", "second", "third")
SAMPLES, BATCH = (3, 13, 13), 6


@functools.cache
def _captured() -> Captured:
    torch.manual_seed(0)
    return capture(Dropping(), SAMPLES, LAYERS, "head", has_dropout=True)


def network_with(seeds: Sequence[int] | None) -> nn.Module:
    torch.manual_seed(0)
    network = Dropping().eval()
    if seeds is not None:
        for stream, name in enumerate(DROPPED):
            setattr(network, name, Masks(stream, getattr(network, name).p, seeds))
    return network.double()


@pytest.mark.parametrize(
    ("method", "schedule"), [("bp", "one pass"), ("lance", "one pass"), ("lance", "two passes")]
)
@pytest.mark.parametrize("seeds", [[5, 17, 2**31 - 2, 0, 1, 2**20], None])
def test_a_step_is_that_of_pytorch_with_the_same_masks(
    method: str, schedule: Schedule, seeds: list[int] | None
) -> None:
    """LANCE with whole ranks: projections that change nothing."""
    captured, rng = clone(_captured()), np.random.default_rng(0)
    sizes = {layer.name: (BATCH, *layer.input_shape) for layer in captured.layers}
    projections = {}
    if method == "lance":
        for layer in captured.layers:
            projections |= {
                f"{layer.name}/U{mode}": random_basis(rng, size, size)
                for mode, size in enumerate(sizes[layer.name])
            }
    ranks = sizes if method == "lance" else {}
    step = differentiate(captured, method, ranks, BATCH + 1, schedule)  # the batch mode is projected, too
    images, labels = (
        torch.randn(BATCH, *SAMPLES, generator=torch.Generator().manual_seed(1)),
        torch.arange(6) % 4,
    )
    network = network_with(seeds)
    weights = {name: value.detach().float().numpy() for name, value in network.state_dict().items()}
    fed = {DROPOUT_SEEDS: np.array(seeds or [-1] * BATCH)}
    device = Device.of(step)
    loss, found = device.gradients({**weights, **projections, **fed}, images.numpy(), labels.numpy(), (3, 1, 2))
    parameters = dict(network.named_parameters())
    expected = nn.functional.cross_entropy(network(images.double()), labels)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    truth = torch.autograd.grad(expected, [parameters[name] for name in found])
    for name, gradient in zip(found, truth, strict=True):
        assert relative_error(found[name], gradient) < 1e-5, name  # float32 through four layers


def test_the_frozen_part_and_inference_drop_nothing() -> None:
    step = differentiate(clone(_captured()), "bp", {}, BATCH)
    assert DROPOUT_SEEDS not in {value.name for value in cut_stages(step).graphs["prefix"].graph.inputs}
    images, network = torch.randn(2, *SAMPLES), network_with(None).float()
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    boundary = run_graph(cut_stages(step).graphs["prefix"], {"images": images.numpy(), **weights})
    for model in inference_tails(_captured()).values():
        assert DROPOUT_SEEDS not in {value.name for value in model.graph.inputs}
        logits = run_graph(model, {**weights, **boundary})["logits"]
        assert relative_error(logits, network(images)) < 1e-5


def test_calibration_sees_inputs_of_which_nothing_is_dropped() -> None:
    """On the workstation from images, and on the board from what crosses the boundary."""
    images, network = torch.randn(2, *SAMPLES), network_with(None).float()
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    seen: dict[str, torch.Tensor] = {}
    for name in LAYERS:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].detach()})
        )
    network(images)
    model, taps = tap_inputs(_captured(), weights)
    found = run_graph(model, {"images": images.numpy()})
    prefix = cut_stages(differentiate(clone(_captured()), "bp", {}, BATCH)).graphs["prefix"]
    boundary = run_graph(prefix, {"images": images.numpy(), **weights})
    on_board = run_graph(layer_inputs(_captured())[INPUTS_ROLE], {**weights, **boundary})
    for name in LAYERS:
        assert relative_error(found[taps[name]], seen[name]) < 1e-5  # float32 through three layers
        assert relative_error(on_board[activation_name(name)], seen[name]) < 1e-5


def test_before_the_head_alone_is_behind_the_first_trained_layer() -> None:
    captured = capture(Dropping(), SAMPLES, (), "head", has_dropout=True)
    assert captured.seeds is None, "the mean stands between"
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.5), nn.Linear(5, 2))
    captured = capture(network, (3, 2, 2), (), "3", has_dropout=True)
    assert captured.seeds is not None
    assert not any(module.training for module in network.modules())
    images, labels = np.ones((2, 3, 2, 2), np.float32), np.array([0, 1])
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    device = Device.of(differentiate(captured, "bp", {}, 2))
    kept = {
        seed: device.gradients({**weights, DROPOUT_SEEDS: np.array([seed, seed])}, images, labels)[1][
            "3.weight"
        ]
        for seed in (-1, 7)
    }
    assert (kept[-1] != 0).all()
    assert (kept[7] == 0).all(0).any(), "a column whose input was dropped"
