"""Batch-norm with the statistics of the batch.

Such a layer mixes the samples of a batch, so it must see the whole batch at once: forward and backward of a
graph that has one are exact only where the micro-batch is the batch.

`use_batch_statistics` marks the layers before differentiation; `lower_batch_norm` writes them in plain
operators after it, because the runtime's own operator overwrites the running statistics that it is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lance_host.autodiff.emit import Emit, static_dims
from lance_host.autodiff.rules.common import operand, rank_of
from lance_host.autodiff.rules.norm import batch_moments, epsilon_of, per_channel
from lance_host.edit import take_over


@dataclass(frozen=True)
class RunningStatistic:
    """A buffer of the network `[C]`, and the value of the graph that replaces it after a step."""

    buffer: ir.Value
    updated: ir.Value


def needs_whole_batches(graph: ir.Graph) -> bool:
    """Whether a micro-batch must be the whole batch."""
    return any(_is_of_batch(node) for node in graph)


def _is_of_batch(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and bool(node.attributes.get_int("training_mode", 0))


def use_batch_statistics(norms: Sequence[ir.Node]) -> None:
    """Let these BatchNormalization nodes normalise with the mean and variance of the batch.

    (`torch.onnx` writes inference nodes for layers in training mode as well, so it cannot say so itself.)
    """
    for node in norms:
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
        node.resize_outputs(3)
        for index, name in ((1, "running_mean"), (2, "running_variance")):
            node.outputs[index].name = f"{node.outputs[0].name}/{name}"


def lower_batch_norm(graph: ir.Graph) -> list[RunningStatistic]:
    """Write the nodes that use the batch's statistics in plain operators.

    Returns:
        the new running statistics, as PyTorch computes them: means over the batches with the node's
        momentum, of the unbiased variance.
    """
    emit = Emit(graph, "batch_norm/")
    found = []
    for node in [node for node in graph if _is_of_batch(node)]:
        x, gamma, beta = (operand(node, index) for index in range(3))
        rank, y = rank_of(x), node.outputs[0]
        moments = batch_moments(emit, x, epsilon_of(node))
        scaled = emit("Mul", moments.unit, per_channel(emit, gamma, rank))
        result = emit("Add", scaled, per_channel(emit, beta, rank))
        result.type, result.shape = y.type, y.shape
        unbiased = emit("Mul", moments.variance, _correction(emit, x))
        for index, statistic in ((3, moments.mean), (4, unbiased)):
            found.append(_running(emit, node, operand(node, index), statistic))
        take_over(graph, node, result)
    graph.sort()
    return found


def _correction(emit: Emit, x: ir.Value) -> ir.Value:
    """n / (n - 1) for n values per channel."""
    batch = emit("Cast", emit("Shape", x, start=0, end=1), to=int(ir.DataType.FLOAT))
    count = emit("Mul", batch, float(math.prod(static_dims(x, start=2))))
    return emit("Div", count, emit("Sub", count, 1.0))


def _running(emit: Emit, node: ir.Node, buffer: ir.Value, statistic: ir.Value) -> RunningStatistic:
    keep = float(node.attributes.get_float("momentum", 0.9))
    flat = emit.reshape(statistic, -1)
    updated = emit("Add", emit("Mul", buffer, keep), emit("Mul", flat, 1 - keep))
    updated.name = f"{buffer.name}/updated"
    return RunningStatistic(buffer, updated)
