"""Reverse-mode differentiation: walk the graph backwards, one rule of the table for each node."""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.rules import RULES

# The gradient of one input of one node, given the gradient of its output: `(emit, node, dy) -> dx`.
InputGradient = Callable[[Emit, ir.Node, ir.Value], ir.Value]


def gradients(
    emit: Emit,
    result: ir.Value,
    seed: ir.Value,
    wrt: Sequence[ir.Value],
    overrides: Mapping[tuple[ir.Node, int], InputGradient],
) -> list[ir.Value]:
    """Append the gradient of the loss with respect to each value of `wrt`.

    Args:
        result: where differentiation starts: the logits.
        seed: the gradient of the loss with respect to `result`, of the same shape.
        overrides: replaces the table's rule for one input of one node; this is where a method puts its
            own weight gradient.

    Raises:
        ModelError: if a node between `wrt` and `result` has no rule, or a value does not reach it.
    """
    nodes, active = _downstream(emit.graph, wrt)
    gradient: dict[ir.Value, ir.Value] = {result: seed}
    for node in reversed(nodes):
        if any(value in gradient for value in node.outputs[1:]):  # rules are for one output: BN, Split, ...
            raise ModelError(_unknown_op(node))
        dy = gradient.get(node.outputs[0])
        if dy is None:
            continue
        for index, dx in _input_gradients(emit, node, dy, active, overrides):
            value = node.inputs[index]
            assert value is not None
            gradient[value] = emit("Add", gradient[value], dx) if value in gradient else dx
    unreached = [value.name for value in wrt if value not in gradient]
    if unreached:
        raise ModelError(
            f"the loss does not depend on {unreached}: they cannot be trained; leave them out of --layers"
        )
    return [gradient[value] for value in wrt]


def _downstream(graph: ir.Graph, values: Sequence[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes that depend on `values`, in topological order, and all values that carry a gradient."""
    active = set(values)
    nodes = []
    for node in graph:
        if any(value in active for value in node.inputs):
            nodes.append(node)
            active.update(node.outputs)
    return nodes, active


def _input_gradients(
    emit: Emit,
    node: ir.Node,
    dy: ir.Value,
    active: set[ir.Value],
    overrides: Mapping[tuple[ir.Node, int], InputGradient],
) -> list[tuple[int, ir.Value]]:
    wanted = [index for index, value in enumerate(node.inputs) if value is not None and value in active]
    if node.op_type not in RULES:
        raise ModelError(_unknown_op(node))
    rule = RULES[node.op_type](emit, node, dy)
    results = []
    for index in wanted:
        override = overrides.get((node, index))
        results.append((index, override(emit, node, dy) if override else rule[index]()))
    return results


def _unknown_op(node: ir.Node) -> str:
    return (
        f"operator {node.op_type} (node {node.name}, output {node.outputs[0].name}) has no backward rule;"
        f" train only layers behind it (smaller --layers), or add a rule to lance_host/autodiff/rules.py;"
        f" known: {', '.join(sorted(RULES))}"
    )
