"""What is let through to the runtime, against the protobuf library's reading of the same bytes."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lance_edge.errors import ArtifactError
from lance_edge.graph_check import ALLOWED_OPS, check_graph
from lance_edge.wire import WireError, fields, packed_varints, read_varint

WHERE = "pkg.tar: graphs/x.onnx"
# Everything in ONNX's own domain that is not let through, and why.
CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
CHANCE = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
TEXT = {"RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"}
NO_TENSORS = {
    *("ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
    *("SequenceInsert", "SequenceLength", "SplitToSequence"),
    *("Optional", "OptionalGetElement", "OptionalHasElement"),
}
FILES = {"ImageDecoder"}
SIGNALS = {"BlackmanWindow", "DFT", "HammingWindow", "HannWindow", "MelWeightMatrix", "STFT"}
DETECTION = {
    "MaxRoiPool",
    "MaxUnpool",
    "NonMaxSuppression",
    "RoiAlign",
    "DeformConv",
    "Unique",
    "ReverseSequence",
}
OLD = {"Upsample", "Scatter"}  # Resize and ScatterElements have taken their places
NEW = {
    schema.name
    for schema in onnx.defs.get_all_schemas_with_history()
    if not schema.domain and schema.since_version > 22
}  # since opset 23; packages have 18


def model(nodes=None, initializers=(), inputs=("x",), outputs=("y",)):
    """A model with one `Relu`, unless told otherwise."""
    nodes = [helper.make_node("Relu", ["x"], ["y"])] if nodes is None else nodes
    values = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in names]
        for names in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def refusal(data):
    with pytest.raises(ArtifactError) as raised:
        check_graph(data if isinstance(data, bytes) else data.SerializeToString(), WHERE)
    message = str(raised.value)
    assert message.startswith(f"{WHERE}: not a graph that lance-edge runs (")
    assert message.endswith("; use files of lance-host only, from someone you trust")
    assert "\n" not in message
    return message


def test_every_kind_of_tensor_and_attribute_passes():
    arrays = [np.zeros((2, 3), kind) for kind in ("f4", "f8", "i8", "i4", "u1", "?", "f2", "u8")]
    tensors = [numpy_helper.from_array(array, f"t{number}") for number, array in enumerate(arrays)]
    typed = [
        helper.make_tensor("floats", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]),
        helper.make_tensor("doubles", TensorProto.DOUBLE, [2], [1.0, 2.0]),
        helper.make_tensor("ints", TensorProto.INT64, [3], [1, -1, 1 << 40]),
        helper.make_tensor("bytes", TensorProto.UINT8, [2], [1, 200]),
        helper.make_tensor("scalar", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("empty", TensorProto.FLOAT, [0, 1 << 40], []),
    ]
    node = helper.make_node(
        *("Conv", ["x"], ["y"]), alpha=0.5, strides=[1, 2], mode="same", value=arrays[0].tolist() and tensors[0]
    )
    check_graph(model([node], [*tensors, *typed]).SerializeToString(), WHERE)


def test_the_list_of_operators_is_onnx_own_but_for_what_is_named_here():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    allowed = {name.decode() for name in ALLOWED_OPS}
    assert allowed <= known
    assert (
        known - allowed - NEW <= CONTROL_FLOW | CHANCE | TEXT | NO_TENSORS | FILES | SIGNALS | DETECTION | OLD
    )


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([helper.make_node("Evil", ["x"], ["y"])], "found the operator 'Evil'"),
        ([helper.make_node("", ["x"], ["y"])], "found the operator ''"),
        ([helper.make_node("Relu", ["x"], ["y"], domain="com.evil")], "operators of the domain 'com.evil'"),
        ([helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")], "the domain 'com.microsoft'"),
        *(
            ([helper.make_node(name, ["x"], ["y"])], f"found the operator '{name}'")
            for name in sorted(CONTROL_FLOW)
        ),
        ([helper.make_node("RandomNormal", [], ["y"], shape=[1])], "found the operator 'RandomNormal'"),
        (
            [helper.make_node("Relu", ["x"], ["y"], body=helper.make_graph([], "b", [], []))],
            "a graph within a node",
        ),
        (
            [helper.make_node("Relu", ["x"], ["y"], bodies=[helper.make_graph([], "b", [], [])])],
            "a graph within a node",
        ),
    ],
)
def test_nodes_that_are_refused(nodes, words):
    assert words in refusal(model(nodes))


def test_a_name_of_an_operator_cannot_fill_the_screen():
    message = refusal(model([helper.make_node("E\n" + 10_000 * "x", ["x"], ["y"])]))
    assert len(message) < 250


def _external():
    tensor = TensorProto(name="t", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    return tensor


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (_external(), "found a tensor outside of the file"),
        (TensorProto(data_type=1, dims=[0], data_location=TensorProto.EXTERNAL), "outside of the file"),
        (TensorProto(data_type=1, dims=[1 << 40]), r"the shape [1099511627776] with 0 bytes and 0 elements"),
        (TensorProto(data_type=1, dims=[1 << 31, 1 << 31, 1 << 31]), "with 0 bytes"),
        (TensorProto(data_type=1, dims=[3], raw_data=b"12345678"), "the shape [3] with 8 bytes"),
        (TensorProto(data_type=1, dims=[3], float_data=[1, 2]), "with 0 bytes and 2 elements"),
        (TensorProto(data_type=1, dims=[1], float_data=[1], raw_data=b"1234"), "with 4 bytes and 1 elements"),
        (TensorProto(data_type=7, dims=[2], int64_data=[-1, -1, -1]), "and 3 elements"),
        (TensorProto(data_type=1, dims=[-1]), "a tensor of the shape [18446744073709551615]"),
        (TensorProto(data_type=1, dims=[1] * 17, raw_data=b"1234"), "a tensor of more than 16 dimensions"),
        (TensorProto(data_type=8, dims=[1], string_data=[b"x"]), "a tensor of text"),
        (TensorProto(data_type=8, dims=[0]), "a tensor of type 8"),
        (TensorProto(data_type=0, dims=[0]), "a tensor of type 0"),
        (TensorProto(data_type=99, dims=[0]), "a tensor of type 99"),
        (TensorProto(data_type=1, dims=[0], segment=TensorProto.Segment(begin=1)), "a tensor in segments"),
    ],
)
@pytest.mark.parametrize("place", ["initializer", "attribute", "attributes"])
def test_tensors_that_are_refused(tensor, words, place):
    values = {"attribute": tensor, "attributes": [tensor]}
    node = helper.make_node("Relu", ["x"], ["y"], **({"value": values[place]} if place in values else {}))
    assert words in refusal(model([node], [tensor] if place == "initializer" else []))


def _changed(change):
    changed = model()
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.functions.add(), "found a function"),
        (lambda m: m.training_info.add(), "found training information"),
        (lambda m: m.graph.sparse_initializer.add(), "found a sparse tensor"),
        (lambda m: m.opset_import.add(domain="evil", version=1), "operators of the domain 'evil'"),
        (lambda m: m.ClearField("opset_import"), "found no graph, or no version of its operators"),
        (lambda m: m.ClearField("graph"), "found no graph, or no version of its operators"),
        (lambda m: m.graph.input[0].type.sequence_type.SetInParent(), "found a sequence"),
        (lambda m: m.graph.input[0].type.map_type.SetInParent(), "found a map"),
        (lambda m: m.graph.node[0].attribute.add(ref_attr_name="a"), "reference to an attribute of a function"),
    ],
)
def test_models_that_are_refused(change, words):
    assert words in refusal(_changed(change))


def _field(number, data):
    """A field of bytes, as on the wire; both below 128."""
    return bytes([number << 3 | 2, len(data)]) + data


def test_what_stands_twice_is_refused():
    """Protobuf would take the second of two: what was checked, or the other?"""
    data = model().SerializeToString()
    assert "field 2 of a model stands twice" in refusal(data + 2 * _field(2, b"me"))
    node = model().graph.node[0].SerializeToString() + _field(4, b"Relu")
    assert "field 4 of a node stands twice" in refusal(_with_node(node))


def test_every_part_of_a_graph_is_checked():
    """A package holds graphs in parts, one behind the other: protobuf merges them, and so may a stranger."""
    data = model().SerializeToString()
    check_graph(data + _with_node(model().graph.node[0].SerializeToString()), "x.onnx")
    evil = helper.make_node("Evil", ["y"], ["z"]).SerializeToString()
    assert "found the operator 'Evil'" in refusal(data + _with_node(evil))
    assert "found the operator 'Evil'" in refusal(_with_node(evil) + data)


def _with_node(node):
    """A model of this node alone."""
    return _field(7, _field(1, node)) + _field(8, b"\x10\x12")


def test_unknown_fields_and_other_wire_types_are_refused():
    data = model().SerializeToString()
    assert "found field 99 of a model" in refusal(data + b"\x98\x06\x01")
    assert "field 8 of a model has the wire type 0" in refusal(data + b"\x40\x01")
    assert "field 4 of a node has the wire type 0" in refusal(_with_node(b"\x20\x01"))


def test_the_format_of_onnxruntime_is_not_read_in_place_of_onnx():
    """A file that is both: as ONNX it begins with the name of its producer."""
    both = model()
    both.ClearField("ir_version")
    both.producer_name = "xxORTM"
    data = both.SerializeToString()
    assert onnx.load_model_from_string(data).graph.node[0].op_type == "Relu"
    assert data[4:8] == b"ORTM"
    assert "it is in the format of onnxruntime, not in ONNX's" in refusal(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_end_in_one_line(data):
    refusal(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_refused_or_what_passes_is_what_the_library_reads(data):
    """Whatever passes here, protobuf itself reads too, with no operator or file that was not seen."""
    content = bytearray(
        model(
            [helper.make_node("Clip", ["x", "low"], ["y"])], [numpy_helper.from_array(np.zeros(2, "f4"), "low")]
        ).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    try:
        check_graph(bytes(content), WHERE)
    except ArtifactError:
        return
    try:
        read = onnx.load_model_from_string(bytes(content))
    except Exception:  # text that is no UTF-8: the library refuses what would pass here
        return
    assert {node.op_type.encode() for node in read.graph.node} <= ALLOWED_OPS
    assert {node.domain for node in read.graph.node} <= {"", "ai.onnx"}
    assert all(not tensor.external_data for tensor in read.graph.initializer)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_numbers_are_read_as_protobuf_writes_them(numbers):
    tensor = TensorProto(dims=[number - (number >> 63 << 64) for number in numbers])
    read = [
        number for field in fields(memoryview(tensor.SerializeToString())) for number in packed_varints(field)
    ]
    assert read == numbers


def test_a_number_that_does_not_end():
    with pytest.raises(WireError, match="a number does not end"):
        read_varint(memoryview(b"\xff" * 11), 0)
    with pytest.raises(WireError, match="field 1 has the wire type 3"):
        list(fields(memoryview(b"\x0b")))
