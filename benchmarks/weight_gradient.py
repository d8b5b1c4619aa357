"""The weight gradients of a method as graphs of their own, without what all methods share.

Inputs of the convolutions and gradients of their outputs are fed; all that a method does to come from there to
the weight gradients is in the graphs, and nothing else: no convolution, no input gradient, no head.  They are
written by the same functions as a package's (`lance_host.methods`), at the ranks and with the schedule of the
package's variant, and cut as `lance_host.stages.cut_stages` does:

    projections -> prepare              once a batch
    x, prepared -> forward -> G         each micro-batch: the statistics that no gradient changes
    x, dy, G -> backward -> statistics  each micro-batch: the others; G where the schedule completes it first
    statistics -> gradient              once a batch

One difference remains.  A package's backward reads what forward saved of x, here it reads x: where a method
saves coefficients (a layer without a batch mode), they are computed in backward, not in forward, as often.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lance_edge.manifest import Layer, Manifest, Variant
from lance_edge.names import BATCH_DIM, gradient_name
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.linear import LinearGeometry
from lance_host.capture import OPSET
from lance_host.compile import serialise
from lance_host.forms import Geometry, LayerContext
from lance_host.methods import METHODS, projection_inputs
from lance_host.shapes import infer_specs
from lance_host.stages import IR_VERSION, extract, prepared_values
from lance_host.step import tidy
from lance_host.traverse import ancestors, descendants


def input_name(layer: str) -> str:
    """The fed input of a convolution."""
    return f"{layer}/x"


def output_gradient_name(layer: str) -> str:
    """The fed gradient of its output."""
    return f"{layer}/dy"


def fed_shape(layer: Layer, sizes: Sequence[int], samples: int) -> tuple[int, ...]:
    """`[C, N, H, W]` where neighbours in a step work channel by channel, `[N, C, H, W]` elsewhere.

    A step has no exchange of axes between such neighbours (`lance_host/layout.py`), so none is measured here.
    """
    channels, *rest = sizes
    return (channels, samples, *rest) if _is_swapped(geometry_of(layer)) else (samples, channels, *rest)


def _is_swapped(geo: Geometry) -> bool:
    """Whether the products of a layer stand with its channels outside."""
    return isinstance(geo, ConvGeometry) and geo.by_channel


@dataclass(frozen=True)
class WeightGraphs:
    """Serialised graphs by role (`prepare`, `forward`, `backward`, `gradient`; only those that do anything)."""

    graphs: dict[str, bytes]
    statistics: tuple[str, ...]
    gradients: tuple[str, ...]


@dataclass(frozen=True)
class _Joint:
    """All layers in one graph, before it is cut."""

    model: ir.Model
    inputs: tuple[ir.Value, ...]
    output_gradients: tuple[ir.Value, ...]
    batch_projections: tuple[ir.Value, ...]
    projections: tuple[ir.Value, ...]
    statistics: tuple[ir.Value, ...]
    gradients: tuple[ir.Value, ...]


def weight_graphs(manifest: Manifest, variant: Variant) -> WeightGraphs:
    """The graphs of a variant's weight gradients, `bp` or `lance`."""
    joint = _joint_graph(manifest, variant)
    specs = infer_specs(joint.model)
    after_loss = descendants(joint.model.graph, joint.output_gradients)
    late = [value for value in joint.statistics if value in after_loss]
    early = [value for value in joint.statistics if value not in after_loss]
    two_passes = variant.schedule == "two passes"
    prepared = prepared_values(
        joint.model.graph,
        data=[*joint.inputs, *joint.output_gradients, *joint.batch_projections],
        fed=joint.projections,
        needed=ancestors(joint.statistics, stop=lambda _: False),
    )
    each = [*joint.inputs, *prepared, *joint.projections, *joint.batch_projections]
    final = [value for value in joint.gradients if value not in joint.statistics]
    cuts: dict[str, tuple[Sequence[ir.Value], Sequence[ir.Value]]] = {
        "prepare": (joint.projections, prepared),
        "forward": (each, early),
        "backward": ([*each, *joint.output_gradients, *(early if two_passes else [])], late),
        "gradient": ([*joint.statistics, *joint.projections], final),
    }  # fmt: skip
    return WeightGraphs(
        {
            role: serialise(extract(joint.model, reads, gives, specs), f"weight gradient {role}")
            for role, (reads, gives) in cuts.items()
            if gives
        },
        tuple(str(value.name) for value in joint.statistics),
        tuple(str(value.name) for value in joint.gradients),
    )


def geometry_of(layer: Layer) -> Geometry:
    """The geometry of a layer of a manifest."""
    if layer.is_linear:
        out_features, in_features = layer.weight_shape
        return LinearGeometry(in_features, out_features, layer.input_shape[0] if len(layer.modes) > 2 else None)
    (channels, height, width), (out_channels, out_height, out_width) = layer.input_shape, layer.output_shape
    top, left, bottom, right = layer.padding
    return ConvGeometry(
        in_channels=channels,
        out_channels=out_channels,
        groups=layer.groups,
        kernel=(layer.weight_shape[2], layer.weight_shape[3]),
        stride=(layer.stride[0], layer.stride[1]),
        padding=(top, left, bottom, right),
        dilation=(layer.dilation[0], layer.dilation[1]),
        in_size=(height, width),
        out_size=(out_height, out_width),
    )


def _joint_graph(manifest: Manifest, variant: Variant) -> _Joint:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="weights")
    model, emit = ir.Model(graph, ir_version=IR_VERSION), Emit(graph, "weights/")
    layers = {layer.name: layer for layer in manifest.layers}
    xs, dys, contexts, gradients = [], [], [], []
    for plan in variant.layers:
        layer = layers[plan.layer]
        xs.append(_fed(graph, layer, input_name(layer.name), layer.input_shape))
        dys.append(_fed(graph, layer, output_gradient_name(layer.name), layer.output_shape))
        projections: dict[int, ir.Value] = {}
        if METHODS[variant.method].compresses:
            projections = projection_inputs(layer.name, layer.input_shape, plan.ranks, manifest.batch_size)
        graph.inputs.extend(projections.values())
        context = LayerContext(layer.name, plan.ranks, projections, variant.schedule)
        geo = geometry_of(layer)
        x, dy = (emit.swap(value) if _is_swapped(geo) else value for value in (xs[-1], dys[-1]))
        value = METHODS[variant.method].gradient(emit, context, geo, x, dy)
        value.name = gradient_name(layer.weight)
        contexts.append(context)
        gradients.append(value)
    graph.outputs.extend(gradients)
    statistics = [value for context in contexts for value in context.statistics]
    from_statistics = descendants(graph, statistics)
    statistics += [value for value in gradients if value not in from_statistics]
    tidy(model, keep=statistics)
    return _Joint(
        model=model,
        inputs=tuple(xs),
        output_gradients=tuple(dys),
        batch_projections=tuple(c.projections[0] for c in contexts if 0 in c.projections),
        projections=tuple(value for c in contexts for mode, value in c.projections.items() if mode > 0),
        statistics=tuple(statistics),
        gradients=tuple(gradients),
    )


def _fed(graph: ir.Graph, layer: Layer, name: str, sizes: Sequence[int]) -> ir.Value:
    shape = ir.Shape([BATCH_DIM if dim == -1 else dim for dim in fed_shape(layer, sizes, -1)])
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    graph.inputs.append(value)
    return value
