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

from lance_edge.manifest import METHOD_NAMES, Schedule
from lance_host import conv_forms
from lance_host.autodiff import conv
from lance_host.autodiff.emit import Emit
from lance_host.forms import LayerContext
from lance_host.graph_cost import graph_macs
from lance_host.methods import METHODS, projection_inputs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# The literal form runs in float64.  Float32 sums of up to some 1e4 terms, chained over four projections, two
# rebuilds and one convolution, err by some 1e-6 of the gradient's largest entry; 1e-4 is the bound that the
# project promises, and leaves room for gradients that cancel.
TOLERANCE = 1e-4
BATCH = 16
UNEVEN_PARTS = (5, 3, 8)


SCHEDULES = ("one pass", "two passes")


@dataclass(frozen=True)
class Compressed:
    """One convolution with its LANCE gradient: the whole graph, and the parts that a device runs."""

    whole: ir.Model  # x, dy, U0..U3 -> grad_w
    forward: ir.Model | None  # x, U0..U3 -> G
    backward: ir.Model  # x, dy, U0..U3, in two passes the complete G -> D, or the narrow gradient
    gradient: ir.Model  # statistics, U1..U3 -> grad_w

    def in_parts(self, sample: dict[str, Array], projections: dict[str, Array], parts: Sequence[int]) -> Array:
        """Statistics of each micro-batch with its own rows of U0, summed, then the gradient from the sums."""
        edges = np.cumsum([0, *parts])
        totals: dict[str, Array] = {}
        for model in (self.forward, self.backward):
            session, before = open_session(model) if model is not None else None, dict(totals)
            for start, stop in itertools.pairwise(edges):
                values = {"x": sample["x"][start:stop], "dy": sample["dy"][start:stop], **projections, **before}
                if "layer/U0" in projections:
                    values["layer/U0"] = projections["layer/U0"][start:stop]
                for name, array in (run_session(session, values) if session else {}).items():
                    totals[name] = totals.get(name, 0) + array
        return run_graph(self.gradient, {**projections, **totals})["grad_w"]


def compress(case: ConvCase, ranks: Sequence[int], schedule: Schedule = "one pass") -> Compressed:
    whole = case.model()
    graph = whole.graph
    inputs = projection_inputs("layer", case.input_shape, ranks, BATCH)
    context = LayerContext("layer", tuple(ranks), inputs, schedule)
    graph.inputs.extend(inputs.values())

    def weight_gradient(emit: Emit, node: ir.Node, dy: ir.Value) -> ir.Value:
        return METHODS["lance"].gradient(emit, context, conv.geometry(node), graph.inputs[0], dy)

    (gradient,) = append_gradients(whole, ["w"], {(graph[0], 1): weight_gradient})
    *early, late = [declare_float(value) for value in context.statistics]
    data = [value for value in graph.inputs if value.name != "w"]  # x, projections, dy
    without_dy = [value for value in data if value.name != "dy"]
    fixed = [value for mode, value in inputs.items() if mode > 0]

    def part(reads: Sequence[ir.Value], *gives: ir.Value) -> ir.Model:
        return ir.Model(ir.convenience.extract(graph, reads, gives), ir_version=8)

    complete = early if schedule == "two passes" else []
    return Compressed(
        whole,
        part(without_dy, *early) if early else None,
        part([*data, *complete], late),
        part([*early, late, *fixed], gradient),
    )


def literal_gradient(case: ConvCase, sample: dict[str, Array], projections: dict[str, Array]) -> torch.Tensor:
    rebuilt = project_and_rebuild(torch.from_numpy(sample["x"]).double(), projections)
    return case.weight_gradient(rebuilt, torch.from_numpy(sample["dy"]).double())


def check(case: ConvCase, ranks: Sequence[int], schedule: Schedule, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    sample = case.sample(rng, BATCH)
    projections = random_projections(rng, "layer", BATCH, case.input_shape, ranks)
    compressed = compress(case, ranks, schedule)
    truth = literal_gradient(case, sample, projections)
    whole = run_graph(compressed.whole, {**sample, **projections})["grad_w"]
    assert relative_error(whole, truth) < TOLERANCE, "whole batch"
    parts = compressed.in_parts(sample, projections, UNEVEN_PARTS)
    assert relative_error(parts, truth) < TOLERANCE, "micro-batches"
    assert relative_error(parts, whole) < TOLERANCE, "micro-batches against the whole batch"


def modes(case: ConvCase) -> tuple[int, ...]:
    return (BATCH, *case.input_shape)


def half(case: ConvCase) -> tuple[int, ...]:
    return tuple(math.ceil(size / 2) for size in modes(case))


def no_batch_mode(case: ConvCase) -> tuple[int, ...]:
    return (BATCH, *half(case)[1:])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["rank 1", "half", "no batch mode", "almost full"])
def test_gradient_is_that_of_the_rebuilt_activation(name: str, kind: str, schedule: Schedule) -> None:
    case = CASES[name]
    almost = (BATCH - 1, *modes(case)[1:])
    ranks = {
        "rank 1": (1, 1, 1, 1),
        "half": half(case),
        "no batch mode": no_batch_mode(case),
        "almost full": almost,
    }
    check(case, ranks[kind], schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in CASES if "depthwise" in name])
def test_depthwise_without_pairs_of_positions(
    name: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "MAX_POSITION_PAIRS", 0)
    check(CASES[name], half(CASES[name]), schedule)


@pytest.mark.parametrize("name", ["pointwise odd", "3x3 strided dilated", "depthwise 3x3", "3x3 grouped"])
def test_full_rank_is_backpropagation(name: str) -> None:
    case = CASES[name]
    rng = np.random.default_rng(0)
    sample = case.sample(rng, BATCH)
    projections = random_projections(rng, "layer", BATCH, case.input_shape, modes(case))
    assert "layer/U0" not in projections
    found = run_graph(compress(case, modes(case)).whole, {**sample, **projections})["grad_w"]
    truth = case.weight_gradient(*(torch.from_numpy(sample[key]).double() for key in ("x", "dy")))
    assert relative_error(found, truth) < TOLERANCE


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=conv_cases(), schedule=st.sampled_from(SCHEDULES), data=st.data())
def test_any_geometry_at_any_ranks(case: ConvCase, schedule: Schedule, data: st.DataObject) -> None:
    ranks = [data.draw(st.integers(1, size)) for size in modes(case)]
    check(case, ranks, schedule)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(CASES)), schedule=st.sampled_from(SCHEDULES), data=st.data())
def test_every_kind_at_any_ranks(name: str, schedule: Schedule, data: st.DataObject) -> None:
    case = CASES[name]
    check(case, [data.draw(st.integers(1, size)) for size in modes(case)], schedule)


@pytest.mark.parametrize(
    ("name", "ranks", "form"),
    [
        ("pointwise", (4, 3, 2, 2), conv_forms.ONE_TAP_IN_SHORT_SPACE),
        ("pointwise strided", (4, 3, 2, 2), conv_forms.ONE_TAP_IN_SHORT_SPACE),
        ("pointwise", (4, 3, 4, 4), conv_forms.ONE_TAP),
        ("3x3 same", (4, 3, 2, 2), conv_forms.UNGROUPED),
        ("depthwise 3x3", (4, 3, 2, 2), conv_forms.DEPTHWISE_BY_POSITIONS),
        ("depthwise on a map too large for pairs", (4, 3, 2, 2), conv_forms.REBUILT),
        ("3x3 grouped", (4, 3, 2, 2), conv_forms.REBUILT),
    ],
)
def test_each_kind_has_its_form(name: str, ranks: tuple[int, ...], form: object) -> None:
    """So that the cases above are known to reach every form."""
    case = CASES[name]
    context = LayerContext("layer", ranks, {})
    assert conv_forms.conv_form(context, conv.geometry(case.model().graph[0])) is form


def statistics_shapes(
    case: ConvCase, ranks: Sequence[int], schedule: Schedule, batch: int
) -> dict[str, tuple[int, ...]]:
    rng = np.random.default_rng(0)
    projections = random_projections(rng, "layer", BATCH, case.input_shape, ranks)
    values = {**case.sample(rng, batch), **projections}
    if "layer/U0" in projections:
        values["layer/U0"] = projections["layer/U0"][:batch]
    compressed, found = compress(case, ranks, schedule), dict[str, Array]()
    for model in (compressed.forward, compressed.backward):
        found |= run_graph(model, values | found) if model is not None else {}
    return {name: array.shape for name, array in found.items()}


@pytest.mark.parametrize(
    ("ranks", "schedule", "shapes"),
    [
        ((4, 3, 2, 2), "one pass", {"layer/G": (3, 4, 4), "layer/D": (5, 4, 36)}),
        ((4, 3, 2, 2), "two passes", {"layer/G": (3, 4, 4), "layer/narrow": (5, 3, 3, 3)}),
        ((BATCH, 3, 2, 2), "one pass", {"layer/narrow": (5, 3, 3, 3)}),
    ],
)
def test_statistics_do_not_grow_with_the_micro_batch(
    ranks: tuple[int, ...], schedule: Schedule, shapes: dict[str, tuple[int, ...]]
) -> None:
    for batch in (3, 8):
        assert statistics_shapes(CASES["3x3 same"], ranks, schedule, batch) == shapes


@pytest.mark.parametrize("ranks", [(1, 1, 1, 4), (2, 4, 3, 3), (1, 6, 6, 6), (12, 1, 2, 2)])
def test_the_order_of_projections_is_the_cheaper_one(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the emitted graph, node by node."""

    def macs() -> int:
        forward = compress(CASES["3x3 same"], ranks).forward
        assert forward is not None
        return graph_macs(forward, BATCH)

    chosen, others = macs(), []
    for channels_first in (True, False):
        monkeypatch.setattr(conv_forms, "projects_channels_first", lambda *_, first=channels_first: first)
        others.append(macs())
    assert chosen == min(others)
    assert len(set(others)) == 2 or ranks[1] == 1


def test_projection_inputs_have_the_names_and_shapes_that_a_device_feeds() -> None:
    values = projection_inputs("blocks.1.conv", (6, 5, 4), (7, 3, 2, 1), batch_size=16)
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in values.values()}
    assert shapes == {
        "blocks.1.conv/U0": ["N", "7"],
        "blocks.1.conv/U1": ["6", "3"],
        "blocks.1.conv/U2": ["5", "2"],
        "blocks.1.conv/U3": ["4", "1"],
    }
    assert 0 not in projection_inputs("blocks.1.conv", (6, 5, 4), (16, 3, 2, 1), batch_size=16)


def test_the_names_that_devices_know_are_those_of_the_table() -> None:
    assert tuple(METHODS) == METHOD_NAMES
