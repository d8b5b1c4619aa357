"""Mutations of ONNX graphs: most of them give another graph that is well-formed."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hostile_values import Draw, mutate_bytes, mutate_json
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

INTEGERS = st.sampled_from([0, 1, -1, 2, 3, 7, 64, 10_000, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63)])
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain})


def mutate_graph(draw: Draw, data: bytes) -> bytes:
    """Damage, or another graph that is well-formed."""
    if draw(st.integers(0, 3)) == 0:
        return mutate_bytes(draw, data)
    model = onnx.load_model_from_string(data)
    for _ in range(draw(st.integers(1, 3))):
        with contextlib.suppress(ValueError, onnx.checker.ValidationError):  # too broken for another mutation
            MUTATIONS[draw(st.sampled_from(sorted(MUTATIONS)))](draw, model)
    return model.SerializeToString()


def _operator(draw: Draw, model: Any) -> None:
    draw(st.sampled_from(list(model.graph.node))).op_type = draw(st.sampled_from([*OPERATORS, "Evil", ""]))


def _attribute(draw: Draw, model: Any) -> None:
    node = draw(st.sampled_from(list(model.graph.node)))
    found = [attribute for attribute in node.attribute if attribute.ints]
    if found and draw(st.booleans()):
        attribute = draw(st.sampled_from(found))
        attribute.ints[draw(st.integers(0, len(attribute.ints) - 1))] = draw(INTEGERS)
        return
    names = [
        "axis",
        "axes",
        "perm",
        "group",
        "strides",
        "pads",
        "dilations",
        "kernel_shape",
        "equation",
        "keepdims",
    ]
    names += ["alpha", "epsilon", "mode", "to", "value", "allowzero", "auto_pad", "body", "then_branch"]
    name, kind = draw(st.sampled_from(names)), draw(st.integers(0, 4))
    values = [draw(INTEGERS), [draw(INTEGERS) for _ in range(draw(st.integers(1, 5)))], 0.5, "i...,jj->k", None]
    value = values[kind]
    if value is None:
        value = numpy_helper.from_array(np.zeros((2, 2), np.float32), "v")
    node.attribute.append(helper.make_attribute(name, value))


def _wire(draw: Draw, model: Any) -> None:
    """Another input or output of a node: graphs that are cyclic, unconnected, or double."""
    node = draw(st.sampled_from(list(model.graph.node)))
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    names += ["", "nowhere", *(value.name for value in (*model.graph.input, *model.graph.initializer))]
    end = draw(st.sampled_from([node.input, node.output]))
    if end:
        end[draw(st.integers(0, len(end) - 1))] = draw(st.sampled_from(sorted(names)))


def _initializer(draw: Draw, model: Any) -> None:
    """Numbers that steer other operators (shapes, axes, indices), or tensors that lie about themselves."""
    if not model.graph.initializer:
        return
    tensor = draw(st.sampled_from(list(model.graph.initializer)))
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    kind = draw(st.sampled_from(["values", "shape", "type", "external", "other"]))
    if kind == "values" and tensor.data_type == TensorProto.INT64:
        array = numpy_helper.to_array(tensor).copy()
        array[...] = draw(INTEGERS)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif kind == "shape":
        del tensor.dims[:]
        tensor.dims.extend(draw(st.lists(INTEGERS, max_size=4)))
    elif kind == "type":
        tensor.data_type = draw(st.integers(-1, 30))
    elif kind == "external":
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", draw(st.sampled_from(["/etc/passwd", "../../evil", "weights.npz"]))
        tensor.ClearField("raw_data")
    else:
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(_numbers(draw)), tensor.name))


def _numbers(draw: Draw) -> Any:
    shape = draw(st.lists(st.integers(0, 6), max_size=5))
    return np.full(
        shape, draw(st.sampled_from([0, 1, 3])), draw(st.sampled_from([np.float32, np.int64, np.bool_]))
    )


def _domain(draw: Draw, model: Any) -> None:
    domain = draw(st.sampled_from(["com.microsoft", "ai.onnx.ml", "evil", "com.ms.internal.nhwc", "ai.onnx"]))
    if draw(st.booleans()):
        draw(st.sampled_from(list(model.graph.node))).domain = domain
    if draw(st.booleans()):
        model.opset_import.append(helper.make_opsetid(domain, draw(INTEGERS)))


def _versions(draw: Draw, model: Any) -> None:
    model.ir_version = draw(INTEGERS)
    model.opset_import[0].version = draw(INTEGERS)


def _amplify(draw: Draw, model: Any) -> None:
    """A few nodes that ask for very much memory."""
    graph = model.graph
    if not graph.output:
        return
    name = graph.output[0].name
    kind = draw(st.sampled_from(["concat", "tile", "fill", "outer", "pad"]))
    size = draw(st.sampled_from([1 << 10, 1 << 28, 1 << 40]))
    for node in graph.node:
        for position, output in enumerate(node.output):
            if output == name:
                node.output[position] = "small0"
    count = 1
    if kind == "concat":
        count = draw(st.sampled_from([3, 30, 60]))
        for step in range(count):
            graph.node.append(helper.make_node("Concat", [f"small{step}"] * 2, [f"small{step + 1}"], axis=0))
    elif kind == "tile":
        graph.initializer.append(numpy_helper.from_array(np.array([size], np.int64), "times"))
        graph.node.append(helper.make_node("Tile", ["small0", "times"], ["small1"]))
    elif kind == "fill":
        graph.initializer.append(numpy_helper.from_array(np.array([size], np.int64), "times"))
        graph.node.append(helper.make_node("ConstantOfShape", ["times"], ["small1"]))
    elif kind == "outer":
        graph.initializer.append(numpy_helper.from_array(np.array([size, 1], np.int64), "times"))
        graph.node.append(helper.make_node("Expand", ["small0", "times"], ["small1"]))
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([size] * 4, np.int64), "times"))
        graph.node.append(helper.make_node("Pad", ["small0", "times"], ["small1"]))
    graph.node.append(helper.make_node("Identity", [f"small{count}"], [name]))


def _nested(draw: Draw, model: Any) -> None:
    """Loops, branches, functions."""
    body = helper.make_graph([], "body", [], [])
    kind = draw(st.sampled_from(["If", "Loop", "Scan", "function"]))
    if kind == "function":
        node = helper.make_node("Identity", ["x"], ["y"])
        model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], list(model.opset_import)))
        return
    node = helper.make_node(kind, [model.graph.node[0].input[0]], ["nested"])
    for name in ("body", "then_branch", "else_branch"):
        node.attribute.append(helper.make_attribute(name, body))
    model.graph.node.append(node)


def _signature(draw: Draw, model: Any) -> None:
    """Other inputs and outputs than declared."""
    values = draw(st.sampled_from([model.graph.input, model.graph.output]))
    if not values:
        return
    value = draw(st.sampled_from(list(values)))
    kind = draw(st.sampled_from(["name", "type", "shape", "remove", "double"]))
    if kind == "name":
        value.name = draw(st.sampled_from(["images", "logits", "other", ""]))
    elif kind == "type":
        value.type.tensor_type.elem_type = draw(st.integers(-1, 30))
    elif kind == "shape":
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = draw(INTEGERS)
    elif kind == "remove":
        values.remove(value)
    else:
        values.append(value)


def _metadata(draw: Draw, model: Any) -> None:
    """Other classes and another preprocessing than those of the network."""
    if not model.metadata_props:
        return
    entry = draw(st.sampled_from(list(model.metadata_props)))
    entry.value = json.dumps(mutate_json(draw, json.loads(entry.value)))


MUTATIONS: dict[str, Callable[[Draw, Any], None]] = {
    "operator": _operator,
    "attribute": _attribute,
    "wire": _wire,
    "initializer": _initializer,
    "domain": _domain,
    "versions": _versions,
    "amplify": _amplify,
    "nested": _nested,
    "signature": _signature,
    "metadata": _metadata,
}
