"""How a convolution's weight gradient is computed: the table of methods.

`bp` keeps the input A.  `lance` (arXiv 2509.21617) keeps what calibrated projections leave of it.  With the
coefficients K_b = A_b projected on U1, U2, U3 `[r1, q]`, q = r2 r3, of each sample b, there are three ways
to the same exact gradient of the rebuilt activation; the *schedule* of a variant picks one:

    two passes   G = sum_b U0[b] (x) K_b is complete before backward, which rebuilds K~_b = U0[b] G and adds
                 up contributions(K~_b, dY_b).  Keeps G, and the masks of the whole batch.
    one pass     D = sum_b U0[b] (x) dY_b as well; contributions(G, D) are taken once, as if the r0
                 components were the samples.  Keeps G and D, and the masks of one micro-batch.
    no batch mode (rank r0 = B, that is U0 = identity): contributions(K_b, dY_b).  Keeps K of a micro-batch.

`asi` and `hosvd` compress the input of the whole batch anew at every step, in the device's codecs; backward
is fed their core and factors and goes on as with the complete core of two passes (schedule "by layer").

The coefficients are `[r1, N, q]`, channels outside, as everything in `autodiff/conv.py` is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lance_edge.manifest import Schedule, activation_name, core_name, projection_name
from lance_host.autodiff import conv
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit


@dataclass
class LayerContext:
    """One trainable layer while its weight gradient is being written.

    `projections` are graph inputs by mode: U0 (rows of this micro-batch, `[N, r0]`; absent without a batch
    mode), U1 `[C, r1]`, U2 `[H, r2]`, U3 `[W, r3]`; `core` is one where a codec gives it, `[r1, r0, r2, r3]`.
    `ranks` are empty where they differ from step to step.  `statistics` collects the values that are
    summed over micro-batches, `activation` is what a codec compresses, `[N, C, H, W]`.
    """

    name: str
    ranks: tuple[int, ...]
    projections: dict[int, ir.Value]
    schedule: Schedule = "one pass"
    core: ir.Value | None = None
    statistics: list[ir.Value] = field(default_factory=list)
    activation: ir.Value | None = None

    def statistic(self, value: ir.Value, suffix: str) -> ir.Value:
        """Declare that a value is summed over the micro-batches, as `<layer>/<suffix>`."""
        value.name = f"{self.name}/{suffix}"
        self.statistics.append(value)
        return value


# `(emit, layer, geometry, input, dy) -> weight gradient`; statistics are noted in the layer's context.
WeightGradient = Callable[[Emit, LayerContext, ConvGeometry, ir.Value, ir.Value], ir.Value]


def projection_inputs(
    layer: str, input_shape: Sequence[int], ranks: Sequence[int | str], batch_size: int
) -> dict[int, ir.Value]:
    """Graph inputs for the projections of a layer whose input is `[N, *input_shape]`, by mode.

    A batch mode that is not compressed (`ranks[0] == batch_size`) has none.
    """
    sizes: list[int | str] = ["N", *input_shape]
    return {
        mode: _float_input(projection_name(layer, mode), size, rank)
        for mode, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
        if mode > 0 or rank != batch_size
    }


def rank_names(layer: str, modes: int) -> list[str]:
    """The names of the dimensions of a codec's arrays, one for each mode of the layer's input."""
    return [f"{layer}/r{mode}" for mode in range(modes)]


def codec_inputs(
    layer: str, input_shape: Sequence[int], ranks: Sequence[int]
) -> tuple[ir.Value, dict[int, ir.Value]]:
    """Graph inputs for the core `[r1, r0, r2, r3]` and the factors that a codec gives.

    Without `ranks` they may be of any rank.
    """
    # The runtime takes dimensions of one name for one size, so each layer has names of its own.
    names: Sequence[int | str] = ranks or rank_names(layer, 1 + len(input_shape))
    factors = projection_inputs(layer, input_shape, names, batch_size=-1)
    return _float_input(core_name(layer), names[1], names[0], *names[2:]), factors


def _float_input(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def backpropagation(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The exact gradient from the whole input."""
    return conv.weight_gradient(emit, geo, x, dy)


def lance(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The gradient from the coefficients of calibrated projections."""
    form = _form(layer, geo)
    coefficients = _coefficients(emit, layer, geo, x)  # [r1, N, q]
    projected = form.project(emit, layer, geo, dy)  # [O, N, s]
    rows = layer.projections.get(0)  # [N, r0]
    if rows is None:
        narrow = layer.statistic(form.contribute(emit, layer, geo, coefficients, projected), "narrow")
    elif layer.schedule == "two passes":
        core = layer.statistic(_batch_sum(emit, rows, coefficients), "G")  # [r1, r0, q]
        rebuilt = emit("MatMul", rows, core)  # [r1, N, q]
        narrow = layer.statistic(form.contribute(emit, layer, geo, rebuilt, projected), "narrow")
    else:
        core = layer.statistic(_batch_sum(emit, rows, coefficients), "G")  # [r1, r0, q]
        summed = layer.statistic(_batch_sum(emit, rows, projected), "D")  # [O, r0, s]
        narrow = form.contribute(emit, layer, geo, core, summed)
    return form.expand(emit, layer, geo, narrow)


def from_codec(emit: Emit, layer: LayerContext, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The gradient from the core and the factors that a codec made of the whole batch."""
    assert layer.core is not None
    layer.activation = _activation(emit, layer, x)
    form = _form(layer, geo)
    core = emit.reshape(layer.core, 0, 0, -1)  # [r1, r0, q]
    rebuilt = emit("MatMul", layer.projections[0], core)  # [r1, N, q]
    projected = form.project(emit, layer, geo, dy)  # [O, N, s]
    narrow = layer.statistic(form.contribute(emit, layer, geo, rebuilt, projected), "narrow")
    return form.expand(emit, layer, geo, narrow)


def _activation(emit: Emit, layer: LayerContext, x: ir.Value) -> ir.Value:
    """A tensor of its own for x, whatever becomes of x itself; layers with one input share it."""
    for use in x.uses():
        output = use.node.outputs[0]
        if use.node.op_type == "Identity" and (output.name or "").endswith(activation_name("")):
            return output
    copy = emit("Identity", x)
    copy.name = activation_name(layer.name)
    return copy


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        schedules: how a batch may go through its graphs.
        fixes_ranks: before training, on the host; otherwise they differ from step to step.
        energy: the default energy threshold ε; `None` where nothing is compressed.
    """

    gradient: WeightGradient
    schedules: tuple[Schedule, ...]
    fixes_ranks: bool = False
    energy: float | None = None

    @property
    def compresses(self) -> bool:
        """Whether it keeps less than the whole input."""
        return self.energy is not None


METHODS: dict[str, Method] = {
    "bp": Method(backpropagation, ("one pass",)),
    "lance": Method(lance, ("one pass", "two passes"), fixes_ranks=True, energy=0.7),
    "asi": Method(from_codec, ("by layer",), fixes_ranks=True, energy=0.7),
    "hosvd": Method(from_codec, ("by layer",), energy=0.8),
}


# --- coefficients -----------------------------------------------------------------------------------


def _batch_sum(emit: Emit, rows: ir.Value, value: ir.Value) -> ir.Value:
    """sum_b U0[b] (x) value_b: `[., N, .] -> [., r0, .]`."""
    return emit("MatMul", emit.transpose(rows, 1, 0), value)


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


# --- from coefficients to the gradient: one form for each kind of convolution ------------------------------

Project = Callable[[Emit, LayerContext, ConvGeometry, ir.Value], ir.Value]
Contribute = Callable[[Emit, LayerContext, ConvGeometry, ir.Value, ir.Value], ir.Value]
Expand = Callable[[Emit, LayerContext, ConvGeometry, ir.Value], ir.Value]


@dataclass(frozen=True)
class Form:
    """Three linear steps from dY `[N, O, H', W']` to the weight gradient.

    `project`: dY on what the coefficients have of space, `[O, N, s]`.  `contribute`: the sum over n samples
    (or components) of coefficients `[r1, n, q]` times that, as small as can be.  `expand`: once for a
    batch, from there to `[O, C / groups, k_h, k_w]`.
    """

    project: Project
    contribute: Contribute
    expand: Expand


def _form(layer: LayerContext, geo: ConvGeometry) -> Form:
    if not layer.ranks:
        return REBUILT
    if geo.is_sampling:
        short = layer.ranks[2] * layer.ranks[3] < geo.out_positions
        return ONE_TAP_IN_SHORT_SPACE if short else ONE_TAP
    if geo.by_positions:
        return DEPTHWISE_BY_POSITIONS
    return UNGROUPED if geo.groups == 1 else REBUILT


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


ONE_TAP_IN_SHORT_SPACE = Form(_on_the_basis, _over_samples_and_space, _one_tap_channels)
ONE_TAP = Form(_channels_outside, _over_samples_and_rebuilt_space, _one_tap_channels)
DEPTHWISE_BY_POSITIONS = Form(_channels_outside, _pairs_to_taps, _as_filters)
UNGROUPED = Form(_channels_outside, _convolve_narrow, _all_taps_channels)
REBUILT = Form(_channels_outside, _convolve_rebuilt, _as_filters)
