"""Reverse-mode differentiation: walk the graph backwards, one rule of the table for each node."""

from collections.abc import Callable, Collection, Mapping, Sequence

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.rules import RULES, STOPS
from lance_host.autodiff.rules.common import OfAllOutputs, Thunk

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
    nodes, active = downstream(emit.graph, wrt)
    gradient: dict[ir.Value, ir.Value] = {result: seed}
    for node in reversed(nodes):
        dys = [gradient.get(output) for output in node.outputs]
        if all(dy is None for dy in dys):
            continue
        for index, dx in input_gradients(emit, node, dys, active, overrides):
            value = node.inputs[index]
            assert value is not None
            gradient[value] = emit("Add", gradient[value], dx) if value in gradient else dx
    unreached = [value.name for value in wrt if value not in gradient]
    if unreached:
        raise ModelError(
            f"the loss does not depend on {unreached}: they cannot be trained; leave them out of --layers"
        )
    return [gradient[value] for value in wrt]


def downstream(graph: ir.Graph, values: Sequence[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes between `values` and the end, in topological order, and all values that carry a gradient."""
    active = set(values)
    nodes = []
    for node in graph:
        if any(value in active for value in node.inputs) and _has_slope(node):
            nodes.append(node)
            active.update(node.outputs)
    return nodes, active


def _has_slope(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", ir.DataType.FLOAT)).is_floating_point()
    return node.op_type not in STOPS


def input_gradients(
    emit: Emit,
    node: ir.Node,
    dys: Sequence[ir.Value | None],
    active: Collection[ir.Value],
    overrides: Mapping[tuple[ir.Node, int], InputGradient],
) -> list[tuple[int, ir.Value]]:
    """The gradient of each input of a node that is in `active`, by its index.

    Args:
        dys: the gradient of each output, `None` where there is none.

    Raises:
        ModelError: if the table has no rule for this, or the rule does not cover the node's attributes.
    """
    thunks = _thunks(emit, node, dys)
    results = []
    for index, value in enumerate(node.inputs):
        if value is None or value not in active:
            continue
        override = overrides.get((node, index))
        if override is None and index >= len(thunks):
            raise ModelError(_no_gradient(node, f"with respect to its input {index} ({value.name})"))
        dy = dys[0]
        results.append((index, override(emit, node, dy) if override and dy is not None else thunks[index]()))
    return results


def _thunks(emit: Emit, node: ir.Node, dys: Sequence[ir.Value | None]) -> Sequence[Thunk]:
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        raise ModelError(_unknown_op(node))
    if isinstance(rule, OfAllOutputs):
        return rule.rule(emit, node, dys)
    first, *others = dys
    if first is None or any(dy is not None for dy in others):
        raise ModelError(_no_gradient(node, "through an output other than its first"))
    return rule(emit, node, first)


def _no_gradient(node: ir.Node, what: str) -> str:
    return (
        f"operator {node.op_type} (node {node.name}, output {node.outputs[0].name}) has no gradient {what};"
        " train only layers behind it (smaller --layers)"
    )


def _unknown_op(node: ir.Node) -> str:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return (
        f"operator {name} (node {node.name}, output {node.outputs[0].name}) has no backward rule;"
        f" train only layers behind it (smaller --layers), or add a rule to lance_host/autodiff/rules;"
        f" known: {', '.join(sorted(RULES))}"
    )
