"""Before anything long starts: can every operator behind the trainable layers be differentiated?

Each operator's rule is tried out, on a copy of the graph, so that the answer names the operator, the module
of the network that it belongs to, and how many of the layers can be trained.
"""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from lance_edge.counts import parse_counts
from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.reverse import downstream, input_gradients
from lance_host.capture import Captured, clone
from lance_host.scopes import module_of
from lance_host.traverse import ancestors


def check_trainable(captured: Captured, selection: str) -> None:
    """Refuse layers whose gradient would have to pass an operator without a rule.

    Args:
        selection: what the user asked for with `--layers`.

    Raises:
        ModelError: naming the operator, its module, and the selection that works.
    """
    copy = clone(captured)
    problems = _problems(copy)
    layers = {layer.weight: layer.name for layer in copy.layers}
    # Biases and norms lie behind the layers: what blocks them blocks a layer, or the head.
    names = [str(value.name) for value in copy.parameters]
    blocked = {
        name: _first(problems, copy, value)
        for name, value in zip(names, copy.parameters, strict=True)
        if name not in copy.extras
    }
    for name, node in blocked.items():
        if node is not None and name not in layers:
            raise ModelError(
                f"{name} cannot be trained: {problems[node]}{_in_module(node)}; use another network"
            )
    for works, weight in enumerate(reversed(layers)):
        node = blocked[weight]
        if node is not None:
            smaller = _smaller(selection, list(layers.values()), works)
            raise ModelError(
                f"--layers {selection}: {problems[node]}{_in_module(node)}, and the gradient of"
                f" {layers[weight]} passes it; of these layers the last {works} can be trained:"
                f" --layers {smaller}"
            )


def _first(problems: dict[ir.Node, str], captured: Captured, parameter: ir.Value) -> ir.Node | None:
    """The first operator with a problem that the gradient of a parameter passes."""
    behind = set(downstream(captured.model.graph, [parameter])[0])
    return next((node for node in problems if node in behind), None)


def _in_module(node: ir.Node) -> str:
    module = module_of(node)
    return f" in module {module}" if module else ""


def _smaller(selection: str, layers: Sequence[str], count: int) -> str:
    """The same kind of selection with a smaller count, or the names of the last layers."""
    kind, colon, counts = selection.rpartition(":")
    if parse_counts(counts):
        return f"{kind}{colon}{count}"
    return ",".join(layers[-count:]) if count else "0"


def _problems(captured: Captured) -> dict[ir.Node, str]:
    """What stands in the way at each operator behind the parameters, in the order of the graph."""
    graph = captured.model.graph
    nodes, active = downstream(graph, captured.parameters)
    needed = set(ancestors([captured.logits], stop=lambda _: False))
    emit = Emit(graph, "trial/")
    problems = {}
    for node in nodes:
        dys = [_gradient_of(value) if value in needed else None for value in node.outputs]
        if any(dy is not None for dy in dys):
            problem = _problem(emit, node, dys, active)
            if problem is not None:
                problems[node] = problem
    return problems


def _gradient_of(value: ir.Value) -> ir.Value:
    return ir.Value(name=f"{value.name}/trial", type=value.type, shape=value.shape)


def _problem(
    emit: Emit, node: ir.Node, dys: Sequence[ir.Value | None], active: Collection[ir.Value]
) -> str | None:
    """The reason that a rule gives, without its advice."""
    try:
        input_gradients(emit, node, dys, active, overrides={})
    except ModelError as error:
        return str(error).partition(";")[0]
    return None
