"""One node with its gradient, against PyTorch autograd in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from graph_runner import (
    OPSET,
    Array,
    Shape,
    append_gradients,
    graph_of_nodes,
    open_session,
    relative_error,
    run_session,
)
from hypothesis import strategies as st
from onnx import helper

from lance_edge.graph_check import ALLOWED_OPS

# The rules run in float32 (unit roundoff 6e-8) and sum at most a few hundred terms of like size; the
# truth is float64.  The rounding error of such sums stays below 1e-5 of the largest entry.
TOLERANCE = 1e-5
BATCHES = (3, 5)  # a dynamic batch: the same graph must serve both


@dataclass(frozen=True)
class Case:
    """One node `op(inputs..., constants...) -> y` and the same function in PyTorch.

    `operands` is the order of the node's operands where it is not inputs, then constants; `before` and
    `after` are other nodes of the graph, and `outputs` those of the node, where `after` computes y of them.
    """

    inputs: Mapping[str, Shape]
    torch: Callable[..., torch.Tensor]
    constants: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("y",)
    before: tuple[onnx.NodeProto, ...] = ()
    after: tuple[onnx.NodeProto, ...] = ()
    positive: tuple[str, ...] = ()  # inputs that must stay away from zero
    rounded: tuple[str, ...] = ()  # inputs of whole numbers, so that many are equal
    opset: int = OPSET
    tolerance: float = TOLERANCE


def check(op: str, case: Case) -> None:
    """Gradients of all inputs for a random gradient of the output, at several batch sizes."""
    operands = case.operands or (*case.inputs, *case.constants)
    node = helper.make_node(op, operands, case.outputs, name="the_node", **case.attributes)
    model = graph_of_nodes([*case.before, node, *case.after], case.inputs, case.constants, case.opset)
    append_gradients(model, list(case.inputs))
    given = {op, *(other.op_type for other in (*case.before, *case.after))}
    written = {node.op_type.encode() for node in model.graph if node.op_type not in given}
    assert written <= ALLOWED_OPS, f"{op}: boards refuse {written - ALLOWED_OPS}"
    session = open_session(model)
    for batch in BATCHES if any("N" in shape for shape in case.inputs.values()) else BATCHES[:1]:
        rng = np.random.default_rng(batch)
        values = {name: _sample(rng, case, name, batch) for name in case.inputs}
        leaves = [torch.from_numpy(array).double().requires_grad_() for array in values.values()]
        y = case.torch(*leaves)
        dy = np.asarray(rng.standard_normal(y.shape), np.float32)
        truth = torch.autograd.grad(y, leaves, torch.from_numpy(dy).double())
        found = run_session(session, {**values, "dy": dy})
        for name, expected in zip(case.inputs, truth, strict=True):
            error = relative_error(found[f"grad_{name}"], expected)
            assert error < case.tolerance, f"{op}: {name}, batch {batch}"


def _sample(rng: np.random.Generator, case: Case, name: str, batch: int) -> Array:
    array = 2 * rng.standard_normal([batch if dim == "N" else int(dim) for dim in case.inputs[name]])
    if name in case.positive:
        array = np.abs(array) + 0.5
    if name in case.rounded:
        array = np.round(array)
    return np.asarray(array, np.float32)


# --- writing cases ----------------------------------------------------------------------------------------


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def number(value: float) -> Array:
    return np.array(value, np.float32)


def unary(
    function: Callable[[torch.Tensor], torch.Tensor],
    *,
    opset: int = OPSET,
    positive: bool = False,
    tolerance: float = TOLERANCE,
    **attributes: Any,
) -> st.SearchStrategy[Case]:
    """A function of one value on any shape."""
    return shapes(1, 4).map(
        lambda shape: Case(
            {"x": shape},
            function,
            attributes=attributes,
            positive=("x",) if positive else (),
            opset=opset,
            tolerance=tolerance,
        )
    )


@st.composite
def shapes(draw: st.DrawFn, least: int, most: int, batch: bool = True) -> Shape:
    """Sizes of 1 to 4 with `least` to `most` axes, the first of them mostly the batch."""
    rank = draw(st.integers(least, most))
    sizes: list[int | str] = [draw(st.integers(1, 4)) for _ in range(rank)]
    if batch and rank and draw(st.integers(0, 3)):
        sizes[0] = "N"
    return tuple(sizes)


@st.composite
def broadcast(draw: st.DrawFn, count: int, most: int = 3) -> list[Shape]:
    """`count` shapes that broadcast to one; an axis of the result may be the batch."""
    result = [draw(st.integers(2, 4)) for _ in range(draw(st.integers(0, most)))]
    batch = draw(st.integers(0, len(result) - 1)) if result and draw(st.integers(0, 3)) else None
    found = []
    for index in range(count):
        lead = 0 if index == 0 else draw(st.integers(0, len(result)))
        sizes: list[int | str] = []
        for axis in range(lead, len(result)):
            stretched = index > 0 and draw(st.booleans())
            sizes.append(1 if stretched else "N" if axis == batch else result[axis])
        found.append(tuple(sizes))
    return draw(st.permutations(found))


def pairs(values: Sequence[int]) -> st.SearchStrategy[tuple[int, int]]:
    """Two of the values."""
    return st.tuples(st.sampled_from(values), st.sampled_from(values))
