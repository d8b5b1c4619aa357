"""Compressed weight gradients of convolutions: one form for each kind.

The coefficients are K_b = A_b projected on U1 (channels), U2 and U3 (height and width), `[r1, N, q]` with
q = r2 r3: channels outside, as everything in `autodiff/conv.py` is.
"""

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lance_host.autodiff import conv
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit
from lance_host.forms import Form, LayerContext


def conv_form(layer: LayerContext, geo: ConvGeometry) -> Form[ConvGeometry]:
    """The form for a kind of convolution; without fixed ranks the one that works for any."""
    if not layer.ranks:
        return REBUILT
    if geo.is_sampling:
        short = layer.ranks[2] * layer.ranks[3] < geo.out_positions
        return ONE_TAP_IN_SHORT_SPACE if short else ONE_TAP
    if geo.by_positions:
        return DEPTHWISE_BY_POSITIONS
    return UNGROUPED if geo.groups == 1 else REBUILT


# --- coefficients -----------------------------------------------------------------------------------


def _coefficients(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """K `[r1, N, q]`: the input on the channel and the spatial bases."""
    channels, basis = layer.projections[1], _spatial_basis(emit, layer, geo)
    value = conv.by_channel(emit, x, geo.in_channels, geo.in_positions)  # [C, N, P]
    if projects_channels_first(layer.ranks, geo.in_channels, geo.in_positions):
        narrow = emit("Gemm", channels, emit.reshape(value, 0, -1), transA=1)  # [r1, N P]
        return emit("MatMul", emit.reshape(narrow, 0, -1, geo.in_positions), basis)
    short = emit("MatMul", value, basis)  # [C, N, q]
    narrow = emit("Gemm", channels, emit.reshape(short, 0, -1), transA=1)  # [r1, N q]
    return emit.reshape(narrow, 0, -1, layer.ranks[2] * layer.ranks[3])


def projects_channels_first(ranks: Sequence[int], channels: int, positions: int) -> bool:
    """Which of the two mode products comes first: the order with fewer multiply-adds per sample."""
    r1, q = ranks[1], ranks[2] * ranks[3]
    return r1 * positions * (channels + q) <= channels * q * (positions + r1)


def _spatial_basis(emit: Emit, layer: LayerContext, geo: ConvGeometry, at_outputs: bool = False) -> ir.Value:
    """U2 (x) U3 as one matrix `[P, q]`.

    `at_outputs` keeps only the positions that a strided one-tap convolution reads: `[P', q]`.
    """
    rows, columns = layer.projections[2], layer.projections[3]
    size = geo.in_size
    if at_outputs and geo.stride != (1, 1):
        rows, columns = (
            emit("Gather", basis, emit.constant(np.arange(count) * step), axis=0)
            for basis, count, step in zip((rows, columns), geo.out_size, geo.stride, strict=True)
        )
        size = geo.out_size
    rows = emit("Unsqueeze", rows, emit.constant([1, 3]))  # [H, 1, r2, 1]
    columns = emit("Unsqueeze", columns, emit.constant([0, 2]))  # [1, W, 1, r3]
    return emit.reshape(emit("Mul", rows, columns), size[0] * size[1], -1)


def _rebuild_space(emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value) -> ir.Value:
    """`[r1, n, q] -> [r1, n, P]`."""
    return emit("MatMul", coefficients, emit.transpose(_spatial_basis(emit, layer, geo), 1, 0))


def _rebuild_channels(emit: Emit, layer: LayerContext, value: ir.Value) -> ir.Value:
    """`[r1, n, .] -> [C, n .]`."""
    return emit("Gemm", layer.projections[1], emit.reshape(value, 0, -1))


def _core(emit: Emit, layer: LayerContext, core: ir.Value) -> ir.Value:
    """`[r1, r0, r2, r3] -> [r1, r0, q]`."""
    return emit.reshape(core, 0, 0, -1)


# --- steps ------------------------------------------------------------------------------------------------


def _channels_outside(emit: Emit, layer: LayerContext, geo: ConvGeometry, dy: ir.Value) -> ir.Value:
    """`[O, N, P']`."""
    return conv.by_channel(emit, dy, geo.out_channels, geo.out_positions)


def _on_the_basis(emit: Emit, layer: LayerContext, geo: ConvGeometry, dy: ir.Value) -> ir.Value:
    """`[O, N, q]`: with one tap, space contracts with the same basis on both sides."""
    channels = _channels_outside(emit, layer, geo, dy)
    return emit("MatMul", channels, _spatial_basis(emit, layer, geo, at_outputs=True))


def _over_samples_and_space(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """`[O, r1]`."""
    return emit("Gemm", emit.reshape(projected, 0, -1), emit.reshape(coefficients, 0, -1), transB=1)


def _over_samples_and_rebuilt_space(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """`[O, r1]`."""
    basis = emit.transpose(_spatial_basis(emit, layer, geo, at_outputs=True), 1, 0)  # [q, P']
    return _over_samples_and_space(emit, layer, geo, emit("MatMul", coefficients, basis), projected)


def _one_tap_channels(emit: Emit, layer: LayerContext, geo: ConvGeometry, narrow: ir.Value) -> ir.Value:
    return emit.reshape(emit("Gemm", narrow, layer.projections[1], transB=1), *geo.weight_shape)


def _pairs_to_taps(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """`[C, taps]`: pairs of output position and spatial component, then the taps that connect them."""
    q = layer.ranks[2] * layer.ranks[3]
    rebuilt = emit.reshape(_rebuild_channels(emit, layer, coefficients), geo.in_channels, -1, q)  # [C, n, q]
    pairs = emit("MatMul", emit.transpose(projected, 0, 2, 1), rebuilt)  # [C, P', q]
    basis = _spatial_basis(emit, layer, geo)
    taps = emit("MatMul", emit.constant(conv.tap_selection(geo)), basis)  # [taps, P', q]
    return emit("Gemm", emit.reshape(pairs, 0, -1), emit.reshape(taps, 0, -1), transB=1)


def _as_filters(emit: Emit, layer: LayerContext, geo: ConvGeometry, narrow: ir.Value) -> ir.Value:
    return emit.reshape(narrow, *geo.weight_shape)


def _convolve_narrow(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """`[O, r1, k_h, k_w]`: the gradient for images of r1 channels, which are expanded last."""
    r1 = layer.ranks[1]
    images = conv.by_sample(emit, _rebuild_space(emit, layer, geo, coefficients), r1, geo.in_size)
    dy = conv.by_sample(emit, projected, geo.out_channels, geo.out_size)
    return conv.weight_gradient(emit, conv.with_channels(geo, r1), images, dy)


def _all_taps_channels(emit: Emit, layer: LayerContext, geo: ConvGeometry, narrow: ir.Value) -> ir.Value:
    flat = emit.reshape(narrow, geo.out_channels, layer.ranks[1], geo.taps)
    return emit.reshape(emit("MatMul", layer.projections[1], flat), *geo.weight_shape)


def _convolve_rebuilt(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """The whole gradient, from images with all channels."""
    in_space = _rebuild_space(emit, layer, geo, coefficients)  # [r1, n, P]
    rebuilt = _rebuild_channels(emit, layer, in_space)  # [C, n P]
    images = conv.by_sample(emit, rebuilt, geo.in_channels, geo.in_size)
    dy = conv.by_sample(emit, projected, geo.out_channels, geo.out_size)
    return conv.weight_gradient(emit, geo, images, dy)


# --- the table --------------------------------------------------------------------------------------------

_Form = functools.partial(Form[ConvGeometry], _coefficients, _core)
ONE_TAP_IN_SHORT_SPACE = _Form(_on_the_basis, _over_samples_and_space, _one_tap_channels)
ONE_TAP = _Form(_channels_outside, _over_samples_and_rebuilt_space, _one_tap_channels)
DEPTHWISE_BY_POSITIONS = _Form(_channels_outside, _pairs_to_taps, _as_filters)
UNGROUPED = _Form(_channels_outside, _convolve_narrow, _all_taps_channels)
REBUILT = _Form(_channels_outside, _convolve_rebuilt, _as_filters)
