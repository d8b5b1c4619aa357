"""How a layer's weight gradient is computed: the table of methods.

`bp` keeps the input A.  `lance` (arXiv 2509.21617) keeps what calibrated projections leave of it.  With the
coefficients K_b = A_b projected on U1, U2, ... of each sample b, there are three ways to the same exact
gradient of the rebuilt activation; the *schedule* of a variant picks one:

    two passes   G = sum_b U0[b] (x) K_b is complete before backward, which rebuilds K~_b = U0[b] G and adds
                 up contributions(K~_b, dY_b).  Keeps G, and the masks of the whole batch.
    one pass     D = sum_b U0[b] (x) dY_b as well; contributions(G, D) are taken once, as if the r0
                 components were the samples.  Keeps G and D, and the masks of one micro-batch.
    no batch mode (rank r0 = B, that is U0 = identity): contributions(K_b, dY_b).  Keeps K of a micro-batch.

`asi` and `hosvd` compress the input of the whole batch anew at every step, in the device's codecs; backward
is fed their core and factors and goes on as with the complete core of two passes (schedule "by layer").

How coefficients, contributions and the gradient look is the layer's form: `conv_forms.py`, `patch_forms.py`,
`linear_forms.py`.
In all of them the samples (or components) are the axis in the middle, `[., N, .]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from lance_edge.accounting import asi_forward_macs, hosvd_forward_macs, lance_forward_macs
from lance_edge.manifest import Layer, Schedule
from lance_edge.moments import mode_sizes
from lance_edge.names import activation_name, core_name, projection_name
from lance_host.autodiff import conv, linear
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.linear import LinearGeometry
from lance_host.conv_forms import conv_form
from lance_host.forms import Form, Geometry, LayerContext
from lance_host.linear_forms import linear_form
from lance_host.patch_forms import patch_form

# `(emit, layer, geometry, input, dy) -> weight gradient`; statistics are noted in the layer's context.
WeightGradient = Callable[[Emit, LayerContext, Geometry, ir.Value, ir.Value], ir.Value]


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


def patch_projection_inputs(layer: Layer, ranks: Sequence[int], batch_size: int) -> dict[int, ir.Value]:
    """The same in patch mode: U1 `[D, r1]` or `[g, D, r1]`, and no U2 where all positions are kept."""
    if layer.is_linear:
        return projection_inputs(layer.name, layer.input_shape, ranks, batch_size)
    _, dimension, positions = mode_sizes(layer, "patch", batch_size)
    groups = () if layer.groups == 1 else (layer.groups,)
    r0, r1, r2 = ranks
    inputs = {
        0: _float_input(projection_name(layer.name, 0), "N", r0),
        1: _float_input(projection_name(layer.name, 1), *groups, dimension, r1),
        2: _float_input(projection_name(layer.name, 2), positions, r2),
    }
    is_whole = {0: r0 == batch_size, 2: r2 == positions}
    return {mode: value for mode, value in inputs.items() if not is_whole.get(mode)}


def rank_names(layer: str, modes: int) -> list[str]:
    """The names of the dimensions of a codec's arrays, one for each mode of the layer's input."""
    return [f"{layer}/r{mode}" for mode in range(modes)]


def codec_inputs(
    layer: str, input_shape: Sequence[int], ranks: Sequence[int]
) -> tuple[ir.Value, dict[int, ir.Value]]:
    """Graph inputs for the core `[r1, r0, ...]` and the factors that a codec gives.

    Without `ranks` they may be of any rank.
    """
    # The runtime takes dimensions of one name for one size, so each layer has names of its own.
    names: Sequence[int | str] = ranks or rank_names(layer, 1 + len(input_shape))
    factors = projection_inputs(layer, input_shape, names, batch_size=-1)
    return _float_input(core_name(layer), names[1], names[0], *names[2:]), factors


def _float_input(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def backpropagation(emit: Emit, layer: LayerContext, geo: Geometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The exact gradient from the whole input."""
    if isinstance(geo, LinearGeometry):
        return linear.weight_gradient(emit, geo, x, dy)
    return conv.weight_gradient(emit, geo, x, dy)


def _form(layer: LayerContext, geo: Geometry) -> Form[Any]:
    if isinstance(geo, LinearGeometry):
        return linear_form(layer, geo)
    return patch_form(layer, geo) if layer.mode == "patch" else conv_form(layer, geo)


def lance(emit: Emit, layer: LayerContext, geo: Geometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The gradient from the coefficients of calibrated projections."""
    form = _form(layer, geo)
    coefficients = form.coefficients(emit, layer, geo, x)  # [., N, .]
    projected = form.project(emit, layer, geo, dy)  # [., N, .]
    rows = layer.projections.get(0)  # [N, r0]
    if rows is None:
        narrow = layer.statistic(form.contribute(emit, layer, geo, coefficients, projected), "narrow")
    elif layer.schedule == "two passes":
        core = layer.statistic(_batch_sum(emit, rows, coefficients), "G")  # [., r0, .]
        rebuilt = emit("MatMul", rows, core)  # [., N, .]
        narrow = layer.statistic(form.contribute(emit, layer, geo, rebuilt, projected), "narrow")
    else:
        core = layer.statistic(_batch_sum(emit, rows, coefficients), "G")  # [., r0, .]
        summed = layer.statistic(_batch_sum(emit, rows, projected), "D")  # [., r0, .]
        narrow = form.contribute(emit, layer, geo, core, summed)
    return form.expand(emit, layer, geo, narrow)


def from_codec(emit: Emit, layer: LayerContext, geo: Geometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """The gradient from the core and the factors that a codec made of the whole batch."""
    assert layer.core is not None
    layer.activation = _activation(emit, layer, x)
    form = _form(layer, geo)
    core = form.core(emit, layer, layer.core)  # [., r0, .]
    rebuilt = emit("MatMul", layer.projections[0], core)  # [., N, .]
    projected = form.project(emit, layer, geo, dy)  # [., N, .]
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
        forward_macs: multiply-adds of a layer's forward with its compression, of batch size and ranks; `None`
            where nothing is compressed.
    """

    gradient: WeightGradient
    schedules: tuple[Schedule, ...]
    fixes_ranks: bool = False
    energy: float | None = None
    forward_macs: Callable[[Layer, int, Sequence[int]], int] | None = None

    @property
    def compresses(self) -> bool:
        """Whether it keeps less than the whole input."""
        return self.energy is not None


METHODS: dict[str, Method] = {
    "bp": Method(backpropagation, ("one pass",)),
    "lance": Method(lance, ("one pass", "two passes"), True, 0.7, lance_forward_macs),
    "asi": Method(from_codec, ("by layer",), True, 0.7, asi_forward_macs),
    "hosvd": Method(from_codec, ("by layer",), False, 0.8, hosvd_forward_macs),
}


def _batch_sum(emit: Emit, rows: ir.Value, value: ir.Value) -> ir.Value:
    """sum_b U0[b] (x) value_b: `[., N, .] -> [., r0, .]`."""
    return emit("MatMul", emit.transpose(rows, 1, 0), value)
