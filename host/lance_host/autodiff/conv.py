"""Convolution: its geometry, and its gradients as plain ONNX operators.

How a gradient is written matters more than its multiply-adds: a depthwise convolution on a small map
is a matrix product over pairs of positions (`benchmarks/` has the measurements), a pointwise one a
single matrix product, and everything else a convolution with batch and channels exchanged.

Matrix products work channel by channel, `[C, N, P]` with the positions P = H W: then a pointwise convolution
of a micro-batch is one product of two matrices, whatever the direction.  `layout.py` removes the exchanges
of batch and channels (`swap`) between neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit, static_dims

# A depthwise convolution over at most this many pairs of positions is written as a matrix product.
MAX_POSITION_PAIRS = 64 * 64


@dataclass(frozen=True)
class ConvGeometry:
    """Shapes of a 2-D convolution, batch left out; `padding` is top, left, bottom, right."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    in_size: tuple[int, int]
    out_size: tuple[int, int]

    @property
    def in_positions(self) -> int:
        """P = H W."""
        return self.in_size[0] * self.in_size[1]

    @property
    def out_positions(self) -> int:
        """P' = H' W'."""
        return self.out_size[0] * self.out_size[1]

    @property
    def taps(self) -> int:
        """k_h k_w."""
        return self.kernel[0] * self.kernel[1]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """`[O, C / groups, k_h, k_w]`."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def is_sampling(self) -> bool:
        """One tap, no padding, one group: each output position reads one input position."""
        return self.taps == 1 and self.groups == 1 and not any(self.padding)

    @property
    def is_pointwise(self) -> bool:
        """A matrix product over channels at every position."""
        return self.is_sampling and self.stride == (1, 1)

    @property
    def by_channel(self) -> bool:
        """Whether the convolution itself is written as matrix products over `[C, N, P]`."""
        return self.is_sampling or self.by_positions

    @property
    def is_depthwise(self) -> bool:
        """One filter for each channel."""
        return self.groups == self.in_channels == self.out_channels and self.groups > 1

    @property
    def by_positions(self) -> bool:
        """Whether the depthwise convolution is small enough to be written over pairs of positions."""
        return self.is_depthwise and self.in_positions * self.out_positions <= MAX_POSITION_PAIRS


def geometry(node: ir.Node) -> ConvGeometry:
    """The geometry of a Conv node of the captured network.

    Raises:
        ModelError: if it is not two-dimensional or its shapes are not known.
    """
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None
    assert weight is not None
    channels, *in_size = static_dims(x, start=1)
    out_channels, *out_size = static_dims(node.outputs[0], start=1)
    kernel = static_dims(weight)[2:]
    if len(kernel) != 2:
        raise ModelError(
            f"{node.name}: expected a 2-D convolution, found {len(kernel)}-D; choose other --layers"
        )
    return ConvGeometry(
        in_channels=channels,
        out_channels=out_channels,
        groups=node.attributes.get_int("group", 1),
        kernel=_pair(kernel),
        stride=_pair(node.attributes.get_ints("strides", (1, 1))),
        padding=_padding(node),
        dilation=_pair(node.attributes.get_ints("dilations", (1, 1))),
        in_size=_pair(in_size),
        out_size=_pair(out_size),
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _padding(node: ir.Node) -> tuple[int, int, int, int]:
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise ModelError(f"{node.name}: auto_pad is not supported; export with explicit pads")
    top, left, bottom, right = node.attributes.get_ints("pads", (0, 0, 0, 0))
    return top, left, bottom, right


# --- batch inside, channels outside ---------------------------------------------------------------


def by_channel(emit: Emit, value: ir.Value, channels: int, positions: int) -> ir.Value:
    """`[N, C, H, W] -> [C, N, P]`."""
    return emit.reshape(emit.swap(value), channels, -1, positions)


def by_sample(emit: Emit, value: ir.Value, channels: int, size: tuple[int, int]) -> ir.Value:
    """`[C, N, P]` or `[C, N P] -> [N, C, H, W]`."""
    return emit.swap(emit.reshape(value, channels, -1, *size))


def _rows(emit: Emit, value: ir.Value, channels: int) -> ir.Value:
    """`[N, C, H, W] -> [C, N P]`."""
    return emit.reshape(emit.swap(value), channels, -1)


def sampled(emit: Emit, geo: ConvGeometry, x: ir.Value) -> ir.Value:
    """The input positions that a one-tap convolution reads: `[N, C, H', W']`."""
    if geo.stride == (1, 1):
        return x
    ends = [(size - 1) * step + 1 for size, step in zip(geo.out_size, geo.stride, strict=True)]
    axes, steps = emit.constant([2, 3]), emit.constant(geo.stride)
    return emit("Slice", x, emit.constant([0, 0]), emit.constant(ends), axes, steps)


# --- the convolution --------------------------------------------------------------------------------


def forward(emit: Emit, geo: ConvGeometry, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """The convolution as matrix products, `[N, C, H, W] -> [N, O, H', W']`, where `geo.by_channel`.

    A Conv whose weight is a graph input loses the runtime's blocked layout, so this is faster.
    """
    column = None if bias is None else emit.reshape(bias, -1, 1)  # [O, 1]
    if geo.is_sampling:
        matrix = emit.reshape(weight, geo.out_channels, geo.in_channels)
        rows = _rows(emit, sampled(emit, geo, x), geo.in_channels)  # [C, N P']
        return by_sample(emit, emit("Gemm", matrix, rows, column), geo.out_channels, geo.out_size)
    matrices = position_matrices(emit, geo, weight)
    channels = by_channel(emit, x, geo.in_channels, geo.in_positions)  # [C, N, P]
    y = emit("MatMul", channels, matrices)  # [C, N, P']
    if column is not None:
        y = emit("Add", y, emit.reshape(column, -1, 1, 1))
    return by_sample(emit, y, geo.out_channels, geo.out_size)


# --- gradients ------------------------------------------------------------------------------------


def input_gradient(emit: Emit, geo: ConvGeometry, weight: ir.Value, dy: ir.Value) -> ir.Value:
    """Gradient with respect to the input: `[N, O, H', W'] -> [N, C, H, W]`."""
    if geo.is_pointwise:
        matrix = emit.reshape(weight, geo.out_channels, geo.in_channels)
        product = emit("Gemm", matrix, _rows(emit, dy, geo.out_channels), transA=1)  # [C, N P]
        return by_sample(emit, product, geo.in_channels, geo.in_size)
    if geo.by_positions:
        matrices = emit.transpose(position_matrices(emit, geo, weight), 0, 2, 1)  # [C, P', P]
        channels = by_channel(emit, dy, geo.out_channels, geo.out_positions)
        return by_sample(emit, emit("MatMul", channels, matrices), geo.in_channels, geo.in_size)
    return emit(
        "ConvTranspose",
        dy,
        weight,
        group=geo.groups,
        strides=geo.stride,
        pads=geo.padding,
        dilations=geo.dilation,
        output_padding=_output_padding(geo),
    )


def _output_padding(geo: ConvGeometry) -> tuple[int, int]:
    """Input rows and columns behind the last tap, which a strided convolution never reads."""
    rest = []
    for axis in (0, 1):
        reach = (geo.out_size[axis] - 1) * geo.stride[axis] + geo.dilation[axis] * (geo.kernel[axis] - 1) + 1
        rest.append(geo.in_size[axis] + geo.padding[axis] + geo.padding[axis + 2] - reach)
    return rest[0], rest[1]


def weight_gradient(emit: Emit, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """Gradient with respect to the weight, summed over the batch: `[O, C / groups, k_h, k_w]`."""
    if geo.is_sampling:
        dy_rows = _rows(emit, dy, geo.out_channels)  # [O, N P']
        x_rows = _rows(emit, sampled(emit, geo, x), geo.in_channels)  # [C, N P']
        return emit.reshape(emit("Gemm", dy_rows, x_rows, transB=1), *geo.weight_shape)
    if geo.by_positions:
        return _weight_gradient_by_positions(emit, geo, x, dy)
    return _weight_gradient_by_conv(emit, geo, x, dy)


def _weight_gradient_by_conv(emit: Emit, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """A convolution with batch C / groups whose channels are the samples, stride and dilation swapped."""
    per_group = geo.in_channels // geo.groups
    samples = emit.reshape(x, -1, geo.groups, per_group, geo.in_positions)  # [N, g, C/g, P]
    samples = emit.reshape(emit.transpose(samples, 2, 1, 0, 3), per_group, -1, *geo.in_size)  # [C/g, g N, H, W]
    correlated = emit(
        "Conv",
        samples,
        emit.transpose(dy, 1, 0, 2, 3),  # [O, N, H', W']
        group=geo.groups,
        strides=geo.dilation,
        dilations=geo.stride,
        pads=geo.padding,
    )  # [C/g, O, >= k_h, >= k_w]
    taps = emit("Slice", correlated, emit.constant([0, 0]), emit.constant(geo.kernel), emit.constant([2, 3]))
    return emit.transpose(taps, 1, 0, 2, 3)


# --- depthwise convolutions over pairs of positions --------------------------------------------------


def tap_of_positions(geo: ConvGeometry) -> NDArray[np.int64]:
    """Which tap connects input position p to output position p': `[P, P']`, `taps` where none does."""
    table = np.full((geo.in_positions, geo.out_positions), geo.taps, dtype=np.int64)
    for out_row, out_column, row, column in np.ndindex(*geo.out_size, *geo.kernel):
        y = out_row * geo.stride[0] + row * geo.dilation[0] - geo.padding[0]
        x = out_column * geo.stride[1] + column * geo.dilation[1] - geo.padding[1]
        if 0 <= y < geo.in_size[0] and 0 <= x < geo.in_size[1]:
            out_position = out_row * geo.out_size[1] + out_column
            table[y * geo.in_size[1] + x, out_position] = row * geo.kernel[1] + column
    return table


def tap_selection(geo: ConvGeometry) -> NDArray[np.float32]:
    """One-hot `[taps, P', P]`: 1 where a tap connects the pair of positions."""
    table = tap_of_positions(geo).T  # [P', P]
    return np.stack([(table == tap) for tap in range(geo.taps)]).astype(np.float32)


def position_matrices(emit: Emit, geo: ConvGeometry, weight: ir.Value) -> ir.Value:
    """Filters of one channel each, `[O, 1, k_h, k_w]`, as matrices over positions, `[O, P, P']`."""
    filters = emit.reshape(weight, geo.out_channels, geo.taps)
    # One-hot columns [taps, P P'].  A Gather would do, ten times slower: it copies value by value.
    selection = emit.constant(tap_selection(geo).transpose(0, 2, 1).reshape(geo.taps, -1).copy())
    product = emit("MatMul", filters, selection)
    return emit.reshape(product, geo.out_channels, geo.in_positions, geo.out_positions)


def _weight_gradient_by_positions(emit: Emit, geo: ConvGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    dy_channels = by_channel(emit, dy, geo.out_channels, geo.out_positions)  # [C, N, P']
    x_channels = by_channel(emit, x, geo.in_channels, geo.in_positions)  # [C, N, P]
    pairs = emit("MatMul", emit.transpose(dy_channels, 0, 2, 1), x_channels)  # [C, P', P]
    selection = emit.constant(tap_selection(geo).reshape(geo.taps, -1).T.copy())  # [P' P, taps]
    flat = emit.reshape(pairs, geo.in_channels, -1)
    return emit.reshape(emit("MatMul", flat, selection), *geo.weight_shape)


def with_filters(geo: ConvGeometry, out_channels: int) -> ConvGeometry:
    """The same convolution with another number of filters, a multiple of the groups."""
    return replace(geo, out_channels=out_channels)


def with_channels(geo: ConvGeometry, in_channels: int) -> ConvGeometry:
    """The same ungrouped convolution of an input with another number of channels."""
    assert geo.groups == 1
    return replace(geo, in_channels=in_channels)
