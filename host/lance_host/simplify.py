"""An exported graph, made plain: shapes known, shape arithmetic gone, no steps that do nothing.

The exporter computes the operands of Reshape, Expand and Slice from the shape of the images, step by step,
and loses track of the shapes on the way.  Here the graph runs once for each of two batch sizes, and what
was found to depend on neither becomes a constant.  What differs grows linearly with the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule

from lance_host.autodiff.emit import Emit
from lance_host.edit import constant, known_integer, take_over
from lance_host.runtime import open_session
from lance_host.shapes import dimension
from lance_host.slices import split_slices

Integers = NDArray[np.int64]
PROBES = (2, 3)  # batch sizes; 1 is special in broadcasting
SHAPE = "/shape"  # suffix of the outputs that a probe adds


def simplify(model: ir.Model) -> None:
    """Settle shapes, drop what does nothing, and read parts of a tensor with one Split."""
    settle_shapes(model)
    drop_no_ops(model)
    rewrite(model, [fuse_pad_into_conv_rule])  # networks from TensorFlow pad unevenly, by a Pad before
    split_slices(model)
    passes.RemoveUnusedNodesPass()(model)


# --- shapes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What a run with one batch size found: the shape of every value, and the values of shape arithmetic."""

    shapes: Mapping[str, Integers]
    integers: Mapping[str, Integers]


def settle_shapes(model: ir.Model) -> None:
    """Annotate every value with its shape, and make constants of operands that do not depend on the batch.

    A dimension that does is called `N`, `4*N` or `N+1`, and becomes -1 in the operand of a Reshape.
    """
    first, second = (_probe(model, batch) for batch in PROBES)
    for result in [value for node in model.graph for value in node.outputs]:
        if str(result.name) in first.shapes:
            sizes = zip(first.shapes[str(result.name)], second.shapes[str(result.name)], strict=True)
            result.shape = ir.Shape([dimension(int(a), int(b), PROBES) for a, b in sizes])
    for node in list(model.graph):
        for index, value in enumerate(node.inputs):
            if value is None or value.producer() is None or str(value.name) not in first.integers:
                continue
            settled = _settled(node, index, first.integers[str(value.name)], second.integers[str(value.name)])
            if settled is not None:
                node.replace_input_with(
                    index, constant(model.graph, f"{value.name}/{node.name}/{index}", settled)
                )
        if _reads_in_order(node, first.integers) and _reads_in_order(node, second.integers):
            _write_as_reshape(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    _expand_as_neighbours(model.graph)
    passes.RemoveUnusedNodesPass()(model)


def _expand_as_neighbours(graph: ir.Graph) -> None:
    """An Expand over the batch (of a class token) reads the batch size of what its result is combined with.

    Read from the images, the size would be a tensor of its own between prefix and tail.
    """
    emit = Emit(graph, "expand/")
    for node in [node for node in graph if node.op_type == "Expand"]:
        y, shape = node.outputs[0], node.inputs[1]
        readers = [
            other for use in y.uses() for other in use.node.inputs if other is not None and other is not y
        ]
        alike = [other for other in readers if _same_batch(other, y)]
        if shape is None or shape.producer() is None or not alike or y.shape is None:
            continue
        parts = [
            emit.constant([dim]) if isinstance(dim, int) else emit("Shape", alike[0], start=axis, end=axis + 1)
            for axis, dim in enumerate(y.shape)
        ]
        sizes = emit("Concat", *parts, axis=0)
        for value in (*parts, sizes):
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        sizes.shape = ir.Shape([len(parts)])
        node.replace_input_with(1, sizes)
    graph.sort()


def _same_batch(first: ir.Value, second: ir.Value) -> bool:
    """Whether two values depend on the batch in the same dimensions."""
    a, b = first.shape, second.shape
    if a is None or b is None or len(a) != len(b):
        return False
    return all(x == y for x, y in zip(a, b, strict=True) if not (isinstance(x, int) and isinstance(y, int)))


def _settled(node: ir.Node, index: int, first: Integers, second: Integers) -> Integers | None:
    """The constant that may stand for a computed operand, if there is one."""
    y = node.outputs[0].shape
    if node.op_type == "Reshape" and index == 1 and y is not None:
        shape = [dim if isinstance(dim, int) else -1 for dim in y]
        return np.array(shape, np.int64) if shape.count(-1) <= 1 and 0 not in shape else None
    if np.array_equal(first, second):
        return first
    x = node.inputs[0].shape if node.inputs[0] is not None else None
    if node.op_type == "Expand" and index == 1 and x is not None and y is not None and len(x) == len(y):
        kept = [1 if before == after else after for before, after in zip(x, y, strict=True)]
        fixed = [dim for dim in kept if isinstance(dim, int)]
        return np.array(fixed, np.int64) if len(fixed) == len(kept) else None
    return None


def _reads_in_order(node: ir.Node, integers: Mapping[str, Integers]) -> bool:
    """Whether a Gather reads a flat tensor from first to last, as the exporter writes PyTorch's as_strided."""
    x, indices = node.inputs[:2] if node.op_type == "Gather" else (None, None)
    if x is None or indices is None or x.shape is None or len(x.shape) != 1:
        return False
    found = integers.get(str(indices.name))
    y = node.outputs[0].shape
    if found is None or y is None or sum(not isinstance(dim, int) for dim in y) != 1:
        return False
    return np.array_equal(found.ravel(), np.arange(found.size))


def _write_as_reshape(graph: ir.Graph, node: ir.Node) -> None:
    y = node.outputs[0]
    assert y.shape is not None
    shape = np.array([dim if isinstance(dim, int) else -1 for dim in y.shape], np.int64)
    reshaped = ir.Value(type=y.type, shape=y.shape)
    operand = constant(graph, f"{y.name}/shape", shape)
    reshape = ir.Node("", "Reshape", (node.inputs[0], operand), outputs=[reshaped], name=f"{node.name}/reshape")
    reshape.metadata_props.update(node.metadata_props)
    graph.insert_before(node, reshape)
    take_over(graph, node, reshaped)


def _probe(model: ir.Model, batch: int) -> Probe:
    probe = model.clone()
    graph = probe.graph
    values = [value for node in graph for value in node.outputs if value.name]
    integers = [value for value in values if value.dtype == ir.DataType.INT64]
    shapes = []
    for value in values:
        shape = ir.Value(name=f"{value.name}{SHAPE}", type=ir.TensorType(ir.DataType.INT64))
        graph.append(ir.Node("", "Shape", (value,), outputs=[shape]))
        shapes.append(shape)
    graph.outputs[:] = [*shapes, *integers]
    feeds = {}
    for value in graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        size = [dim if isinstance(dim, int) else batch for dim in value.shape]
        feeds[value.name] = np.zeros(size, value.dtype.numpy())
    names = [str(value.name) for value in graph.outputs]
    results = open_session(ir.serde.serialize_model(probe).SerializeToString()).run(names, feeds)
    found = dict(zip(names, results, strict=True))
    return Probe(
        shapes={str(value.name): found[f"{value.name}{SHAPE}"] for value in values},
        integers={str(value.name): found[str(value.name)] for value in integers},
    )


# --- steps that do nothing --------------------------------------------------------------------------------


def drop_no_ops(model: ir.Model) -> None:
    """Remove every Reshape, Expand and Slice whose output has the shape of its input."""
    for node in list(model.graph):
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        if x is None or x.shape is None or x.shape != y.shape or y.is_graph_output():
            continue
        if node.op_type in ("Reshape", "Expand") or (node.op_type == "Slice" and _forward(node)):
            ir.convenience.replace_all_uses_with(y, x)
            model.graph.remove(node, safe=True)


def _forward(node: ir.Node) -> bool:
    """Whether a Slice takes its positions in their order."""
    steps = known_integer(node, 4, default=1)
    return steps is not None and steps > 0
