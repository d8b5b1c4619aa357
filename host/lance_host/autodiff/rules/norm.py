"""Normalisations: y = gamma x' + beta with x' = (x - mean) r, r = 1 / sqrt(variance + epsilon).

Where mean and variance are those of x itself, over some axes,

    dx = r (g - mean(g) - x' mean(g x')),   g = gamma dy

and x' and r come from one operator of the runtime, run again on x with gamma 1 and beta 0.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lance_host.autodiff.emit import Emit, static_dim, static_dims
from lance_host.autodiff.rules.common import Thunk, operand, rank_of, reshaped_like, result, sum_to

Normalised = Callable[[], tuple[ir.Value, ir.Value]]  # x' and r, emitted once


def _centred(emit: Emit, g: ir.Value, normalised: Normalised, *axes: int) -> ir.Value:
    """dx as above, with means over `axes`."""
    unit, inverse = normalised()
    along = emit("Mul", unit, emit.mean(emit("Mul", g, unit), *axes))
    return emit("Mul", inverse, emit("Sub", emit("Sub", g, emit.mean(g, *axes)), along))


def _by_rows(emit: Emit, x: ir.Value, shape: Sequence[int], axis: int, epsilon: float) -> Normalised:
    """x' and r of means over the axes from `axis` on, which have the sizes `shape`."""

    @functools.cache
    def normalised() -> tuple[ir.Value, ir.Value]:
        ones = emit.constant(np.ones(shape, np.float32))
        unit, _, inverse = emit.several("LayerNormalization", 3, x, ones, axis=axis, epsilon=epsilon)
        return unit, inverse

    return normalised


def layer_norm(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Means over the last axes of each sample."""
    x, gamma, y = operand(node, 0), operand(node, 1), result(node)
    rank = rank_of(x)
    axis = node.attributes.get_int("axis", -1) % rank
    normalised = _by_rows(emit, x, static_dims(x, axis), axis, epsilon_of(node))
    return (
        lambda: _centred(emit, emit("Mul", dy, gamma), normalised, *range(axis, rank)),
        lambda: sum_to(emit, emit("Mul", dy, normalised()[0]), y, gamma),
        lambda: sum_to(emit, dy, y, operand(node, 2)),
    )


def epsilon_of(node: ir.Node) -> float:
    """What is added to the variance."""
    return float(node.attributes.get_float("epsilon", 1e-5))


def instance_norm(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Means over the positions of each channel."""
    return _grouped(emit, node, dy, static_dim(operand(node, 0), 1))


def group_norm(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Means over the channels of a group and their positions; gamma per channel, before opset 21 per group."""
    return _grouped(emit, node, dy, node.attributes.get_int("num_groups", 1))


def _grouped(emit: Emit, node: ir.Node, dy: ir.Value, groups: int) -> Sequence[Thunk]:
    x, gamma = operand(node, 0), operand(node, 1)
    channels, *size = static_dims(x, start=1)
    length = channels // groups * math.prod(size)
    rows = functools.cache(lambda: emit.reshape(x, 0, groups, length))  # [N, groups, length]
    entries = static_dims(gamma)[0]  # of gamma: as many as channels, or as groups
    parts = (0, entries, channels * math.prod(size) // entries)  # [N, entries, rest]

    @functools.cache
    def normalised() -> tuple[ir.Value, ir.Value]:
        return _by_rows(emit, rows(), (length,), 2, epsilon_of(node))()

    def dx() -> ir.Value:
        g = emit("Mul", emit.reshape(dy, *parts), emit.reshape(gamma, entries, 1))
        return reshaped_like(emit, _centred(emit, emit.reshape(g, 0, groups, length), normalised, 2), x)

    def of_gamma() -> ir.Value:
        product = emit("Mul", emit.reshape(dy, *parts), emit.reshape(normalised()[0], *parts))
        return emit.sum(product, 0, 2)

    return dx, of_gamma, lambda: emit.sum(emit.reshape(dy, *parts), 0, 2)


# --- batch normalisation ------------------------------------------------------------------------------


def batch_norm(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Frozen statistics are one affine map per channel; those of the batch need whole batches."""
    if node.attributes.get_int("training_mode", 0):
        return _batch_norm_of_batch(emit, node, dy)
    return _batch_norm_frozen(emit, node, dy)


def _batch_norm_frozen(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    x, gamma, _, mean, variance = (operand(node, index) for index in range(5))
    rank = rank_of(x)
    others = [0, *range(2, rank)]
    inverse = functools.cache(lambda: emit("Reciprocal", emit("Sqrt", emit("Add", variance, epsilon_of(node)))))
    scale = functools.cache(lambda: emit("Mul", gamma, inverse()))
    total = functools.cache(lambda: emit.sum(dy, *others))

    @functools.cache
    def moment() -> ir.Value:  # sum of dy (x - mean)
        centred = emit("Sub", x, per_channel(emit, mean, rank))
        return emit.sum(emit("Mul", dy, centred), *others)

    def of_variance() -> ir.Value:  # gamma d r / d variance = -1/2 gamma r^3
        slope = emit("Mul", emit("Mul", scale(), emit("Mul", inverse(), inverse())), -0.5)
        return emit("Mul", moment(), slope)

    return (
        lambda: emit("Mul", dy, per_channel(emit, scale(), rank)),
        lambda: emit("Mul", moment(), inverse()),
        total,
        lambda: emit("Neg", emit("Mul", total(), scale())),
        of_variance,
    )


def per_channel(emit: Emit, value: ir.Value, rank: int) -> ir.Value:
    """`[C] -> [C, 1, ...]`, to be broadcast to `[N, C, ...]`."""
    return value if rank == 2 else emit.reshape(value, -1, *[1] * (rank - 2))


def _batch_norm_of_batch(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    x, gamma = operand(node, 0), operand(node, 1)
    rank = rank_of(x)
    others = [0, *range(2, rank)]

    @functools.cache
    def normalised() -> tuple[ir.Value, ir.Value]:
        moments = batch_moments(emit, x, epsilon_of(node))
        return moments.unit, moments.inverse

    return (
        lambda: _centred(emit, emit("Mul", dy, per_channel(emit, gamma, rank)), normalised, *others),
        lambda: emit.sum(emit("Mul", dy, normalised()[0]), *others),
        lambda: emit.sum(dy, *others),
    )


@dataclass(frozen=True)
class Moments:
    """x' `[N, C, ...]`; mean, variance and r = 1 / sqrt(variance + epsilon) `[1, C, 1, ...]`."""

    unit: ir.Value
    mean: ir.Value
    variance: ir.Value
    inverse: ir.Value


def batch_moments(emit: Emit, x: ir.Value, epsilon: float) -> Moments:
    """The statistics of the batch in plain operators.

    Not the runtime's own BatchNormalization in training mode: that writes the running statistics over its
    inputs, also where these are constants.
    """
    others = [0, *range(2, rank_of(x))]
    mean = emit.mean(x, *others)
    centred = emit("Sub", x, mean)
    variance = emit.mean(emit("Mul", centred, centred), *others)
    inverse = emit("Reciprocal", emit("Sqrt", emit("Add", variance, epsilon)))
    return Moments(emit("Mul", centred, inverse), mean, variance, inverse)
