"""Every backward rule against PyTorch autograd in float64, and the walk through a graph."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graph_runner import Array, Shape, append_gradients, graph_of_nodes, relative_error, run_graph
from hypothesis import given, settings
from onnx import helper
from rule_cases import FIXED, RANDOM
from rule_cases.case import TOLERANCE, Case, check, ints

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import dims
from lance_host.autodiff.rules import RULES, STOPS

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_every_rule_has_random_cases() -> None:
    assert set(RANDOM) == set(RULES)
    assert set(FIXED) <= set(RULES)


def test_no_operator_both_has_a_rule_and_stops_the_gradient() -> None:
    assert not STOPS & set(RULES)


@pytest.mark.parametrize("op", sorted(FIXED))
def test_rule_agrees_with_autograd(op: str) -> None:
    for case in FIXED[op]:
        check(op, case)


@pytest.mark.parametrize("op", sorted(RANDOM))
def test_rule_agrees_with_autograd_on_random_shapes_and_attributes(op: str) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(case=RANDOM[op])
    def agrees(case: Case) -> None:
        check(op, case)

    agrees()


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
        helper.make_node("Atanh", ["scaled"], ["waves"], name="blocks.3/wave"),
        helper.make_node("Neg", ["waves"], ["y"]),
    ]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "w": (4,)}, {})
    with pytest.raises(ModelError) as error:
        append_gradients(model, ["w"])
    message = str(error.value)
    assert "operator Atanh (node blocks.3/wave, output waves) has no backward rule" in message
    assert "smaller --layers" in message
    assert "lance_host/autodiff/rules" in message
    assert "known: Abs, Add, AveragePool" in message


def test_an_unknown_operator_before_the_trainable_values_does_no_harm() -> None:
    nodes = [helper.make_node("Sinh", ["x"], ["waves"]), helper.make_node("Mul", ["waves", "w"], ["y"])]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "w": (4,)}, {})
    append_gradients(model, ["w"])
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    found = run_graph(model, {"x": x, "w": np.ones(4, np.float32), "dy": dy})["grad_w"]
    assert relative_error(found, (np.sinh(x) * dy).sum(0)) < TOLERANCE


def test_a_parameter_that_does_not_reach_the_result_is_named() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Neg", ["w"], ["unused"])]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "w": (4,)}, {})
    with pytest.raises(ModelError, match=r"the loss does not depend on \['w'\].*leave them out of --layers"):
        append_gradients(model, ["x", "w"])


@pytest.mark.parametrize(
    ("op", "inputs", "constants", "attributes", "message"),
    [
        ("ReduceMean", {"x": ("N", 4)}, {"axes": ints(0)}, {}, "a mean over the batch"),
        (
            "Conv",
            {"x": ("N", 2, 5, 5, 5), "w": (2, 2, 3, 3, 3)},
            {},
            {},
            "1-D or 2-D convolution, found 3-D; choose",
        ),
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
            "expected a fixed size of axis 0, found N.*smaller --layers",
        ),
        ("Clip", {"x": ("N", 4), "low": ()}, {}, {}, "low: expected a constant, found a computed value"),
        ("Slice", {"x": (4,)}, {}, {}, "input 1 is missing"),
        (
            "Slice",
            {"x": ("N", 4)},
            {"starts": ints(1), "ends": ints(3), "axes": ints(0)},
            {},
            "a slice of the batch cannot be trained.*smaller --layers",
        ),
        (
            "GatherND",
            {"x": ("N", 4)},
            {"i": ints(0).reshape(1, 1)},
            {},
            "GatherND over the batch is not supported",
        ),
        (
            "ScatterND",
            {"x": (4, 2)},
            {"i": ints(1).reshape(1, 1), "updates": np.ones((1, 2), np.float32)},
            {"reduction": "mul"},
            "ScatterND with the reduction mul is not supported",
        ),
        (
            "Resize",
            {"x": ("N", 2, 3, 3)},
            {"roi": np.empty(0, np.float32), "scales": np.array([1, 2, 1, 1], np.float32)},
            {"mode": "nearest"},
            "Resize of batch or channels is not supported",
        ),
        ("Einsum", {"x": ("N", 3, 3)}, {}, {"equation": "nii->n"}, "Einsum nii->n is not supported.*once"),
        ("Einsum", {"x": ("N", 3)}, {}, {"equation": "ni->n"}, "Einsum ni->n is not supported.*once"),
        (
            "MaxPool",
            {"x": ("N", 2, 4, 4)},
            {},
            {"kernel_shape": [2, 2], "storage_order": 1},
            "storage_order 1 is not supported; export with storage_order 0",
        ),
        (
            "AveragePool",
            {"x": ("N", 2, 4, 4)},
            {},
            {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"},
            "auto_pad is not supported; export with explicit pads",
        ),
        (
            "ConvTranspose",
            {"x": ("N", 2, 4, 4), "w": (2, 2, 3, 3)},
            {},
            {"output_shape": [9, 9], "strides": [2, 2]},
            "output_shape is not supported; export with explicit pads",
        ),
    ],
)
def test_what_a_rule_cannot_do_is_a_model_error_that_says_so(
    op: str, inputs: dict[str, Shape], constants: dict[str, Array], attributes: dict[str, Any], message: str
) -> None:
    node = helper.make_node(op, [*inputs, *constants], ["y"], name="the_node", **attributes)
    model = graph_of_nodes([node], inputs, constants)
    with pytest.raises(ModelError, match=message):
        append_gradients(model, ["x"])


def test_an_input_without_a_gradient_is_named() -> None:
    names = ["x", "gamma", "beta", "mean", "variance"]
    node = helper.make_node("BatchNormalization", names, ["y", "m", "v"], name="norm", training_mode=1)
    model = graph_of_nodes([node], {"x": ("N", 2, 3)} | dict.fromkeys(names[1:], (2,)), {})
    with pytest.raises(
        ModelError, match=r"node norm, output y\) has no gradient with respect to its input 3 \(mean"
    ):
        append_gradients(model, ["mean"])


def test_a_second_output_without_a_gradient_is_named() -> None:
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma"], ["norm", "mean"], name="norm"),
        helper.make_node("Add", ["norm", "mean"], ["y"]),
    ]
    model = graph_of_nodes(nodes, {"x": ("N", 4), "gamma": (4,)}, {})
    with pytest.raises(
        ModelError, match=r"no gradient through an output other than its first; .*smaller --layers"
    ):
        append_gradients(model, ["x"])


def embedding(axis: int) -> ir.Model:
    """Rows (or columns) of a table, chosen by what the graph computes."""
    nodes = [
        helper.make_node("ArgMax", ["scores"], ["chosen"], axis=1, keepdims=0),
        helper.make_node("Gather", ["table", "chosen"], ["y"], axis=axis, name="look_up"),
    ]
    return graph_of_nodes(nodes, {"table": (4, 3), "scores": ("N", 3)}, {})


def test_a_table_is_looked_up_with_computed_indices() -> None:
    model = embedding(axis=0)
    append_gradients(model, ["table"])
    rng = np.random.default_rng(0)
    table, scores, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (6, 3), (6, 3)))
    expected = np.zeros((4, 3))
    np.add.at(expected, scores.argmax(1), dy)
    found = run_graph(model, {"table": table, "scores": scores, "dy": dy})["grad_table"]
    assert relative_error(found, expected) < TOLERANCE
    with pytest.raises(ModelError, match=r"look_up: .* computed indices is supported for rows of a table only"):
        append_gradients(embedding(axis=1), ["table"])


def test_no_gradient_flows_through_shapes_comparisons_and_integers() -> None:
    """y = x + (x > 0) + round trip through int32: the slope is 1."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["is_positive"]),
        helper.make_node("Cast", ["is_positive"], ["one"], to=1),
        helper.make_node("Cast", ["x"], ["whole"], to=6),
        helper.make_node("Cast", ["whole"], ["back"], to=1),
        helper.make_node("Add", ["x", "one"], ["sum"]),
        helper.make_node("Add", ["sum", "back"], ["flat"]),
        helper.make_node("Shape", ["sum"], ["size"]),
        helper.make_node("Reshape", ["flat", "size"], ["y"]),
    ]
    model = graph_of_nodes(nodes, {"x": ("N", 3)}, {"zero": np.array(0, np.float32)})
    append_gradients(model, ["x"])
    dy = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    found = run_graph(model, {"x": np.ones((4, 3), np.float32), "dy": dy})["grad_x"]
    np.testing.assert_array_equal(found, dy)


@pytest.mark.parametrize("shape", [None, ir.Shape([ir.SymbolicDim(None), 3])])
def test_a_shape_that_is_not_known_is_an_error(shape: ir.Shape | None) -> None:
    with pytest.raises(
        ModelError, match=r"lost: the exported graph does not say its shape; train only .*--layers"
    ):
        dims(ir.Value(name="lost", shape=shape))
