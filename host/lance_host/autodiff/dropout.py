"""Dropout whose mask is computed from seeds, in plain operators.

The runtime's own Dropout draws other values each time it runs: backward could not repeat it, nor could a run
that is resumed.  Here each sample of the micro-batch brings a seed, so that a mask depends on nothing else:
not on the size of the micro-batch, not on the machine.  A negative seed drops nothing, for evaluation.

The generator is one of squares modulo a prime, in 64-bit integers, which every runtime multiplies exactly:

    h0 = s + b j,  h1 = h0^2 + s,  h2 = h1^2 + c  (mod p),  s = a seed + stream

and position j is kept where h2 >= ratio p.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lance_edge.manifest import DROPOUT_SEEDS as SEEDS
from lance_host.autodiff.emit import Emit, dims, static_dims
from lance_host.autodiff.rules.common import constant_of, operand, optional, unsupported

PRIME = 2**31 - 1  # the square of what is below it fits into 63 bits; seeds are below it, or negative
MULTIPLIER, STRIDE, INCREMENT = 48271, 69621, 1_013_904_223


def dropouts(graph: ir.Graph) -> list[ir.Node]:
    """The Dropout nodes in training mode."""
    return [node for node in graph if node.op_type == "Dropout" and constant_of(optional(node, 2), False)]


def drop_nothing(graph: ir.Graph, nodes: Sequence[ir.Node] | None = None) -> None:
    """Take these Dropout nodes out, by default all: inference drops nothing."""
    for node in dropouts(graph) if nodes is None else nodes:
        ir.convenience.replace_all_uses_with(node.outputs[0], operand(node, 0), replace_graph_outputs=True)
        graph.remove(node, safe=True)


def seed_dropouts(graph: ir.Graph) -> ir.Value | None:
    """Replace every Dropout in training mode by a product with a mask computed from the seeds.

    Returns:
        the new graph input `dropout_seeds` `[N]`, or `None` if nothing is dropped.

    Raises:
        ModelError: if the first axis of what is dropped is not the batch.
    """
    nodes = dropouts(graph)
    if not nodes:
        return None
    seeds = ir.Value(name=SEEDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["N"]))
    graph.inputs.append(seeds)
    emit = Emit(graph, "dropout/")
    for stream, node in enumerate(nodes):
        x, y = operand(node, 0), node.outputs[0]
        dropped = emit("Mul", x, _mask(emit, node, seeds, stream))
        dropped.type, dropped.shape = y.type, x.shape
        dropped.name, y.name = y.name, f"{y.name}/before"
        ir.convenience.replace_all_uses_with(y, dropped, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    graph.sort()
    return seeds


def _mask(emit: Emit, node: ir.Node, seeds: ir.Value, stream: int) -> ir.Value:
    """0 where a value is dropped and 1 / (1 - ratio) where it is kept; 1 everywhere for a negative seed."""
    x, ratio = operand(node, 0), float(constant_of(optional(node, 1), 0.5))
    if dims(x)[0] != "N":
        raise unsupported(node, f"expected the batch as first axis of what Dropout drops, found {dims(x)}")
    shape = static_dims(x, start=1)
    column = emit("Unsqueeze", seeds, emit.constant([1]))  # [N, 1]
    kept = _random(emit, column, math.prod(shape), stream, least=int(ratio * PRIME))
    off = emit("Less", column, _integer(emit, 0))
    mask = emit("Cast", emit("Or", kept, off), to=int(ir.DataType.FLOAT))
    gain = 1 / (1 - ratio)
    scale = emit("Add", emit("Mul", emit("Cast", off, to=int(ir.DataType.FLOAT)), 1 - gain), gain)  # [N, 1]
    return emit.reshape(emit("Mul", mask, scale), -1, *shape)


def _random(emit: Emit, column: ir.Value, size: int, stream: int, least: int) -> ir.Value:
    """Whether the number of each sample and position, of 0 to p - 1, is `least` or more: bool `[N, size]`."""

    def modulo(value: ir.Value) -> ir.Value:
        return emit("Mod", value, _integer(emit, PRIME))

    seed = emit("Mul", column, _integer(emit, MULTIPLIER))
    start = modulo(emit("Add", seed, _integer(emit, 1 + stream * INCREMENT % PRIME)))  # [N, 1]
    positions = emit("Range", *(_integer(emit, number) for number in (0, size, 1)))
    number = modulo(emit("Add", start, emit("Mul", positions, _integer(emit, STRIDE))))  # [N, size]
    number = modulo(emit("Add", emit("Mul", number, number), start))
    number = modulo(emit("Add", emit("Mul", number, number), _integer(emit, INCREMENT)))
    return emit("GreaterOrEqual", number, _integer(emit, least))


def _integer(emit: Emit, value: int) -> ir.Value:
    """An int64 scalar."""
    return emit.constant(np.array(value, np.int64))
