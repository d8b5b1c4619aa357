"""An exported graph made plain: the same values with known shapes and fewer steps."""

from collections.abc import Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from graph_runner import Array, run_graph

from lance_host.shapes import infer_specs
from lance_host.simplify import simplify

HEADER = '<ir_version: 8, opset_import: ["" : 18]>'


def parse(text: str) -> ir.Model:
    model = onnx.parser.parse_model(HEADER + text)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, data_prop=True))


def simplified(text: str, shapes: Mapping[str, tuple[int | str, ...]]) -> tuple[ir.Model, list[str]]:
    """The simplified model, after checking that it computes what the original computes; and its operators."""
    original, model = parse(text), parse(text)
    simplify(model)
    for batch in (1, 4):
        rng = np.random.default_rng(batch)
        values: dict[str, Array] = {
            name: rng.standard_normal([batch if dim == "N" else int(dim) for dim in shape]).astype(np.float32)
            for name, shape in shapes.items()
        }
        expected, found = run_graph(original, values), run_graph(model, values)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    return model, [node.op_type for node in model.graph]


def shapes_of(model: ir.Model) -> dict[str, list[int | str]]:
    values = [value for node in model.graph for value in node.outputs]
    return {
        str(value.name): [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
        for value in values
    }


def test_an_operand_computed_from_the_shape_of_the_images_becomes_a_constant() -> None:
    model, operators = simplified(
        "g (float[N,6,4] x) => (float[N,2,12] y) <int64[2] rest = {2, 12}>"
        " { size = Shape<start=0, end=1>(x)  r = Relu(x)  target = Concat<axis=0>(size, rest)"
        "   y = Reshape(r, target) }",
        {"x": ("N", 6, 4)},
    )
    assert operators == ["Relu", "Reshape"]
    assert shapes_of(model) == {"r": ["N", 6, 4], "y": ["N", 2, 12]}


def test_a_reshape_may_merge_the_batch_with_other_axes() -> None:
    model, operators = simplified(
        "g (float[N,6,4] x) => (float[N,6,4] y) <int64[1] six = {6}, int64[1] four = {4}>"
        " { size = Shape<start=0, end=1>(x)  rows = Mul(size, six)  wide = Concat<axis=0>(rows, four)"
        "   back = Concat<axis=0>(size, six, four)  f = Reshape(x, wide)  r = Relu(f)  y = Reshape(r, back) }",
        {"x": ("N", 6, 4)},
    )
    assert operators == ["Reshape", "Relu", "Reshape"]
    assert shapes_of(model)["r"] == ["6*N", 4]
    assert infer_specs(model)["r"].shape == ("6*N", 4)


def test_what_changes_nothing_is_dropped() -> None:
    _, operators = simplified(
        "g (float[N,6] x) => (float[N,6] y)"
        " <int64[1] zero = {0}, int64[1] end = {9223372036854775807}, int64[2] same = {-1, 6},"
        "  int64[2] one = {1, 1}>"
        " { s = Slice(x, zero, end, zero)  r = Reshape(s, same)  e = Expand(r, one)  y = Relu(e) }",
        {"x": ("N", 6)},
    )
    assert operators == ["Relu"]


def test_a_slice_that_turns_an_axis_round_stays() -> None:
    _, operators = simplified(
        "g (float[N,6] x) => (float[N,6] y)"
        " <int64[1] last = {-1}, int64[1] end = {-9223372036854775807}, int64[1] axis = {1}>"
        " { s = Slice(x, last, end, axis, last)  y = Relu(s) }",
        {"x": ("N", 6)},
    )
    assert operators == ["Slice", "Relu"]


def test_slices_that_cover_an_axis_are_read_by_one_split() -> None:
    model, operators = simplified(
        "g (float[N,6] x) => (float[N,3] y, float[N,3] z)"
        " <int64[1] zero = {0}, int64[1] two = {2}, int64[1] five = {5}, int64[1] end = {100},"
        "  int64[1] axis = {-1}>"
        " { r = Relu(x)  a = Slice(r, zero, two, axis)  b = Slice(r, two, five, axis)"
        "   c = Slice(r, five, end, axis)  ac = Add(a, c)  y = Concat<axis=1>(ac, c)"
        "   z = Neg(b) }",
        {"x": ("N", 6)},
    )
    assert sorted(operators) == ["Add", "Concat", "Neg", "Relu", "Split"]
    assert shapes_of(model)["b"] == ["N", 3]


def test_picks_that_cover_an_axis_are_read_by_one_split() -> None:
    _, operators = simplified(
        "g (float[N,4] x) => (float[N] y)"
        " <int64[3] four = {2, 2, -1}, int64 first = {0}, int64 last = {-1}, int64[1] zero = {0}>"
        " { r = Relu(x)  t = Transpose<perm=[1, 0]>(r)  s = Reshape(t, four)  a = Gather<axis=0>(s, first)"
        "   b = Gather<axis=0>(s, last)  m = Mul(a, b)  y = ReduceSum<keepdims=0>(m, zero) }",
        {"x": ("N", 4)},
    )
    assert sorted(operators) == [
        "Mul", "ReduceSum", "Relu", "Reshape", "Split", "Squeeze", "Squeeze", "Transpose",
    ]  # fmt: skip


@pytest.mark.parametrize("second", ["{1}", "{3}"], ids=["overlap", "gap"])
def test_slices_that_overlap_or_leave_a_gap_stay(second: str) -> None:
    _, operators = simplified(
        "g (float[N,6] x) => (float[N,2] y)"
        f" <int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] start = {second}, int64[1] end = {{100}},"
        " int64[1] axis = {1}>"
        " { r = Relu(x)  a = Slice(r, zero, two, axis)  b = Slice(r, start, end, axis)"
        "   c = ReduceSum(b, axis)  y = Add(a, c) }",
        {"x": ("N", 6)},
    )
    assert "Split" not in operators


def test_a_slice_up_to_a_computed_position_stays() -> None:
    """How many rows there are says the batch: it is no slice to the end."""
    _, operators = simplified(
        "g (float[N,6] x) => (float[2,6] y, float[M,6] z)"
        " <int64[1] zero = {0}, int64[1] two = {2}>"
        " { t = Transpose<perm=[1, 0]>(x)  r = MatMul(t, x)  n = Shape<start=0, end=1>(x)  stop = Add(n, two)"
        "   a = Slice(r, zero, two, zero)  b = Slice(r, two, stop, zero)  y = Neg(a)  z = Relu(b) }",
        {"x": ("N", 6)},
    )
    assert "Split" not in operators
    assert operators.count("Slice") == 2


def test_an_expand_over_the_batch_reads_its_size_from_its_neighbour() -> None:
    """A class token before the patches: not a number of its own between prefix and tail."""
    model, operators = simplified(
        "g (float[N,3,4] x) => (float[N,4,4] y) <float[1,1,4] token = {1, 2, 3, 4}, int64[2] rest = {1, 4}>"
        " { r = Relu(x)  size = Shape<start=0, end=1>(x)  shape = Concat<axis=0>(size, rest)"
        "   t = Expand(token, shape)  y = Concat<axis=1>(t, r) }",
        {"x": ("N", 3, 4)},
    )
    assert operators.count("Shape") == 1
    (shape,) = [node for node in model.graph if node.op_type == "Shape"]
    assert shape.inputs[0] is not None
    assert shape.inputs[0].name == "r"
    assert infer_specs(model)["t"].shape == ("N", 1, 4)


def test_a_gather_of_everything_in_order_is_a_reshape() -> None:
    """PyTorch's as_strided on a contiguous tensor, as the exporter writes it."""
    _, operators = simplified(
        "g (float[N,3] x) => (float[N,3,1] y)"
        " <int64[1] flat = {-1}, int64 zero = {0}, int64 one = {1}, int64 three = {3}, int64[1] axis = {0},"
        " int64[3,1] columns = {0, 1, 2}, int64[2] last = {1, 2}>"
        " { f = Reshape(x, flat)  size = Shape<start=0, end=1>(x)  n = Squeeze(size)"
        "   rows = Range(zero, n, one)  starts = Mul(rows, three)  tall = Unsqueeze(starts, last)"
        "   indices = Add(tall, columns)  y = Gather<axis=0>(f, indices) }",
        {"x": ("N", 3)},
    )
    assert "Gather" not in operators
    assert set(operators) == {"Reshape"}
