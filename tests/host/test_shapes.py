import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest

from lance_edge.manifest import TensorSpec
from lance_host.shapes import PROBES, infer_shapes, infer_specs

HEADER = '<ir_version: 8, opset_import: ["" : 18]>'


def parse(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(HEADER + text))


def test_the_batch_dimension_is_named_and_all_others_are_numbers():
    model = parse(
        "g (float[N,6,9,7] x, float[4,6,3,3] w) => (float[N,4] y) <int64[2] space = {2, 3}>"
        " { c = Conv<strides=[2,2]>(x, w)  y = ReduceMean<keepdims=0>(c, space) }"
    )
    specs = infer_specs(model)
    assert specs["x"] == TensorSpec("x", ("N", 6, 9, 7), "float32")
    assert specs["w"] == TensorSpec("w", (4, 6, 3, 3), "float32")
    assert specs["c"] == TensorSpec("c", ("N", 4, 4, 3), "float32")
    assert specs["y"] == TensorSpec("y", ("N", 4), "float32")


def test_the_batch_is_found_behind_a_reshape_and_wherever_it_stands():
    model = parse(
        "g (float[N,6,4] x) => (float[24,N] y) <int64[2] flat = {0, -1}>"
        " { r = Reshape(x, flat)  y = Transpose<perm=[1,0]>(r) }"
    )
    specs = infer_specs(model)
    assert specs["r"].shape == ("N", 24)
    assert specs["y"].shape == (24, "N")


@pytest.mark.parametrize("size", PROBES)
def test_a_fixed_size_that_equals_a_probe_stays_a_number(size):
    model = parse(f"g (float[N,{size}] x) => (float[N,{size}] y) {{ y = Relu(x) }}")
    assert infer_specs(model)["y"].shape == ("N", size)


def test_a_multiple_of_the_batch_is_written_so_and_anything_else_has_no_entry():
    model = parse(
        "g (float[N,6] x, float[1,6] row) => (float[N,6] y) <int64[1] flat = {-1}>"
        " { f = Reshape(x, flat)  longer = Concat<axis=0>(x, row)  y = Relu(x) }"
    )
    specs = infer_specs(model)
    assert specs["f"] == TensorSpec("f", ("6*N",), "float32")
    assert specs["f"].nbytes(samples=8) == 8 * 6 * 4
    assert "longer" not in specs  # [N + 1, 6]
    assert "f" not in infer_specs(model, multiples=False)
    assert "y" in specs


def test_a_graph_input_may_have_a_multiple_of_the_batch():
    model = parse("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape(["4*N", 2])
    assert infer_shapes(model, 3)["y"] == (12, 2)
    assert infer_specs(model)["y"].shape == ("4*N", 2)


def test_kinds_of_values():
    model = parse(
        "g (float[N,6] x, int64[N] labels) => (bool[N,6] positive, int32[N] small, uint8[N] tiny)"
        " <float zero = {0}>"
        " { positive = Greater(x, zero)  small = Cast<to=6>(labels)  tiny = Cast<to=2>(labels) }"
    )
    specs = infer_specs(model)
    kinds = {name: specs[name].dtype for name in ("x", "labels", "positive", "small", "tiny")}
    assert kinds == {"x": "float32", "labels": "int64", "positive": "bool", "small": "int32", "tiny": "uint8"}
    assert specs["positive"].nbytes(8) == 6  # 8 * 6 values of a bit each
    assert specs["labels"].nbytes(8) == 8 * 8


def test_a_value_of_unknown_rank_is_no_scalar():
    model = parse("g (float[N,6] x, int64[k] shape) => (float[N,6] y) { f = Reshape(x, shape)  y = Relu(x) }")
    model.graph.inputs[1].shape = None
    assert "f" not in infer_specs(model)


def test_scalars_have_an_empty_shape():
    model = parse("g (float[N,6] x) => (float total) { total = ReduceSum<keepdims=0>(x) }")
    assert infer_specs(model)["total"] == TensorSpec("total", (), "float32")


def test_shapes_for_one_batch_size():
    model = parse(
        "g (float[N,6] x) => (float[M] f) <int64[1] flat = {-1}> { f = Reshape(x, flat) }",
    )
    assert infer_shapes(model, 3) == {"x": (3, 6), "f": (18,)}


def test_the_model_is_left_as_it_is():
    model = parse("g (float[N,6] x) => (float[N,6] y) { y = Relu(x) }")
    before = ir.serde.serialize_model(model).SerializeToString()
    infer_specs(model)
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_an_inconsistent_graph_is_refused():
    model = parse("g (float[N,6] x, float[5,3] w) => (float[N,3] y) { y = MatMul(x, w) }")
    with pytest.raises(onnx.shape_inference.InferenceError, match="ncompatible"):
        infer_specs(model)


def test_a_shape_that_was_measured_stands_where_inference_cannot_know():
    model = parse(
        "g (float[N,6] x, int64[2] size) => (float[N,6] y, float[P,Q] f)"
        " { y = Relu(x)  e = ConstantOfShape(size)  f = Relu(e) }"
    )
    assert "f" not in infer_specs(model)
    (measured,) = [value for node in model.graph for value in node.outputs if value.name == "e"]
    measured.type, measured.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["2*N", 6])
    assert infer_specs(model)["f"].shape == ("2*N", 6)
    assert infer_shapes(model, 3)["f"] == (6, 6)
