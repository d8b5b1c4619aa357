"""How a convolution's weight gradient is computed: the table of methods.

`bp` keeps the input A.  `lance` (arXiv 2509.21617) keeps two sums over the batch instead,

    G = sum_b U0[b] (x) (A_b projected on U1, U2, U3)      [r0, r1, r2, r3]   known after forward
    D = sum_b U0[b] (x) dY_b                               [r0, O, H', W']    known after backward

from which the gradient with the rebuilt activation in place of A is exact.  Both sums run over
micro-batches of any size.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lance_edge.manifest import projection_name
from lance_host.autodiff import conv
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit

# The micro-batch for which costs are compared where they depend on it.
PLANNED_MICRO_BATCH = 8


@dataclass
class LayerContext:
    """One trainable layer while its weight gradient is being written.

    `projections` are the graph inputs U0 (rows of this micro-batch, `[N, r0]`), U1 `[C, r1]`, U2 `[H, r2]`,
    U3 `[W, r3]`; `statistics` collects the values that are summed over micro-batches.
    """

    name: str
    ranks: tuple[int, ...]
    projections: tuple[ir.Value, ...]
    statistics: list[ir.Value] = field(default_factory=list)


# `(emit, layer, geometry, input, dy) -> weight gradient`; statistics are noted in the layer's context.
WeightGradient = Callable[[Emit, LayerContext, ConvGeometry, ir.Value, ir.Value], ir.Value]


def projection_inputs(layer: str, input_shape: Sequence[int], ranks: Sequence[int]) -> tuple[ir.Value, ...]:
    """Graph inputs for the projections of a layer whose input is `[N, *input_shape]`."""
    sizes: list[int | str] = ["N", *input_shape]
    return tuple(
        ir.Value(
            name=projection_name(layer, mode),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([size, rank]),
        )
        for mode, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
    )


def backpropagation(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The exact gradient from the whole input."""
    return conv.weight_gradient(emit, geo, x, dy)


def lance(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The gradient from the core G and the projected output gradient D."""
    core = _core(emit, layer, geo, x)  # [r0, r1, r2 r3]
    form = _form(layer, geo)
    projected = form.project(emit, layer, geo, dy)
    for value, suffix in ((core, "G"), (projected, "D")):
        value.name = f"{layer.name}/{suffix}"
        layer.statistics.append(value)
    return form.rebuild(emit, layer, geo, core, projected)


METHODS: dict[str, WeightGradient] = {"bp": backpropagation, "lance": lance}


# --- the core ---------------------------------------------------------------------------------------


def _core(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """G `[r0, r1, r2 r3]` by mode products in the cheapest order for this layer's shape and ranks."""
    batch, channels, *_ = layer.projections
    value, width = emit.reshape(x, 0, geo.in_channels, -1), geo.in_channels  # [N, C, P]
    for step in contraction_order(layer.ranks, geo.in_channels, geo.in_positions):
        if step == "batch":
            value = _project_batch(emit, batch, value, width)
        elif step == "space":
            value = emit("MatMul", value, _spatial_basis(emit, layer, geo))
        else:
            value, width = emit("MatMul", emit.transpose(channels, 1, 0), value), layer.ranks[1]
    return value


def contraction_order(ranks: Sequence[int], channels: int, positions: int) -> tuple[str, ...]:
    """The order of the three mode products with the fewest multiply-adds for a micro-batch."""
    shrunk = {"batch": ranks[0], "channels": ranks[1], "space": ranks[2] * ranks[3]}

    def macs(order: tuple[str, ...]) -> int:
        size = {"batch": PLANNED_MICRO_BATCH, "channels": channels, "space": positions}
        total = 0
        for mode in order:
            total += math.prod(size.values()) * shrunk[mode]
            size[mode] = shrunk[mode]
        return total

    return min(itertools.permutations(shrunk), key=macs)


def _project_batch(emit: Emit, rows: ir.Value, value: ir.Value, width: int) -> ir.Value:
    """sum_b U0[b] (x) value_b: `[N, width, p] -> [r0, width, p]`."""
    summed = emit("Gemm", rows, emit("Flatten", value, axis=1), transA=1)  # [r0, width p]
    return emit.reshape(summed, 0, width, -1)


def _spatial_basis(emit: Emit, layer: LayerContext, geo: ConvGeometry, at_outputs: bool = False) -> ir.Value:
    """U2 (x) U3 as one matrix `[P, r2 r3]`.

    `at_outputs` keeps only the positions that a strided one-tap convolution reads: `[P', r2 r3]`.
    """
    rows, columns = layer.projections[2:]
    size = geo.in_size
    if at_outputs and geo.stride != (1, 1):
        rows, columns = (
            emit("Gather", basis, emit.constant(np.arange(count) * step), axis=0)
            for basis, count, step in zip((rows, columns), geo.out_size, geo.stride, strict=True)
        )
        size = geo.out_size
    r2, r3 = layer.ranks[2:]
    product = emit("Mul", emit.reshape(rows, size[0], 1, r2, 1), emit.reshape(columns, 1, size[1], 1, r3))
    return emit.reshape(product, size[0] * size[1], r2 * r3)


# --- from G and D to the gradient: one form for each kind of convolution ---------------------------------


@dataclass(frozen=True)
class _Form:
    """`project` gives D of a micro-batch; `rebuild` the weight gradient from the sums G and D."""

    project: Callable[[Emit, LayerContext, ConvGeometry, ir.Value], ir.Value]
    rebuild: Callable[[Emit, LayerContext, ConvGeometry, ir.Value, ir.Value], ir.Value]


def _form(layer: LayerContext, geo: ConvGeometry) -> _Form:
    if geo.is_sampling and layer.ranks[2] * layer.ranks[3] < geo.out_positions:
        return _Form(_project_space_and_batch, _rebuild_channels_only)
    if geo.by_positions:
        return _Form(_project_batch_only, _rebuild_by_positions)
    if geo.groups == 1:
        return _Form(_project_batch_only, _rebuild_space)
    return _Form(_project_batch_only, _rebuild_all)


def _project_batch_only(emit: Emit, layer: LayerContext, geo: ConvGeometry, dy: ir.Value) -> ir.Value:
    """D `[r0, O, P']`."""
    flat = emit.reshape(dy, 0, geo.out_channels, -1)
    return _project_batch(emit, layer.projections[0], flat, geo.out_channels)


def _project_space_and_batch(emit: Emit, layer: LayerContext, geo: ConvGeometry, dy: ir.Value) -> ir.Value:
    """D `[r0, O, r2 r3]`: with one tap, space contracts with the same basis on both sides."""
    flat = emit.reshape(dy, 0, geo.out_channels, -1)  # [N, O, P']
    in_space = emit("MatMul", flat, _spatial_basis(emit, layer, geo, at_outputs=True))  # [N, O, r2 r3]
    return _project_batch(emit, layer.projections[0], in_space, geo.out_channels)


def _rebuild_channels_only(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, core: ir.Value, projected: ir.Value
) -> ir.Value:
    """dW = (D contracted with G over batch and space) U1^T."""
    r1 = layer.ranks[1]
    rows = emit.reshape(emit.transpose(projected, 1, 0, 2), geo.out_channels, -1)  # [O, r0 q]
    columns = emit.reshape(emit.transpose(core, 0, 2, 1), -1, r1)  # [r0 q, r1]
    narrow = emit("MatMul", rows, columns)  # [O, r1]
    return emit.reshape(emit("Gemm", narrow, layer.projections[1], transB=1), *geo.weight_shape)


def _rebuild_by_positions(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, core: ir.Value, projected: ir.Value
) -> ir.Value:
    """Depthwise: pairs of output position and spatial component, then the taps that connect them."""
    r0, r1, r2, r3 = layer.ranks
    components = r2 * r3
    by_channel = emit.reshape(emit.transpose(core, 1, 0, 2), r1, -1)  # [r1, r0 q]
    rebuilt = emit.reshape(emit("MatMul", layer.projections[1], by_channel), geo.in_channels, r0, components)
    pairs = emit("MatMul", emit.transpose(projected, 1, 2, 0), rebuilt)  # [C, P', q]
    taps = emit(
        "MatMul", emit.constant(conv.tap_selection(geo)), _spatial_basis(emit, layer, geo)
    )  # [taps, P', q]
    flat_taps = emit.reshape(taps, geo.taps, geo.out_positions * components)
    flat_pairs = emit.reshape(pairs, geo.in_channels, geo.out_positions * components)
    return emit.reshape(emit("Gemm", flat_pairs, flat_taps, transB=1), *geo.weight_shape)


def _rebuild_space(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, core: ir.Value, projected: ir.Value
) -> ir.Value:
    """One group: weight gradient of r0 images with r1 channels, which are expanded last."""
    r0, r1, _, _ = layer.ranks
    images = emit.reshape(_expand_space(emit, layer, geo, core), r0, r1, *geo.in_size)
    dy = emit.reshape(projected, r0, geo.out_channels, *geo.out_size)
    narrow = conv.weight_gradient(emit, conv.with_channels(geo, r1), images, dy)  # [O, r1, k, k]
    flat = emit.reshape(narrow, geo.out_channels, r1, geo.taps)
    return emit.reshape(emit("MatMul", layer.projections[1], flat), *geo.weight_shape)


def _rebuild_all(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, core: ir.Value, projected: ir.Value
) -> ir.Value:
    """Groups: weight gradient of r0 images with all channels."""
    r0 = layer.ranks[0]
    narrow = _expand_space(emit, layer, geo, core)  # [r0, r1, P]
    images = emit.reshape(emit("MatMul", layer.projections[1], narrow), r0, geo.in_channels, *geo.in_size)
    dy = emit.reshape(projected, r0, geo.out_channels, *geo.out_size)
    return conv.weight_gradient(emit, geo, images, dy)


def _expand_space(emit: Emit, layer: LayerContext, geo: ConvGeometry, core: ir.Value) -> ir.Value:
    """`[r0, r1, r2 r3] -> [r0, r1, P]`."""
    return emit("MatMul", core, emit.transpose(_spatial_basis(emit, layer, geo), 1, 0))
