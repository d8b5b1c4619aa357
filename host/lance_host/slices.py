"""Parts of one tensor, read by one Split.

Queries, keys and values are slices that cover an axis without overlap.  Read by a Split, their gradients are
put side by side, instead of being padded with zeros and added.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lance_host.edit import constant, known_integer, take_over


@dataclass(frozen=True)
class Part:
    """Positions `start:stop` of an axis, read by a Slice, or one of them by a Gather that drops the axis."""

    node: ir.Node
    axis: int
    start: int
    stop: int


def split_slices(model: ir.Model) -> None:
    """Where Slices or Gathers of one tensor cover an axis without overlap, read it with one Split."""
    for value in [value for node in model.graph for value in node.outputs]:
        parts = [_part(use.node) for use in value.uses() if use.idx == 0]
        found = sorted((part for part in parts if part is not None), key=lambda part: part.start)
        if len(found) > 1 and _cover(value, found):
            _split(model.graph, value, found)


def _part(node: ir.Node) -> Part | None:
    x = node.inputs[0]
    if x is None or x.shape is None:
        return None
    if node.op_type == "Slice" and known_integer(node, 4, default=1) == 1:
        start, stop, axis = known_integer(node, 1), known_integer(node, 2), known_integer(node, 3, default=0)
        if stop is None:  # computed
            return None
    elif node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].shape == ir.Shape([]):
        start, axis = known_integer(node, 1), node.attributes.get_int("axis", 0)
        stop = None if start is None else start + 1 or None
    else:
        return None
    if start is None or axis is None:
        return None
    size = x.shape[axis % len(x.shape)]
    if not isinstance(size, int):
        return None
    positions = range(size)[start:stop]
    return Part(node, axis % len(x.shape), positions.start, positions.stop) if positions else None


def _cover(value: ir.Value, parts: list[Part]) -> bool:
    assert value.shape is not None
    axis = parts[0].axis
    ends = [0, *(part.stop for part in parts)]
    return (
        all(part.axis == axis for part in parts)
        and [part.start for part in parts] == ends[:-1]
        and ends[-1] == value.shape[axis]
    )


def _split(graph: ir.Graph, value: ir.Value, parts: list[Part]) -> None:
    sizes = np.array([part.stop - part.start for part in parts], np.int64)
    outputs = [ir.Value(name=f"{part.node.outputs[0].name}/part", type=value.type) for part in parts]
    first = parts[0].node
    split = ir.Node(
        "",
        "Split",
        (value, constant(graph, f"{value.name}/sizes", sizes)),
        attributes=ir.convenience.convert_attributes({"axis": parts[0].axis}),
        outputs=outputs,
        name=f"{value.name}/split",
    )
    split.metadata_props.update(first.metadata_props)
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, split)
    for part, output in zip(parts, outputs, strict=True):
        _read_part(graph, part, output, value)


def _read_part(graph: ir.Graph, part: Part, output: ir.Value, value: ir.Value) -> None:
    """Let the readers of a Slice or Gather read a part of the Split."""
    assert value.shape is not None
    y = part.node.outputs[0]
    shape = list(value.shape)
    shape[part.axis] = part.stop - part.start
    output.shape = ir.Shape(shape)
    if part.node.op_type == "Gather":
        axis = constant(graph, f"{y.name}/axis", np.array([part.axis], np.int64))
        squeezed = ir.Value(type=y.type, shape=y.shape)
        squeeze = ir.Node("", "Squeeze", (output, axis), outputs=[squeezed], name=f"{y.name}/squeeze")
        squeeze.metadata_props.update(part.node.metadata_props)
        graph.insert_before(part.node, squeeze)
        output = squeezed
    take_over(graph, part.node, output)
