"""LANCE weight gradients against the literal method: project, rebuild, convolve (arXiv 2509.21617)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conv_cases import CASES, ConvCase, conv_cases
from graph_runner import (
    Array,
    append_gradients,
    declare_float,
    open_session,
    project_and_rebuild,
    random_projections,
    relative_error,
    run_graph,
    run_session,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_host import methods
from lance_host.autodiff import conv
from lance_host.autodiff.emit import Emit
from lance_host.graph_cost import graph_macs
from lance_host.methods import METHODS, PLANNED_MICRO_BATCH, LayerContext, projection_inputs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# The literal form runs in float64.  Float32 sums of up to some 1e4 terms, chained over four projections, two
# rebuilds and one convolution, err by some 1e-6 of the gradient's largest entry; 1e-4 is the bound that the
# project promises, and leaves room for gradients that cancel.
TOLERANCE = 1e-4
BATCH = 16
UNEVEN_PARTS = (5, 3, 8)


@dataclass(frozen=True)
class Compressed:
    """One convolution with its LANCE gradient: the whole graph, and the two parts that a device runs."""

    whole: ir.Model  # x, dy, U0..U3 -> grad_w
    statistics: ir.Model  # x, dy, U0..U3 -> G, D
    rebuild: ir.Model  # G, D, U1..U3 -> grad_w


def compress(case: ConvCase, ranks: Sequence[int]) -> Compressed:
    whole = case.model()
    graph = whole.graph
    context = LayerContext("layer", tuple(ranks), projection_inputs("layer", case.input_shape, ranks))
    graph.inputs.extend(context.projections)

    def weight_gradient(emit: Emit, node: ir.Node, dy: ir.Value) -> ir.Value:
        return METHODS["lance"](emit, context, conv.geometry(node), graph.inputs[0], dy)

    (gradient,) = append_gradients(whole, ["w"], {(graph[0], 1): weight_gradient})
    statistics = [declare_float(value) for value in context.statistics]
    assert [value.name for value in statistics] == ["layer/G", "layer/D"]
    inputs = {value.name: value for value in graph.inputs}
    rows = inputs["layer/U0"]
    fixed = [value for value in context.projections if value is not rows]
    return Compressed(
        whole,
        ir.Model(
            ir.convenience.extract(graph, [inputs["x"], inputs["dy"], rows, *fixed], statistics), ir_version=8
        ),
        ir.Model(ir.convenience.extract(graph, [*statistics, *fixed], [gradient]), ir_version=8),
    )


def literal_gradient(case: ConvCase, sample: dict[str, Array], projections: dict[str, Array]) -> torch.Tensor:
    bases = [torch.from_numpy(projections[f"layer/U{mode}"]).double() for mode in range(4)]
    rebuilt = project_and_rebuild(torch.from_numpy(sample["x"]).double(), bases)
    return case.weight_gradient(rebuilt, torch.from_numpy(sample["dy"]).double())


def in_parts(
    compressed: Compressed, sample: dict[str, Array], projections: dict[str, Array], parts: Sequence[int]
) -> Array:
    """Statistics of each micro-batch with its own rows of U0, summed, then the gradient from the sums."""
    totals: dict[str, Array] = {}
    statistics = open_session(compressed.statistics)
    edges = np.cumsum([0, *parts])
    for start, stop in itertools.pairwise(edges):
        values = {"x": sample["x"][start:stop], "dy": sample["dy"][start:stop], **projections}
        values["layer/U0"] = projections["layer/U0"][start:stop]
        for name, array in run_session(statistics, values).items():
            totals[name] = totals[name] + array if name in totals else array
    return run_graph(compressed.rebuild, {**projections, **totals})["grad_w"]


def check(case: ConvCase, ranks: Sequence[int], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    sample = case.sample(rng, BATCH)
    projections = random_projections(rng, "layer", BATCH, case.input_shape, ranks)
    compressed = compress(case, ranks)
    truth = literal_gradient(case, sample, projections)
    whole = run_graph(compressed.whole, {**sample, **projections})["grad_w"]
    assert relative_error(whole, truth) < TOLERANCE, "whole batch"
    parts = in_parts(compressed, sample, projections, UNEVEN_PARTS)
    assert relative_error(parts, truth) < TOLERANCE, "micro-batches"
    assert relative_error(parts, whole) < TOLERANCE, "micro-batches against the whole batch"


def modes(case: ConvCase) -> tuple[int, ...]:
    return (BATCH, *case.input_shape)


def half(case: ConvCase) -> tuple[int, ...]:
    return tuple(math.ceil(size / 2) for size in modes(case))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["rank 1", "half", "full"])
def test_gradient_is_that_of_the_rebuilt_activation(name: str, kind: str) -> None:
    case = CASES[name]
    ranks = {"rank 1": (1, 1, 1, 1), "half": half(case), "full": modes(case)}[kind]
    check(case, ranks)


@pytest.mark.parametrize("name", [name for name in CASES if "depthwise" in name])
def test_depthwise_without_pairs_of_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "MAX_POSITION_PAIRS", 0)
    check(CASES[name], half(CASES[name]))


@pytest.mark.parametrize("name", ["pointwise odd", "3x3 strided dilated", "depthwise 3x3", "3x3 grouped"])
def test_full_rank_is_backpropagation(name: str) -> None:
    case = CASES[name]
    rng = np.random.default_rng(0)
    sample = case.sample(rng, BATCH)
    projections = random_projections(rng, "layer", BATCH, case.input_shape, modes(case))
    found = run_graph(compress(case, modes(case)).whole, {**sample, **projections})["grad_w"]
    truth = case.weight_gradient(*(torch.from_numpy(sample[key]).double() for key in ("x", "dy")))
    assert relative_error(found, truth) < TOLERANCE


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=conv_cases(), data=st.data())
def test_any_geometry_at_any_ranks(case: ConvCase, data: st.DataObject) -> None:
    ranks = [data.draw(st.integers(1, size)) for size in modes(case)]
    check(case, ranks)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(CASES)), data=st.data())
def test_every_kind_at_any_ranks(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    check(case, [data.draw(st.integers(1, size)) for size in modes(case)])


@pytest.mark.parametrize(
    ("name", "ranks", "form"),
    [
        ("pointwise", (4, 3, 2, 2), methods._rebuild_channels_only),
        ("pointwise strided", (4, 3, 2, 2), methods._rebuild_channels_only),
        ("pointwise", (4, 3, 4, 4), methods._rebuild_space),
        ("3x3 same", (4, 3, 2, 2), methods._rebuild_space),
        ("depthwise 3x3", (4, 3, 2, 2), methods._rebuild_by_positions),
        ("depthwise on a map too large for pairs", (4, 3, 2, 2), methods._rebuild_all),
        ("3x3 grouped", (4, 3, 2, 2), methods._rebuild_all),
    ],
)
def test_each_kind_has_its_form(name: str, ranks: tuple[int, ...], form: object) -> None:
    """So that the cases above are known to reach every form."""
    case = CASES[name]
    context = LayerContext("layer", ranks, ())
    assert methods._form(context, conv.geometry(case.model().graph[0])).rebuild is form


def test_statistics_do_not_grow_with_the_micro_batch() -> None:
    case, ranks = CASES["3x3 same"], (4, 3, 2, 2)
    rng = np.random.default_rng(0)
    projections = random_projections(rng, "layer", BATCH, case.input_shape, ranks)
    shapes = []
    for batch in (3, 8):
        values = {**case.sample(rng, batch), **projections}
        values["layer/U0"] = projections["layer/U0"][:batch]
        found = run_graph(compress(case, ranks).statistics, values)
        shapes.append({name: array.shape for name, array in found.items()})
    assert shapes[0] == shapes[1] == {"layer/G": (4, 3, 4), "layer/D": (4, 5, 36)}


@pytest.mark.parametrize("ranks", [(1, 1, 1, 4), (2, 4, 3, 3), (1, 6, 6, 6), (12, 1, 2, 2), (16, 6, 2, 1)])
def test_contraction_order_is_the_cheapest_of_all(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the emitted graphs, node by node, at the micro-batch for which the order is planned."""

    def macs() -> int:
        return graph_macs(compress(CASES["3x3 same"], ranks).statistics, PLANNED_MICRO_BATCH)

    chosen, others = macs(), []
    for order in itertools.permutations(("batch", "channels", "space")):
        monkeypatch.setattr(methods, "contraction_order", lambda *_, order=order: order)
        others.append(macs())
    assert chosen == min(others) < max(others)


def test_projection_inputs_have_the_names_and_shapes_that_a_device_feeds() -> None:
    values = projection_inputs("blocks.1.conv", (6, 5, 4), (7, 3, 2, 1))
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in values}
    assert shapes == {
        "blocks.1.conv/U0": ["N", "7"],
        "blocks.1.conv/U1": ["6", "3"],
        "blocks.1.conv/U2": ["5", "2"],
        "blocks.1.conv/U3": ["4", "1"],
    }
