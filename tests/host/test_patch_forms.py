"""Weight gradients in patch mode against a literal im2col in PyTorch, for every kind of convolution."""

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
    random_basis,
    relative_error,
    run_graph,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_edge.accounting import bp_forward_macs
from lance_edge.manifest import Layer, Schedule
from lance_edge.patch_accounting import PatchCost
from lance_host import patch_forms
from lance_host.autodiff import conv
from lance_host.autodiff.emit import Emit
from lance_host.forms import LayerContext
from lance_host.graph_cost import graph_macs
from lance_host.methods import METHODS, patch_projection_inputs

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# As in test_methods.py: chained float32 sums of up to some 1e4 terms err by some 1e-6 of the largest entry;
# 1e-4 is the bound that the project promises, and leaves room for gradients that cancel.
TOLERANCE = 1e-4
BATCH = 16
UNEVEN_PARTS = (5, 3, 8)
SCHEDULES = ("one pass", "two passes")


def layer_of(case: ConvCase) -> Layer:
    shapes = (case.weight_shape, case.input_shape, (case.out, *case.out_size))
    return Layer("layer", "layer.weight", *shapes, case.stride, case.pads, case.dilation, case.groups)


def modes(case: ConvCase) -> tuple[int, int, int]:
    return BATCH, math.prod(case.weight_shape[1:]), math.prod(case.out_size)


def half(case: ConvCase) -> tuple[int, ...]:
    return tuple(math.ceil(size / 2) for size in modes(case))


def random_bases(case: ConvCase, ranks: Sequence[int], seed: int = 1) -> dict[str, Array]:
    """The projections that a device is fed, by name."""
    rng, (batch, inputs, positions) = np.random.default_rng(seed), modes(case)
    of_groups = np.stack([random_basis(rng, inputs, ranks[1]) for _ in range(case.groups)])
    bases = {
        0: random_basis(rng, batch, ranks[0]),
        1: of_groups if case.groups > 1 else of_groups[0],
        2: random_basis(rng, positions, ranks[2]),
    }
    names = patch_projection_inputs(layer_of(case), ranks, BATCH)
    return {str(value.name): bases[mode] for mode, value in names.items()}


def literal_gradient(case: ConvCase, sample: dict[str, Array], bases: dict[str, Array]) -> torch.Tensor:
    """im2col, every mode projected and rebuilt, then dY times patches, group by group."""
    x, dy = (torch.from_numpy(sample[name]).double() for name in ("x", "dy"))
    columns = torch.nn.functional.unfold(case.padded(x), case.kernel, case.dilation, 0, case.stride)
    patches = columns.reshape(BATCH, case.groups, -1, columns.shape[-1])  # [B, g, D, L]
    if "layer/U0" in bases:
        batch = torch.from_numpy(bases["layer/U0"]).double()
        patches = torch.einsum("br,cr,cgdl->bgdl", batch, batch, patches)
    if "layer/U2" in bases:
        positions = torch.from_numpy(bases["layer/U2"]).double()
        patches = patches @ positions @ positions.T
    inputs = torch.from_numpy(bases["layer/U1"]).double().reshape(case.groups, patches.shape[2], -1)
    patches = torch.einsum("gdr,ger,bgel->bgdl", inputs, inputs, patches)
    apart = dy.reshape(BATCH, case.groups, -1, patches.shape[-1])  # [B, g, O/g, L]
    return torch.einsum("bgol,bgdl->god", apart, patches).reshape(case.weight_shape)


@dataclass(frozen=True)
class Compressed:
    whole: ir.Model  # x, dy, U0..U2 -> grad_w
    forward: ir.Model | None
    backward: ir.Model
    gradient: ir.Model

    def in_parts(self, sample: dict[str, Array], bases: dict[str, Array]) -> Array:
        """Statistics of each micro-batch with its own rows of U0, summed, then the gradient from the sums."""
        totals: dict[str, Array] = {}
        for model in filter(None, (self.forward, self.backward)):
            before = dict(totals)
            for start, stop in itertools.pairwise(np.cumsum([0, *UNEVEN_PARTS])):
                values = {"x": sample["x"][start:stop], "dy": sample["dy"][start:stop], **bases, **before}
                if "layer/U0" in bases:
                    values["layer/U0"] = bases["layer/U0"][start:stop]
                for name, array in run_graph(model, values).items():
                    totals[name] = totals.get(name, 0) + array
        return run_graph(self.gradient, {**bases, **totals})["grad_w"]


def compress(case: ConvCase, ranks: Sequence[int], schedule: Schedule = "one pass") -> Compressed:
    whole = case.model()
    graph = whole.graph
    inputs = patch_projection_inputs(layer_of(case), ranks, BATCH)
    context = LayerContext("layer", tuple(ranks), inputs, schedule, "patch")
    graph.inputs.extend(inputs.values())

    def weight_gradient(emit: Emit, node: ir.Node, dy: ir.Value) -> ir.Value:
        return METHODS["lance"].gradient(emit, context, conv.geometry(node), graph.inputs[0], dy)

    (gradient,) = append_gradients(whole, ["w"], {(graph[0], 1): weight_gradient})
    *early, late = [declare_float(value) for value in context.statistics]
    data = [value for value in graph.inputs if value.name != "w"]
    fixed = [value for mode, value in inputs.items() if mode > 0]

    def part(reads: Sequence[ir.Value], *gives: ir.Value) -> ir.Model:
        return ir.Model(ir.convenience.extract(graph, reads, gives), ir_version=8)

    return Compressed(
        whole,
        part([value for value in data if value.name != "dy"], *early) if early else None,
        part([*data, *(early if schedule == "two passes" else [])], late),
        part([*early, late, *fixed], gradient),
    )


def check(case: ConvCase, ranks: Sequence[int], schedule: Schedule) -> None:
    sample, bases = case.sample(np.random.default_rng(0), BATCH), random_bases(case, ranks)
    compressed = compress(case, ranks, schedule)
    truth = literal_gradient(case, sample, bases)
    whole = run_graph(compressed.whole, {**sample, **bases})["grad_w"]
    assert relative_error(whole, truth) < TOLERANCE, "whole batch"
    parts = compressed.in_parts(sample, bases)
    assert relative_error(parts, truth) < TOLERANCE, "micro-batches"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["rank 1", "half", "no batch mode", "inputs alone"])
def test_gradient_is_that_of_the_rebuilt_patches(name: str, kind: str, schedule: Schedule) -> None:
    case = CASES[name]
    ranks = {
        "rank 1": (1, 1, 1),
        "half": half(case),
        "no batch mode": (BATCH, *half(case)[1:]),
        "inputs alone": (BATCH, half(case)[1], modes(case)[2]),
    }
    check(case, ranks[kind], schedule)


@pytest.mark.parametrize("name", [name for name in CASES if "depthwise" in name])
def test_depthwise_by_filters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_forms, "MOST_COMPOSED_VALUES", 0)
    check(CASES[name], half(CASES[name]), "two passes")


@pytest.mark.parametrize("name", ["pointwise odd", "3x3 strided dilated", "depthwise 3x3", "3x3 grouped"])
def test_full_rank_is_backpropagation(name: str) -> None:
    case = CASES[name]
    sample, bases = case.sample(np.random.default_rng(0), BATCH), random_bases(case, modes(case))
    assert set(bases) == {"layer/U1"}
    found = run_graph(compress(case, modes(case)).whole, {**sample, **bases})["grad_w"]
    truth = case.weight_gradient(*(torch.from_numpy(sample[key]).double() for key in ("x", "dy")))
    assert relative_error(found, truth) < TOLERANCE


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=conv_cases(), schedule=st.sampled_from(SCHEDULES), data=st.data())
def test_any_geometry_at_any_ranks(case: ConvCase, schedule: Schedule, data: st.DataObject) -> None:
    check(case, [data.draw(st.integers(1, size)) for size in modes(case)], schedule)


@pytest.mark.parametrize(
    ("name", "ranks", "form"),
    [
        ("pointwise strided", (4, 3, 2), patch_forms.ONE_TAP),
        ("3x3 same", (4, 3, 2), patch_forms.FILTERS),
        ("3x3 same", (BATCH, 3, 36), patch_forms.FILTERS),  # 3 coefficients of each position, 4 channels
        ("3x3 same", (BATCH, 4, 36), patch_forms.INPUT_KEPT),
        ("3x3 same", (BATCH - 1, 4, 36), patch_forms.FILTERS),
        ("depthwise 3x3", (4, 3, 2), patch_forms.DEPTHWISE_COMPOSED),
        ("depthwise on a map too large for pairs", (4, 3, 2), patch_forms.FILTERS),
        ("3x3 grouped", (4, 3, 2), patch_forms.FILTERS),
        ("3x3 grouped", (BATCH, 3, 30), patch_forms.INPUT_KEPT),
    ],
)
def test_each_kind_has_its_form(name: str, ranks: tuple[int, ...], form: object) -> None:
    """So that the cases above are known to reach every form."""
    case = CASES[name]
    context = LayerContext("layer", ranks, patch_projection_inputs(layer_of(case), ranks, BATCH), mode="patch")
    assert patch_forms.patch_form(context, conv.geometry(case.model().graph[0])) is form


@pytest.mark.parametrize("ranks", [(2, 1, 15), (2, 6, 2), (2, 3, 7)])
def test_the_order_of_two_products_is_the_cheaper_one(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the emitted graph, node by node."""

    def macs() -> int:
        forward = compress(CASES["pointwise odd"], ranks).forward
        assert forward is not None
        return graph_macs(forward, BATCH)

    chosen, others = macs(), []
    for inputs_first in (True, False):
        monkeypatch.setattr(patch_forms, "projects_inputs_first", lambda *_, first=inputs_first: first)
        others.append(macs())
    assert chosen == min(others)


@pytest.mark.parametrize(
    ("ranks", "schedule", "shapes"),
    [
        ((4, 3, 2), "one pass", {"layer/G": (3, 4, 2), "layer/D": (5, 4, 2)}),
        ((4, 3, 2), "two passes", {"layer/G": (3, 4, 2), "layer/narrow": (5, 3)}),
        ((BATCH, 3, 2), "one pass", {"layer/narrow": (5, 3)}),
        ((BATCH, 4, 36), "one pass", {"layer/narrow": (5, 36)}),
    ],
)
def test_statistics_do_not_grow_with_the_micro_batch(
    ranks: tuple[int, ...], schedule: Schedule, shapes: dict[str, tuple[int, ...]]
) -> None:
    case = CASES["3x3 same"]
    for batch in (3, 8):
        bases = random_bases(case, ranks)
        bases = {name: value[:batch] if name == "layer/U0" else value for name, value in bases.items()}
        compressed, found = compress(case, ranks, schedule), dict[str, Array]()
        for model in filter(None, (compressed.forward, compressed.backward)):
            found |= run_graph(model, {**case.sample(np.random.default_rng(0), batch), **bases, **found})
        assert {name: array.shape for name, array in found.items()} == shapes


def test_projection_inputs_have_the_names_and_shapes_that_a_device_feeds() -> None:
    def shapes(name: str, ranks: tuple[int, ...]) -> dict[str, list[str]]:
        values = patch_projection_inputs(layer_of(CASES[name]), ranks, BATCH).values()
        return {str(value.name): [str(dim) for dim in value.shape or ()] for value in values}

    assert shapes("3x3 grouped", (7, 4, 2)) == {
        "layer/U0": ["N", "7"],
        "layer/U1": ["2", "27", "4"],
        "layer/U2": ["30", "2"],
    }
    assert shapes("3x3 same", (BATCH, 4, 36)) == {"layer/U1": ["36", "4"]}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("3x3 same", (4, 3, 2)),
        ("3x3 same", (BATCH, 3, 2)),
        ("3x3 same", (4, 3, 36)),
        ("3x3 same", (BATCH, 5, 36)),
        ("3x3 grouped strided dilated", (3, 4, 5)),
        ("depthwise on a map too large for pairs", (4, 3, 2)),
    ],
)
def test_the_costs_told_are_those_of_arrays_and_graphs(name: str, ranks: tuple[int, ...]) -> None:
    """Bytes of what is fed and kept, multiply-adds of the emitted graphs, node by node."""
    case = CASES[name]
    cost, compressed = PatchCost(layer_of(case), BATCH, ranks), compress(case, ranks)
    bases = random_bases(case, ranks)
    values = {**case.sample(np.random.default_rng(0), BATCH), **bases}
    assert cost.factor_bytes == sum(base.nbytes for base in bases.values())
    late = graph_macs(compressed.backward, BATCH) + graph_macs(compressed.gradient, BATCH)
    if cost.keeps_input:
        assert cost.activation_bytes == values["x"].nbytes + cost.factor_bytes
        assert cost.forward_macs == bp_forward_macs(layer_of(case), BATCH)
        assert cost.weight_gradient_macs <= late  # padding is multiplied too
        return
    if ranks[0] == BATCH:  # no batch mode: backward computes the coefficients, too
        assert cost.forward_macs + cost.weight_gradient_macs == bp_forward_macs(layer_of(case), BATCH) + late
        return
    assert compressed.forward is not None
    core = run_graph(compressed.forward, values)["layer/G"]
    assert cost.activation_bytes == core.nbytes + cost.factor_bytes
    early = graph_macs(compressed.forward, BATCH)
    assert cost.forward_macs == bp_forward_macs(layer_of(case), BATCH) + early
    assert cost.weight_gradient_macs == late
