"""What forward saves for backward: a minimum cut by bytes.

In the joint graph every value that backward needs could be saved, or computed again from values that are
saved.  Cheap operators may be computed again, products and convolutions not.  The cheapest set of
values that separates the forward computation from backward is a minimum cut in a flow network whose
capacities are bytes (the formulation of min-cut rematerialisation, as in PyTorch's AOTAutograd).
"""

from collections.abc import Collection, Mapping, Sequence

import networkx as nx
import onnx_ir as ir

from lance_host.traverse import depends_on_data

# Operators that backward must not repeat: they cost more than reading their result back.
EXPENSIVE = frozenset(
    {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Exp", "LogSoftmax", "Softmax", "Erf"}
)


def values_to_save(
    backward_reads: Sequence[ir.Value],
    given: Collection[ir.Value],
    free: Collection[ir.Value],
    sizes: Mapping[ir.Value, int],
) -> list[ir.Value]:
    """The values to carry from forward to backward, in an order that is always the same.

    Args:
        backward_reads: forward values that nodes of backward use.
        given: values that exist before forward starts (prefix outputs): saved at their size, never recomputed.
        free: values that both phases are fed anyway (parameters, projections, labels): cost nothing.
        sizes: bytes per value; a value that is missing here cannot be saved, and is computed again at any cost.
    """
    network, needed = nx.DiGraph(), _ancestors(backward_reads, given, free)
    network.add_node("source")
    byte = 2 * len(needed) + 1
    for value in needed:
        # Of two cuts with equal bytes: the one with fewer tensors, and prefix outputs before copies of them.
        tie_break = 1 if value in given else 2  # all of them together weigh less than one byte
        capacity = byte * sizes[value] + tie_break if value in sizes else None
        _edge(network, (value, "in"), (value, "out"), capacity)
        producer = value.producer()
        is_dear = producer is not None and producer.op_type in EXPENSIVE and value in sizes
        if value in given or producer is None or is_dear:
            _edge(network, "source", (value, "in"), None)
        else:
            for operand in producer.inputs:
                if operand in needed:
                    _edge(network, (operand, "out"), (value, "in"), None)
    for value in backward_reads:
        if value in needed:
            _edge(network, (value, "out"), "sink", None)
    if "sink" not in network:
        return []
    _, (reached, _) = nx.minimum_cut(network, "source", "sink")
    return [value for value in needed if (value, "in") in reached and (value, "out") not in reached]


def _edge(network: nx.DiGraph, start: object, end: object, capacity: int | None) -> None:
    if capacity is None:
        network.add_edge(start, end)  # networkx: no capacity means unbounded
    else:
        network.add_edge(start, end, capacity=capacity)


def _ancestors(
    values: Sequence[ir.Value], given: Collection[ir.Value], free: Collection[ir.Value]
) -> dict[ir.Value, None]:
    """Values from which `values` are computed and that are neither free nor constant, in a fixed order."""
    found: dict[ir.Value, None] = {}
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in found or not depends_on_data(value, free):
            continue
        found[value] = None
        producer = value.producer()
        if value not in given and producer is not None:
            stack.extend(operand for operand in producer.inputs if operand is not None)
    return found
