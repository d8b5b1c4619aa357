"""Every backward rule against PyTorch autograd in float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import Array, Shape, append_gradients, graph_of_nodes, relative_error, run_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from lance_edge.errors import ModelError
from lance_host.autodiff.rules import RULES

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# The rules run in float32 (unit roundoff 6e-8) and sum at most a few hundred terms of like size; the
# truth is float64.  The rounding error of such sums stays below 1e-5 of the largest entry.
TOLERANCE = 1e-5
BATCHES = (3, 5)  # a dynamic batch: the same graph must serve both


@dataclass(frozen=True)
class Case:
    """One node `op(inputs..., constants...) -> y` and the same function in PyTorch.

    `operands` is the order of the node's operands where it is not inputs, then constants.
    """

    inputs: Mapping[str, Shape]
    torch: Callable[..., torch.Tensor]
    constants: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()  # inputs that must stay away from zero


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def number(value: float) -> Array:
    return np.array(value, np.float32)


def gemm(a: Shape, b: Shape, c: Shape | None = None, **attributes: Any) -> Case:
    """Y = alpha A' B' + beta C."""

    def product(a: torch.Tensor, b: torch.Tensor, *c: torch.Tensor) -> torch.Tensor:
        left = a.T if attributes.get("transA") else a
        right = b.T if attributes.get("transB") else b
        result = attributes.get("alpha", 1.0) * left @ right
        return result + attributes.get("beta", 1.0) * c[0] if c else result

    inputs = {"a": a, "b": b} | ({"c": c} if c is not None else {})
    return Case(inputs, product, attributes=attributes)


def clip(low: float | None, high: float | None) -> Case:
    constants = {"low": low, "high": high}
    present = {name: number(value) for name, value in constants.items() if value is not None}
    operands = ("x", *(name if name in present else "" for name in constants))

    def clamp(x: torch.Tensor) -> torch.Tensor:
        return x if not present else x.clamp(low, high)

    return Case({"x": ("N", 6)}, clamp, present, operands=operands)


def reduction(function: Any, shape: Shape, axes: tuple[int, ...] | None, **attributes: Any) -> Case:
    keepdims = bool(attributes.get("keepdims", 1))
    dim = tuple(range(len(shape))) if axes is None else axes
    constants = {} if axes is None else {"axes": ints(*axes)}
    return Case({"x": shape}, lambda x: function(x, dim=dim, keepdim=keepdims), constants, attributes)


def reductions(function: Any) -> list[Case]:
    return [
        reduction(function, ("N", 4, 5), (1,)),
        reduction(function, ("N", 4, 5), (-1,), keepdims=0),
        reduction(function, ("N", 4, 5, 3), (2, 3), keepdims=0),
        reduction(function, ("N", 4, 5, 3), (-1, 1), keepdims=1),
        reduction(function, (2, 3, 4), None, keepdims=0),
        reduction(function, (2, 3, 4), None),
        Case({"x": ("N", 4)}, lambda x: x * 1.0, attributes={"noop_with_empty_axes": 1}),
    ]


def reshaping(shape: Shape, function: Any, operand: Array | None = None, **attributes: Any) -> Case:
    constants = {} if operand is None else {"operand": operand}
    return Case({"x": shape}, function, constants, attributes)


def binary(function: Callable[..., torch.Tensor], positive: tuple[str, ...] = ()) -> list[Case]:
    shapes: list[tuple[Shape, Shape]] = [
        (("N", 4), ("N", 4)),
        (("N", 4, 3), (4, 1)),
        ((5,), ("N", 5)),
        ((1, 4), ("N", 1)),
        ((), ("N", 3)),
        (("N", 1, 1, 3), (2, 5, 1)),
    ]
    return [Case({"a": a, "b": b}, function, positive=positive) for a, b in shapes]


def unary(function: Callable[[torch.Tensor], torch.Tensor], **attributes: Any) -> list[Case]:
    return [Case({"x": ("N", 4, 3)}, function, attributes=attributes)]


CASES: dict[str, list[Case]] = {
    "Add": binary(torch.add),
    "Sub": binary(torch.sub),
    "Mul": binary(torch.mul),
    "Div": binary(torch.div, positive=("b",)),
    "Neg": unary(torch.neg),
    "Identity": unary(torch.clone),
    "Relu": unary(torch.relu),
    "Sigmoid": unary(torch.sigmoid),
    "Tanh": unary(torch.tanh),
    "HardSigmoid": [
        *unary(lambda x: (0.2 * x + 0.5).clamp(0, 1)),  # the operator's default slope and offset
        *unary(F.hardsigmoid, alpha=1 / 6, beta=0.5),
        *unary(lambda x: (0.4 * x + 0.1).clamp(0, 1), alpha=0.4, beta=0.1),
    ],
    "HardSwish": unary(lambda x: F.hardswish(x)),
    "Clip": [clip(-0.5, 0.75), clip(0.0, 6.0), clip(None, 0.5), clip(0.1, None), clip(None, None)],
    "Reshape": [
        reshaping(("N", 6, 4), lambda x: x.reshape(-1, 24), ints(-1, 24)),
        reshaping(("N", 6, 4), lambda x: x.reshape(-1, 4), ints(-1, 4)),
        reshaping(("N", 6, 4), lambda x: x.reshape(-1, 2, 3, 4), ints(0, 2, -1, 4)),
        reshaping((2, 6), lambda x: x.reshape(3, 4), ints(3, 4)),
    ],
    "Flatten": [
        reshaping(("N", 3, 4), lambda x: x.flatten(1)),
        reshaping(("N", 3, 4), lambda x: x.flatten(0, 1), axis=2),
        reshaping(("N", 3, 4), lambda x: x.reshape(1, -1), axis=0),
        reshaping(("N", 3, 4), lambda x: x.flatten(0, 1), axis=-1),
    ],
    "Squeeze": [
        reshaping(("N", 1, 4), lambda x: x.squeeze(1), ints(1)),
        reshaping(("N", 4, 1, 1), lambda x: x.squeeze((2, 3)), ints(-1, -2)),
        reshaping((1, 3, 1), lambda x: x.squeeze()),
    ],
    "Unsqueeze": [
        reshaping(("N", 4), lambda x: x[:, None, :, None], ints(1, 3)),
        reshaping(("N", 4), lambda x: x[None, ..., None], ints(-1, 0)),
    ],
    "Transpose": [
        reshaping(("N", 3, 4, 5), lambda x: x.permute(1, 3, 0, 2), perm=(1, 3, 0, 2)),
        reshaping(("N", 3, 4), lambda x: x.permute(2, 0, 1), perm=(2, 0, 1)),
        reshaping(("N", 3, 4), lambda x: x.permute(2, 1, 0)),
    ],
    "Concat": [
        Case({"a": ("N", 2), "b": ("N", 3)}, lambda a, b: torch.cat([a, b], 1), attributes={"axis": 1}),
        Case(
            {"a": ("N", 2, 3), "b": ("N", 2, 1), "c": ("N", 2, 4)},
            lambda *parts: torch.cat(parts, -1),
            attributes={"axis": -1},
        ),
        Case({"a": (2, 3), "b": (4, 3)}, lambda a, b: torch.cat([a, b]), attributes={"axis": 0}),
    ],
    "ReduceSum": [
        *reductions(torch.sum),
        reduction(torch.sum, ("N", 4, 3), (0,), keepdims=0),
        reduction(torch.sum, ("N", 4, 3), (0, 2), keepdims=1),
        reduction(torch.sum, ("N", 4), None, keepdims=0),
    ],
    "ReduceMean": reductions(torch.mean),
    "GlobalAveragePool": [
        Case({"x": ("N", 3, 4, 5)}, lambda x: x.mean((2, 3), keepdim=True)),
        Case({"x": ("N", 3, 1, 1)}, lambda x: x.mean((2, 3), keepdim=True)),
    ],
    "MatMul": [
        Case({"a": ("N", 4), "b": (4, 3)}, torch.matmul),
        Case({"a": ("N", 5, 4), "b": (4, 3)}, torch.matmul),
        Case({"a": ("N", 2, 5, 4), "b": (4, 3)}, torch.matmul),
        Case({"a": (5, 4), "b": ("N", 4, 3)}, torch.matmul),
        Case({"a": ("N", 2, 5, 4), "b": ("N", 2, 4, 3)}, torch.matmul),
        Case({"a": ("N", 1, 5, 4), "b": (2, 4, 3)}, torch.matmul),
    ],
    "Gemm": [
        gemm(("N", 4), (4, 3), (3,)),
        gemm(("N", 4), (3, 4), (3,), transB=1),
        gemm((4, "N"), (4, 3), (1, 3), transA=1, alpha=0.5),
        gemm((4, "N"), (3, 4), ("N", 1), transA=1, transB=1, alpha=-2.0, beta=0.25),
        gemm(("N", 4), (4, 3), ("N", 3), alpha=1.5, beta=3.0),
        gemm(("N", 4), (3, 4), (), transB=1, beta=0.5),
        gemm((4, 5), (3, 4), transA=1, transB=1, alpha=0.5),
    ],
    "Conv": [
        Case(
            {"x": ("N", 4, 7, 6), "w": (6, 2, 3, 2), "b": (6,)},
            lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
            attributes={"strides": (2, 2), "pads": (1, 0, 1, 0), "dilations": (1, 2), "group": 2},
        ),
        Case({"x": ("N", 4, 3, 3), "w": (5, 4, 1, 1)}, F.conv2d),
    ],
    "Softmax": [
        Case({"x": ("N", 5)}, lambda x: x.softmax(-1)),
        Case({"x": ("N", 5, 3)}, lambda x: x.softmax(1), attributes={"axis": 1}),
    ],
    "LogSoftmax": [
        Case({"x": ("N", 5)}, lambda x: x.log_softmax(-1)),
        Case({"x": ("N", 5, 3)}, lambda x: x.log_softmax(1), attributes={"axis": 1}),
    ],
}


def check(op: str, case: Case) -> None:
    """Gradients of all inputs for a random gradient of the output, at several batch sizes."""
    operands = case.operands or (*case.inputs, *case.constants)
    node = helper.make_node(op, operands, ["y"], name="the_node", **case.attributes)
    model = graph_of_nodes([node], case.inputs, case.constants)
    append_gradients(model, list(case.inputs))
    for batch in BATCHES if any("N" in shape for shape in case.inputs.values()) else BATCHES[:1]:
        rng = np.random.default_rng(batch)
        values = {}
        for name, shape in case.inputs.items():
            array = 2 * rng.standard_normal([batch if dim == "N" else dim for dim in shape])
            values[name] = np.asarray(np.abs(array) + 0.5 if name in case.positive else array, np.float32)
        leaves = [torch.from_numpy(array).double().requires_grad_() for array in values.values()]
        y = case.torch(*leaves)
        dy = np.asarray(rng.standard_normal(y.shape), np.float32)
        truth = torch.autograd.grad(y, leaves, torch.from_numpy(dy).double())
        found = run_graph(model, {**values, "dy": dy})
        for name, expected in zip(case.inputs, truth, strict=True):
            assert relative_error(found[f"grad_{name}"], expected) < TOLERANCE, f"{op}: {name}, batch {batch}"


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("op", sorted(CASES))
def test_rule_agrees_with_autograd(op: str) -> None:
    for case in CASES[op]:
        check(op, case)


ELEMENTWISE = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(sorted(ELEMENTWISE)),
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4),
)
def test_elementwise_broadcasting(op: str, shapes: hnp.BroadcastableShapes) -> None:
    a, b = shapes.input_shapes
    check(op, Case({"a": a, "b": b}, ELEMENTWISE[op], positive=("b",)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes=hnp.mutually_broadcastable_shapes(signature="(m,k),(k,n)->(m,n)", max_dims=2, max_side=4))
def test_matmul_broadcasting(shapes: hnp.BroadcastableShapes) -> None:
    a, b = shapes.input_shapes
    check("MatMul", Case({"a": a, "b": b}, torch.matmul))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(["ReduceSum", "ReduceMean"]),
    shape=hnp.array_shapes(max_dims=4, max_side=4),
    data=st.data(),
    keepdims=st.booleans(),
)
def test_reductions_over_any_axes(op: str, shape: tuple[int, ...], data: st.DataObject, keepdims: bool) -> None:
    rank = len(shape)
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
    signed = tuple(axis - rank * data.draw(st.integers(0, 1)) for axis in axes)
    function = {"ReduceSum": torch.sum, "ReduceMean": torch.mean}[op]
    check(op, reduction(function, shape, signed, keepdims=int(keepdims)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    trans=st.tuples(st.booleans(), st.booleans()),
    scales=st.tuples(st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 0.25, 3.0])),
    bias=st.sampled_from(["none", "scalar", "row", "column", "full"]),
)
def test_gemm_with_any_attributes(
    sizes: tuple[int, int, int], trans: tuple[bool, bool], scales: tuple[float, float], bias: str
) -> None:
    m, k, n = sizes
    shapes: dict[str, Shape | None] = {
        "none": None,
        "scalar": (),
        "row": (n,),
        "column": (m, 1),
        "full": (m, n),
    }
    case = gemm(
        (k, m) if trans[0] else (m, k),
        (n, k) if trans[1] else (k, n),
        shapes[bias],
        transA=int(trans[0]),
        transB=int(trans[1]),
        alpha=scales[0],
        beta=scales[1],
    )
    check("Gemm", case)


# --- walking the graph ----------------------------------------------------------------------------------


def test_a_value_with_several_uses_sums_their_gradients() -> None:
    """y = x^2 * sigmoid(x) + x: one node uses x twice, four uses in all."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["square", "gate"], ["gated"]),
        helper.make_node("Add", ["gated", "x"], ["y"]),
    ]
    model = graph_of_nodes(nodes, {"x": ("N", 3)}, {})
    append_gradients(model, ["x"])
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    leaf = torch.from_numpy(x).double().requires_grad_()
    (truth,) = torch.autograd.grad(leaf**2 * leaf.sigmoid() + leaf, leaf, torch.from_numpy(dy).double())
    assert relative_error(run_graph(model, {"x": x, "dy": dy})["grad_x"], truth) < TOLERANCE


def test_only_the_gradients_asked_for_are_written() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = graph_of_nodes([node], {"x": ("N", 4), "w": (4, 3)}, {})
    append_gradients(model, ["w"])
    assert [node.op_type for node in model.graph].count("MatMul") == 1 + 1  # forward, and dW alone


def test_an_unknown_operator_is_named_with_its_node_and_the_ways_out() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["scaled"]),
        helper.make_node("Sin", ["scaled"], ["waves"], name="blocks.3/wave"),
        helper.make_node("Neg", ["waves"], ["y"]),
    ]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "w": (4,)}, {})
    with pytest.raises(ModelError) as error:
        append_gradients(model, ["w"])
    message = str(error.value)
    assert "operator Sin (node blocks.3/wave, output waves) has no backward rule" in message
    assert "smaller --layers" in message
    assert "lance_host/autodiff/rules.py" in message
    assert "known: Add, Clip, Concat" in message


def test_an_unknown_operator_before_the_trainable_values_does_no_harm() -> None:
    nodes = [helper.make_node("Sin", ["x"], ["waves"]), helper.make_node("Mul", ["waves", "w"], ["y"])]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "w": (4,)}, {})
    append_gradients(model, ["w"])
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    found = run_graph(model, {"x": x, "w": np.ones(4, np.float32), "dy": dy})["grad_w"]
    assert relative_error(found, (np.sin(x) * dy).sum(0)) < TOLERANCE


def test_a_parameter_that_does_not_reach_the_result_is_named() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Neg", ["w"], ["unused"])]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "w": (4,)}, {})
    with pytest.raises(ModelError, match=r"the loss does not depend on \['w'\].*leave them out of --layers"):
        append_gradients(model, ["x", "w"])


@pytest.mark.parametrize(
    ("op", "inputs", "constants", "attributes", "message"),
    [
        ("ReduceMean", {"x": ("N", 4)}, {"axes": ints(0)}, {}, "a mean over the batch"),
        ("MatMul", {"x": ("N", 4), "v": (4,)}, {}, {}, "MatMul with a vector is not supported; reshape it"),
        ("Conv", {"x": ("N", 2, 9), "w": (2, 2, 3)}, {}, {}, "expected a 2-D convolution, found 1-D; choose"),
        (
            "Conv",
            {"x": ("N", 2, 9, 9), "w": (2, 2, 3, 3)},
            {},
            {"auto_pad": "SAME_UPPER"},
            "auto_pad is not supported; export with explicit pads",
        ),
        (
            "Concat",
            {"x": ("N", 4), "z": ("N", 4)},
            {},
            {"axis": 0},
            "expected fixed sizes, found .*smaller --layers",
        ),
        ("Clip", {"x": ("N", 4), "low": ()}, {}, {}, "low: expected a constant, found a computed value"),
    ],
)
def test_what_a_rule_cannot_do_is_a_model_error_that_says_so(
    op: str, inputs: dict[str, Shape], constants: dict[str, Array], attributes: dict[str, Any], message: str
) -> None:
    node = helper.make_node(op, [*inputs, *constants], ["y"], name="the_node", **attributes)
    model = graph_of_nodes([node], inputs, constants)
    with pytest.raises(ModelError, match=message):
        append_gradients(model, ["x"])
