"""The perplexity search on a small real network, against projections and autograd written out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_layers import conv_layer
from small_networks import captured, random_batch, small_net
from test_gradient_error import literal_distance

from lance_edge.accounting import bp_activation_bytes, factored_activation_bytes
from lance_host import perplexity
from lance_host.budget import plan_budget, total_bytes, total_error
from lance_host.error_table import Candidate, ErrorTable, frontier
from lance_host.hosvd import ModeCovariances
from lance_host.perplexity import SEARCHES, Task, search_asi, search_lance
from lance_host.ranks import activation_bytes, energy_for_budget, ranks_by_energy
from lance_host.taps import batch_tensors, only_trainable

BATCH = 12
LAYERS = ("residual.expand.0", "residual.depth.0", "residual.project.0", "down.second.0")


def smooth_batch(seed):
    """Images whose neighbouring pixels are alike, as those of photographs are."""
    images, labels = random_batch(seed, BATCH)
    blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False) * 3
    return blurred + images.mean((2, 3), keepdim=True), labels


class Case:
    """Layers of the network, their tensors in three batches, and spectra calibrated on two of them."""

    def __init__(self) -> None:
        self.network = small_net()
        self.layers = tuple(captured(LAYERS).layers)
        self.batches = [self.tensors(seed) for seed in range(3)]
        self.spectra = {}
        for layer in self.layers:
            covariances = ModeCovariances((BATCH, *layer.input_shape))
            for tensors in self.batches[:2]:
                covariances.add(tensors[layer.name][0].numpy())
            self.spectra[layer.name] = covariances.spectra()

    def tensors(self, seed):
        images, labels = smooth_batch(seed)
        return batch_tensors(self.network, self.layers, images.numpy(), labels.numpy())

    def task(self, share):
        whole = sum(bp_activation_bytes(layer, BATCH) for layer in self.layers)
        return Task((self.layers,), BATCH, int(share * whole))

    def mean_distance(self, layer, ranks, spectra_of, batches=None):
        """Averaged over batches, its own unless given; projections are `spectra_of(layer name, batch)`'s."""
        distances = []
        for tensors in batches or self.batches:
            spectra = spectra_of(layer.name, tensors)
            bases = [torch.from_numpy(one.eigenvectors) for one in spectra]
            distances.append(literal_distance(layer, *tensors[layer.name], bases, ranks))
        return np.mean(distances)

    def calibrated(self, name, _):
        return self.spectra[name]


def own_spectra(name, tensors):
    covariances = ModeCovariances(tuple(tensors[name][0].shape))
    covariances.add(tensors[name][0].numpy())
    return covariances.spectra()


@pytest.fixture(scope="module")
def case(one_torch_thread):
    return Case()


# --- tensors of a batch ---------------------------------------------------------------------------------


def test_output_gradients_are_those_of_the_mean_loss(case):
    """The chain from them to the weight gradient, against autograd through the whole network at once."""
    network = small_net()
    images, labels = smooth_batch(0)
    weights = [dict(network.named_parameters())[layer.weight].requires_grad_() for layer in case.layers]
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    expected = torch.autograd.grad(loss, weights)
    for layer, gradient in zip(case.layers, expected, strict=True):
        x, dy = case.batches[0][layer.name]
        assert x.shape == (BATCH, *layer.input_shape)
        found = torch.nn.grad.conv2d_weight(
            x, gradient.shape, dy, layer.stride, layer.padding[0], layer.dilation, layer.groups
        )
        assert torch.allclose(found, gradient, rtol=1e-4, atol=1e-6)


def test_chunks_of_a_batch_change_nothing(case, monkeypatch):
    images, labels = smooth_batch(0)
    monkeypatch.setattr("lance_host.taps.CHUNK_IMAGES", 5)
    parts = batch_tensors(case.network, case.layers, images.numpy(), labels.numpy())
    for name, tensors in parts.items():
        for found, expected in zip(tensors, case.batches[0][name], strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_network_is_left_as_it_was():
    network = small_net()
    flags = {name: index % 2 == 0 for index, (name, _) in enumerate(network.named_parameters())}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(flags[name])
    with only_trainable(network, ["stem.0.weight"]):
        assert [name for name, one in network.named_parameters() if one.requires_grad] == ["stem.0.weight"]
    assert {name: one.requires_grad for name, one in network.named_parameters()} == flags
    assert not any(module._forward_hooks for module in network.modules())


# --- the table ------------------------------------------------------------------------------------------


def test_candidates_are_those_better_than_all_cheaper_ones(case):
    layer = case.layers[0]
    grids = ((1, 4, BATCH), (1, 3, 8), (1, 5, 9), (2, 9))
    table = ErrorTable(layer, BATCH, grids)
    for tensors in case.batches:
        table.add(*tensors[layer.name], case.spectra[layer.name])
    every = [table.candidate(ranks) for ranks in itertools.product(*grids)]
    assert all(one.nbytes == factored_activation_bytes(layer, BATCH, one.ranks) for one in every)
    best = [
        one
        for one in every
        if not any(other.error <= one.error and other.nbytes <= one.nbytes and other != one for other in every)
    ]
    assert table.frontier() == sorted(best, key=lambda one: one.nbytes) == frontier(every)
    assert 3 < len(best) < len(every)


def test_the_whole_batch_mode_costs_no_factor():
    layer = conv_layer(3, (4, 4), 2)
    table = ErrorTable(layer, 6, ((5, 6), (2,), (3,), (4,)))
    table.add(
        torch.ones(6, 3, 4, 4), torch.ones(6, 2, 4, 4), own_spectra("x", {"x": (torch.ones(6, 3, 4, 4),)})
    )
    others = 3 * 2 + 4 * 3 + 4 * 4
    assert table.candidate((5, 2, 3, 4)).nbytes == 4 * (5 * 2 * 3 * 4 + 6 * 5 + others)
    assert table.candidate((6, 2, 3, 4)).nbytes == 4 * (6 * 2 * 3 * 4 + others)


def test_equal_bytes_and_equal_errors_leave_one_candidate():
    twins = [
        Candidate((1, 1, 1, 2), 40, 2.0),
        Candidate((1, 1, 2, 1), 40, 1.0),
        Candidate((2, 1, 1, 1), 60, 1.0),
    ]
    assert frontier(twins) == [twins[1]]


# --- searches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_errors_are_mean_distances_to_the_exact_gradient(case, method):
    (result,) = SEARCHES[method](case.task(0.15), case.spectra, case.batches)
    spectra_of = case.calibrated if method == "lance" else own_spectra
    for layer, choices in zip(case.layers, result.layers, strict=True):
        assert choices.layer == layer.name
        picked = [*choices.candidates[:: max(1, len(choices.candidates) // 4)], choices.uniform]
        for one in picked:
            expected = case.mean_distance(layer, one.ranks, spectra_of)
            assert one.error == pytest.approx(expected, rel=1e-3, abs=1e-5 * choices.gradient_norm)
            assert one.nbytes == factored_activation_bytes(layer, BATCH, one.ranks)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.7])
def test_a_budget_beats_one_energy_at_equal_bytes(case, method, share):
    task = case.task(share)
    (result,) = SEARCHES[method](task, case.spectra, case.batches)
    plan = plan_budget(method, task.budget, result)
    assert total_bytes(plan.chosen) <= task.budget
    assert total_bytes(plan.uniform) <= task.budget
    if method == "lance":
        assert total_error(plan.chosen) < 0.9 * total_error(plan.uniform)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_a_budget_beats_one_energy_on_images_that_neither_has_seen(case, share):
    """Subspaces from two batches, ranks judged on a third, both plans compared on three more."""
    task = case.task(share)
    (result,) = search_lance(task, case.spectra, case.batches[2:])
    plan = plan_budget("lance", task.budget, result)
    unseen = [case.tensors(seed) for seed in (10, 11, 12)]
    errors = {
        name: sum(
            case.mean_distance(layer, one.ranks, case.calibrated, unseen)
            for layer, one in zip(case.layers, candidates, strict=True)
        )
        for name, candidates in (("budget", plan.chosen), ("one energy", plan.uniform))
    }
    assert errors["budget"] < 0.95 * errors["one energy"]


def test_the_single_energy_fills_the_budget(case):
    task = case.task(0.2)
    (result,) = search_lance(task, case.spectra, case.batches[:1])
    eigenvalues = {name: [one.eigenvalues for one in modes] for name, modes in case.spectra.items()}
    ranks = ranks_by_energy(eigenvalues, result.energy)
    assert {one.layer: one.uniform.ranks for one in result.layers} == ranks
    assert activation_bytes(case.layers, BATCH, ranks) <= task.budget
    # The next larger energy at which any rank changes no longer fits.
    shares = np.concatenate([np.cumsum(v) / v.sum() for modes in eigenvalues.values() for v in modes])
    above = min(share for share in shares if share > result.energy + 1e-9)
    more = ranks_by_energy(eigenvalues, above + 1e-9)
    assert activation_bytes(case.layers, BATCH, more) > task.budget


def test_asi_offers_one_energy_per_layer(case):
    (result,) = search_asi(case.task(0.3), {}, case.batches)
    for layer, choices in zip(case.layers, result.layers, strict=True):
        values = [one.eigenvalues for one in own_spectra(layer.name, case.batches[0])]
        energies = (1e-9, *perplexity.ENERGIES, result.energy)
        allowed = {ranks_by_energy({"x": values}, energy)["x"] for energy in energies}
        assert {one.ranks for one in choices.candidates} <= allowed
        assert choices.candidates[0].ranks == (1, 1, 1, 1)


def test_selections_are_searched_together(case):
    """Two layers and all four: each as if it were alone, with its own single energy."""
    both = replace(case.task(0.2), selections=(case.layers[:2], case.layers))
    for search in SEARCHES.values():
        few, every = search(both, case.spectra, case.batches[:2])
        assert [one.layer for one in few.layers] == list(LAYERS[:2])
        assert [one.layer for one in every.layers] == list(LAYERS)
        assert few.energy > every.energy
        (alone,) = search(replace(both, selections=(case.layers[:2],)), case.spectra, case.batches[:2])
        assert alone.energy == few.energy
        for left, right in zip(alone.layers, few.layers, strict=True):
            assert left.uniform.ranks == right.uniform.ranks
            assert left.uniform.error == pytest.approx(
                right.uniform.error, rel=1e-4
            )  # another grid, other sums


@pytest.mark.parametrize("method", SEARCHES)
def test_refuses_to_search_without_batches(case, method):
    with pytest.raises(ValueError, match="perplexity search: expected one batch or more, found none"):
        SEARCHES[method](case.task(0.2), case.spectra, [])


def test_refuses_a_budget_below_rank_one(case):
    eigenvalues = {name: [one.eigenvalues for one in modes] for name, modes in case.spectra.items()}
    with pytest.raises(ValueError, match="expected room for rank 1 in every mode, found 100 bytes"):
        energy_for_budget(case.layers, eigenvalues, BATCH, 100)
