"""Dropout from seeds: as random as it must be, and the same wherever it is computed."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_runner import Array, append_gradients, graph_of_nodes, run_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from lance_edge.errors import ModelError
from lance_host.autodiff.dropout import PRIME, SEEDS, seed_dropouts

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


def masks(model: ir.Model, seeds: Array) -> Array:
    """What the graph makes of ones."""
    ones = np.ones((len(seeds), *SIZE), np.float32)
    (result,) = run_graph(model, {"x": ones, SEEDS: seeds}).values()
    return result


def seeded(model: ir.Model) -> ir.Model:
    assert seed_dropouts(model.graph) is not None
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
    found = run_graph(model, {"x": x, "dy": dy, SEEDS: seeds})["grad_x"]
    np.testing.assert_allclose(found, dy * masks(seeded(two_dropouts(0.4)), seeds), rtol=1e-6)


def test_without_dropout_nothing_changes() -> None:
    node = helper.make_node("Dropout", ["x"], ["y"])  # at inference: the identity
    model = graph_of_nodes([node], {"x": ("N", 3)}, {})
    assert seed_dropouts(model.graph) is None
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_a_dropout_that_was_not_seeded_cannot_be_trained() -> None:
    with pytest.raises(ModelError, match=r"drop: this Dropout draws another mask .*evaluation mode"):
        append_gradients(one_dropout(0.5), ["x"])


def test_the_batch_must_come_first() -> None:
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
    node = helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="drop")
    model = graph_of_nodes([node], {"x": (7, "N")}, constants)
    with pytest.raises(ModelError, match=r"drop: expected the batch as first axis .*found \(7, 'N'\)"):
        seed_dropouts(model.graph)
