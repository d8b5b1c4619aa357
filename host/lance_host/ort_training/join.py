"""The graphs that a device runs one after the other, as one graph again."""

from collections.abc import Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto


def join(parts: Mapping[str, ModelProto], public: Mapping[str, str]) -> GraphProto:
    """Nodes and constants of all parts; they meet in the tensors that their signatures name.

    What is inside of a part gets the part's name in front: the parts were cut from one graph, and some of
    them compute the same value again.  The result has no inputs and outputs yet.

    Args:
        parts: by name, each after those whose outputs it reads.
        public: new names of tensors in the signatures.
    """
    graph = GraphProto()
    for part, model in parts.items():
        source = GraphProto()
        source.CopyFrom(model.graph)
        _rename(source, _new_names(part, source, public))
        for node in source.node:
            node.name = f"{part}::{node.name}" if node.name else ""
        graph.node.extend(source.node)
        graph.initializer.extend(source.initializer)
    return graph


def _new_names(part: str, graph: GraphProto, public: Mapping[str, str]) -> dict[str, str]:
    """Old name -> new name, of every tensor that the part computes or holds, or has in its signature."""
    signature = [value.name for value in (*graph.input, *graph.output)]
    inside = [name for node in graph.node for name in node.output] + [item.name for item in graph.initializer]
    names = {name: f"{part}::{name}" for name in inside if name}  # "": an output that nobody wants
    return names | {name: public.get(name, name) for name in signature}


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """In place, also where a graph inside of a node reads a tensor from around it."""
    for item in graph.initializer:
        item.name = names.get(item.name, item.name)
    for output in graph.output:
        output.name = names.get(output.name, output.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in _inner_graphs(node):
            _rename(inner, names)


def _inner_graphs(node: NodeProto) -> Sequence[GraphProto]:
    return [
        inner
        for attribute in node.attribute
        for inner in ((attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs)
    ]
