"""Compressed weight gradients of convolutions in patch mode: modes batch, inputs, positions.

The input of a convolution as patches is P `[B, D, L]` for each group: the D = C/groups k_h k_w values that a
filter reads at each of L = H' W' output positions.  The coefficients are K_b = P_b projected on U1 (inputs) and
U2 (positions), `[g r1, N, q]` with q = r2, and the weight gradient is `Z U1^T` with `Z[o, r] = sum dY[o] K[r]`:
every row of it lies in the span of U1.  Patches are never made: projecting them on U1 is a convolution with r1
filters, those of group g being the columns of its basis.

Where core and factors would take more than the input itself, the input is kept, and the exact gradient is
projected on U1 (r0 = B, r2 = L: only the inputs' mode is cut).
"""

from collections.abc import Sequence

import onnx_ir as ir

from lance_host.autodiff import conv
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit
from lance_host.forms import Form, LayerContext

# A depthwise convolution on a small map goes from its input to the coefficients in one product, with a matrix
# of at most so many values (4 MiB), which is prepared once a step.
MOST_COMPOSED_VALUES = 1 << 20


def patch_form(layer: LayerContext, geo: ConvGeometry) -> Form[ConvGeometry]:
    """The form for a kind of convolution at these ranks (batch, inputs, positions)."""
    if keeps_input(geo, layer.ranks, is_batch_whole=0 not in layer.projections):
        return INPUT_KEPT
    if (
        geo.by_positions
        and not layer.takes_any_rank
        and _composed_values(geo, layer.ranks) <= MOST_COMPOSED_VALUES
    ):
        return DEPTHWISE_COMPOSED
    return ONE_TAP if geo.is_sampling else FILTERS


def keeps_input(geo: ConvGeometry, ranks: Sequence[int], is_batch_whole: bool) -> bool:
    """Whether the input is no larger than its coefficients, and nothing but the inputs' mode is compressed."""
    whole = is_batch_whole and ranks[2] == geo.out_positions
    return whole and geo.groups * ranks[1] * ranks[2] >= geo.in_channels * geo.in_positions


def _composed_values(geo: ConvGeometry, ranks: Sequence[int]) -> int:
    return geo.in_channels * geo.in_positions * ranks[1] * ranks[2]


# --- bases --------------------------------------------------------------------------------------------


def _filters(emit: Emit, layer: LayerContext, geo: ConvGeometry) -> ir.Value:
    """U1 as filters: `[D, r1]` or `[g, D, r1]` -> `[g r1, C/g, k_h, k_w]`."""
    basis = layer.projections[1]
    columns = emit.transpose(basis, 1, 0) if geo.groups == 1 else emit.transpose(basis, 0, 2, 1)
    return emit.reshape(columns, -1, *geo.weight_shape[1:])


def _bank(layer: LayerContext, geo: ConvGeometry) -> ConvGeometry:
    """The convolution whose filters are the columns of U1."""
    return conv.with_filters(geo, geo.groups * layer.ranks[1])


def _on_positions(emit: Emit, layer: LayerContext, value: ir.Value) -> ir.Value:
    """`[., N, L] -> [., N, q]`."""
    positions = layer.projections.get(2)
    return value if positions is None else emit("MatMul", value, positions)


# --- coefficients -------------------------------------------------------------------------------------


def _by_filters(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """K `[g r1, N, q]`: a convolution with the columns of U1, then the positions."""
    maps = emit(
        "Conv",
        x,
        _filters(emit, layer, geo),
        group=geo.groups,
        strides=geo.stride,
        pads=geo.padding,
        dilations=geo.dilation,
    )  # [N, g r1, H', W']
    return _on_positions(emit, layer, emit.reshape(emit.swap(maps), 0, -1, geo.out_positions))


def _one_tap(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """K `[r1, N, q]` of a convolution with one tap: two products, in the order with fewer multiply-adds."""
    rows = conv.by_channel(emit, conv.sampled(emit, geo, x), geo.in_channels, geo.out_positions)  # [C, N, L]
    basis = layer.projections[1]
    if layer.takes_any_rank or projects_inputs_first(layer.ranks, geo.in_channels, geo.out_positions):
        narrow = emit("Gemm", basis, emit.reshape(rows, 0, -1), transA=1)  # [r1, N L]
        return _on_positions(emit, layer, emit.reshape(narrow, 0, -1, geo.out_positions))
    short = _on_positions(emit, layer, rows)  # [C, N, q]
    narrow = emit("Gemm", basis, emit.reshape(short, 0, -1), transA=1)  # [r1, N q]
    return emit.reshape(narrow, layer.ranks[1], -1, layer.ranks[2])


def projects_inputs_first(ranks: Sequence[int], inputs: int, positions: int) -> bool:
    """Whether D L r1 + r1 L r2 multiply-adds are no more than D L r2 + D r1 r2."""
    _, r1, r2 = ranks
    if r2 == positions:
        return True
    return r1 * positions * (inputs + r2) <= inputs * r2 * (positions + r1)


def _composed(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """K `[C r1, N, q]` of a depthwise convolution: U1 and U2 composed to one matrix for each channel."""
    _, r1, q = layer.ranks
    matrices = conv.position_matrices(emit, _bank(layer, geo), _filters(emit, layer, geo))  # [C r1, P, L]
    short = emit.reshape(_on_positions(emit, layer, matrices), geo.in_channels, r1, geo.in_positions, q)
    whole = emit.reshape(emit.transpose(short, 0, 2, 1, 3), geo.in_channels, geo.in_positions, r1 * q)
    channels = conv.by_channel(emit, x, geo.in_channels, geo.in_positions)  # [C, N, P]
    apart = emit.reshape(emit("MatMul", channels, whole), geo.in_channels, -1, r1, q)  # [C, N, r1, q]
    return emit.reshape(emit.transpose(apart, 0, 2, 1, 3), geo.in_channels * r1, -1, q)


def _input(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """The input itself, `[C, N, P]`."""
    return conv.by_channel(emit, x, geo.in_channels, geo.in_positions)


# --- contributions ------------------------------------------------------------------------------------


def _project(emit: Emit, layer: LayerContext, geo: ConvGeometry, dy: ir.Value) -> ir.Value:
    """`[O, N, q]`."""
    return _on_positions(emit, layer, conv.by_channel(emit, dy, geo.out_channels, geo.out_positions))


def _over_samples_and_positions(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """Z: `[O, r1]`, or with groups `[g, O/g, r1]`."""
    if geo.groups == 1:
        return emit("Gemm", emit.reshape(projected, 0, -1), emit.reshape(coefficients, 0, -1), transB=1)
    per_group = geo.out_channels // geo.groups
    outputs = emit.reshape(projected, geo.groups, per_group, -1)  # [g, O/g, n q]
    if not layer.takes_any_rank:
        inputs = emit.reshape(coefficients, geo.groups, layer.ranks[1], -1)  # [g, r1, n q]
        return emit("MatMul", outputs, emit.transpose(inputs, 0, 2, 1))
    columns = emit.transpose(emit.reshape(coefficients, 0, -1), 1, 0)  # [n q, g r1]
    apart = emit.reshape(columns, 0, geo.groups, -1)  # [n q, g, r1]
    return emit("MatMul", outputs, emit.transpose(apart, 1, 0, 2))


def _exact(
    emit: Emit, layer: LayerContext, geo: ConvGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """The weight gradient of the whole input, `[O, D]` or `[g, O/g, D]`."""
    x = conv.by_sample(emit, coefficients, geo.in_channels, geo.in_size)
    dy = conv.by_sample(emit, projected, geo.out_channels, geo.out_size)
    gradient = conv.weight_gradient(emit, geo, x, dy)
    if geo.groups == 1:
        return emit.reshape(gradient, geo.out_channels, -1)
    return emit.reshape(gradient, geo.groups, geo.out_channels // geo.groups, -1)


# --- expansion ----------------------------------------------------------------------------------------


def _all_inputs(emit: Emit, layer: LayerContext, geo: ConvGeometry, narrow: ir.Value) -> ir.Value:
    """`Z U1^T`, as filters."""
    basis = layer.projections[1]
    if geo.groups == 1:
        return emit.reshape(emit("Gemm", narrow, basis, transB=1), *geo.weight_shape)
    return emit.reshape(emit("MatMul", narrow, emit.transpose(basis, 0, 2, 1)), *geo.weight_shape)


def _onto_inputs(emit: Emit, layer: LayerContext, geo: ConvGeometry, narrow: ir.Value) -> ir.Value:
    """The exact gradient projected on U1: `dW U1 U1^T`."""
    return _all_inputs(emit, layer, geo, emit("MatMul", narrow, layer.projections[1]))


def _core(emit: Emit, layer: LayerContext, core: ir.Value) -> ir.Value:
    """`[r1, r0, r2]`: no codec compresses patches, but the layout is the same."""
    return core


# --- the table ----------------------------------------------------------------------------------------

FILTERS = Form[ConvGeometry](_by_filters, _core, _project, _over_samples_and_positions, _all_inputs)
ONE_TAP = Form[ConvGeometry](_one_tap, _core, _project, _over_samples_and_positions, _all_inputs)
DEPTHWISE_COMPOSED = Form[ConvGeometry](_composed, _core, _project, _over_samples_and_positions, _all_inputs)
INPUT_KEPT = Form[ConvGeometry](_input, _core, _project, _exact, _onto_inputs)
