"""Dropout whose mask is computed from seeds, in plain operators.

The runtime's own Dropout draws other values each time it runs: backward could not repeat it, nor could a run
that is resumed.  Here each sample of the micro-batch brings a seed, so that a mask depends on nothing else:
not on the size of the micro-batch, not on the machine.  A negative seed drops nothing, for evaluation.

The generator is one of squares modulo a prime, in 64-bit integers, which every runtime multiplies exactly:

    h0 = s + b j,  h1 = h0^2 + s,  h2 = h1^2 + c  (mod p),  s = a seed + stream

and position j is kept where h2 >= ratio p.
"""

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from lance_edge.names import BATCH_DIM, DROPOUT_SEEDS
from lance_host.autodiff.emit import Emit, dims, static_dims
from lance_host.autodiff.rules.common import constant_of, operand, optional, unsupported
from lance_host.edit import take_over

MASK = "/dropout_mask"  # suffix of the values that a mask is
PRIME = 2**31 - 1  # the square of what is below it fits into 63 bits
MULTIPLIER, STRIDE, INCREMENT = 48271, 69621, 1_013_904_223


def seed_dropouts(graph: ir.Graph, trained: Collection[ir.Value]) -> ir.Value | None:
    """Replace every Dropout in training mode by a product with a mask computed from the seeds.

    Args:
        trained: values of the trained part.  Elsewhere nothing is dropped, so that the features of an image
            are always the same, and can be kept.

    Returns:
        the new graph input `dropout_seeds` `[N]`, or `None` if nothing is dropped.

    Raises:
        ModelError: if the first axis of what is dropped is not the batch.
    """
    nodes = [node for node in graph if node.op_type == "Dropout" and constant_of(optional(node, 2), False)]
    for node in [node for node in nodes if not _is_in(trained, node)]:
        _leave_out(graph, node)
    nodes = [node for node in nodes if node.graph is graph]
    if not nodes:
        return None
    seeds = ir.Value(name=DROPOUT_SEEDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([BATCH_DIM]))
    graph.inputs.append(seeds)
    emit = Emit(graph, "dropout/")
    for stream, node in enumerate(nodes):
        x, y = operand(node, 0), node.outputs[0]
        mask = _mask(emit, node, seeds, stream)
        mask.name = f"{y.name}{MASK}"
        dropped = emit("Mul", x, mask)
        dropped.type, dropped.shape = y.type, x.shape
        take_over(graph, node, dropped)
    graph.sort()
    return seeds


def _is_in(trained: Collection[ir.Value], node: ir.Node) -> bool:
    """Whether a Dropout is among values of the trained part, or nothing but that part reads what it gives."""
    readers = [use.node.outputs[0] for use in node.outputs[0].uses()]
    return node.inputs[0] in trained or (bool(readers) and all(value in trained for value in readers))


def drop_nothing(model: ir.Model, seeds: ir.Value | None) -> None:
    """Take the masks of `seed_dropouts` out again: the graph of evaluation, without the input `seeds`."""
    if seeds is None:
        return
    for node in [node for node in model.graph if node.op_type == "Mul" and _is_mask(node.inputs[1])]:
        _leave_out(model.graph, node)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.inputs.remove(seeds)


def _is_mask(value: ir.Value | None) -> bool:
    return value is not None and (value.name or "").endswith(MASK)


def _leave_out(graph: ir.Graph, node: ir.Node) -> None:
    """What the node reads first, in place of what it gives."""
    y = node.outputs[0]
    copy = ir.Value(type=y.type, shape=y.shape)
    identity = ir.Node("", "Identity", (node.inputs[0],), outputs=[copy], name=f"{node.name}/nothing")
    graph.insert_before(node, identity)
    take_over(graph, node, copy)


def _mask(emit: Emit, node: ir.Node, seeds: ir.Value, stream: int) -> ir.Value:
    """0 where a value is dropped and 1 / (1 - ratio) where it is kept; 1 everywhere for a negative seed."""
    x, ratio = operand(node, 0), float(constant_of(optional(node, 1), 0.5))
    if dims(x)[0] != BATCH_DIM:
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
