"""Graphs compiled at some ranks, run at others: still the literal gradient; and any number of classes."""

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
import test_patch_forms
from conv_cases import CASES, ConvCase
from graph_runner import relative_error, run_graph
from test_patch_forms import BATCH, SCHEDULES, TOLERANCE, compress, half, literal_gradient, modes, random_bases

from lance_edge.errors import LanceError
from lance_edge.manifest import Schedule
from lance_host.forms import LayerContext
from lance_host.request import Request, check

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(autouse=True)
def any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_patch_forms, "LayerContext", functools.partial(LayerContext, takes_any_rank=True))


def opened(model: ir.Model) -> ir.Model:
    """Without declared ranks and inferred shapes, as `any_rank.open_shapes` leaves it."""
    for node in model.graph:
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name != "x" and value.name != "dy" and value.shape is not None and value.name != "grad_w":
            value.shape = ir.Shape([f"{value.name} {axis}" for axis in range(len(value.shape))])
    return model


def others(case: ConvCase) -> list[tuple[int, int, int]]:
    """Other ranks of the same modes: 1 each, all but one direction, and everything that fits."""
    batch, inputs, positions = modes(case)
    return [(1, 1, 1), (BATCH - 1, max(1, inputs - 1), max(1, positions - 1)), (batch, inputs, positions)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_other_ranks_give_the_literal_gradient(name: str, schedule: Schedule) -> None:
    case = CASES[name]
    sample = case.sample(np.random.default_rng(0), BATCH)
    model = opened(compress(case, half(case), schedule).whole)
    for ranks in others(case):
        bases = all_modes(case, ranks)
        found = run_graph(model, {**sample, **bases})["grad_w"]
        assert relative_error(found, literal_gradient(case, sample, bases)) < TOLERANCE, ranks


@pytest.mark.parametrize("name", CASES)
def test_kept_inputs_take_any_rank_too(name: str) -> None:
    """Batch and positions whole: only U1 is fed."""
    case = CASES[name]
    batch, inputs, positions = modes(case)
    sample = case.sample(np.random.default_rng(0), BATCH)
    model = opened(compress(case, (batch, inputs, positions)).whole)
    for rank in (1, max(1, inputs // 2)):
        bases = random_bases(case, (batch, rank, positions))
        found = run_graph(model, {**sample, **bases})["grad_w"]
        assert relative_error(found, literal_gradient(case, sample, bases)) < TOLERANCE, rank


def test_a_basis_of_zeros_gives_no_gradient() -> None:
    case = CASES["3x3 grouped"]
    sample, bases = case.sample(np.random.default_rng(0), BATCH), all_modes(case, (3, 1, 2))
    bases["layer/U1"] = np.zeros_like(bases["layer/U1"])
    found = run_graph(opened(compress(case, half(case)).whole), {**sample, **bases})["grad_w"]
    assert not found.any()


def all_modes(case: ConvCase, ranks: Sequence[int]) -> dict[str, np.ndarray]:
    """Bases of all modes, also of those that such ranks leave whole: the graphs read them all."""
    batch, _, positions = modes(case)
    bases = random_bases(case, (max(1, batch - 1), ranks[1], max(1, positions - 1)))
    rng = np.random.default_rng(7)
    for name, size, rank in (("layer/U0", batch, ranks[0]), ("layer/U2", positions, ranks[2])):
        if name in bases or positions > 1 or name == "layer/U0":
            bases[name] = np.linalg.qr(rng.standard_normal((size, size)))[0][:, :rank].astype(np.float32)
    return bases


def test_it_is_of_patch_mode(tmp_path: object) -> None:
    request = Request(model="mcunet", data=None, output=tmp_path / "x.tar", any_rank=True)  # type: ignore[operator]
    with pytest.raises(LanceError, match="--any-rank: of patch mode; add --mode patch"):
        check(request)
