"""The joint graph of one training step, and how it is cut into the graphs that a device runs.

    parameters -> prepare -> prepared
    images -> prefix -> boundary -> forward -> loss, logits, saved, statistics
                                    saved -> backward -> statistics -> gradient -> <parameter>/grad

All of it is one ONNX graph first, which runs as it stands and can be checked against autograd as a whole;
`stages.py` extracts the device's graphs from it, between named values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes import common as passes

from lance_edge.manifest import Layer, Mode, Schedule
from lance_edge.names import BATCH_DIM, gradient_name
from lance_host.autodiff import conv
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit
from lance_host.autodiff.reverse import InputGradient, gradients
from lance_host.capture import Captured
from lance_host.forms import LayerContext
from lance_host.layer_nodes import geometry, input_of
from lance_host.layout import sink_swaps
from lance_host.methods import (
    METHODS,
    WeightGradient,
    codec_inputs,
    patch_projection_inputs,
    projection_inputs,
)
from lance_host.traverse import ancestors, depends_on, descendants


@dataclass(frozen=True)
class Step:
    """A differentiated network: every value is of the one graph of `model`.

    `boundary` are the prefix's outputs, `statistics` the sums over micro-batches, `gradients` the final
    gradient of each parameter, `projections` the inputs of a method that the package holds, of which
    `batch_projections` have a row for each sample.  `activations` are what a codec compresses, and `compressed`
    the inputs that it gives: the core of every layer and its factors.  `seeds` say what is dropped.
    """

    model: ir.Model
    schedule: Schedule
    images: ir.Value
    parameters: tuple[ir.Value, ...]
    labels: ir.Value
    targets: tuple[ir.Value, ...]
    scale: ir.Value
    seeds: ir.Value | None
    loss: ir.Value
    logits: ir.Value
    boundary: tuple[ir.Value, ...]
    projections: tuple[ir.Value, ...]
    batch_projections: tuple[ir.Value, ...]
    statistics: tuple[ir.Value, ...]
    gradients: tuple[ir.Value, ...]
    activations: tuple[ir.Value, ...]
    compressed: tuple[ir.Value, ...]


def differentiate(
    captured: Captured,
    method: str,
    ranks: Mapping[str, Sequence[int]],
    batch_size: int,
    schedule: Schedule = "one pass",
    mode: Mode = "channel",
    takes_any_rank: bool = False,
) -> Step:
    """Append the gradients of a method to the captured graph, which this call consumes.

    Args:
        method: a name of `METHODS`.
        ranks: for a method with fixed ranks, layer name -> rank of each mode.
        batch_size: a batch mode of this rank is not compressed.
        schedule: how micro-batches go through a method with compressed batch modes.
        mode: which modes a convolution's input has.
        takes_any_rank: in patch mode, write graphs that serve any ranks of the modes that these compress.
    """
    graph = captured.model.graph
    fed = captured.parameters if captured.seeds is None else (*captured.parameters, captured.seeds)
    boundary = split_prefix(graph, captured.images, fed)
    contexts = {
        layer.name: replace(
            _context(layer, method, ranks.get(layer.name, ()), batch_size, schedule, mode),
            takes_any_rank=takes_any_rank,
        )
        for layer in captured.layers
    }
    cores = [context.core for context in contexts.values() if context.core is not None]
    factors = [value for context in contexts.values() for value in context.projections.values()]
    graph.inputs.extend([*cores, *factors])
    results = _append_gradients(captured, method, contexts)
    statistics = _all_statistics(captured, contexts, results)
    lower_forward(graph, captured.nodes)
    graph.outputs[:] = [captured.loss, captured.logits, *results]
    activations = [context.activation for context in contexts.values() if context.activation is not None]
    own = tidy(captured.model, keep=[*statistics, *activations])
    return Step(
        model=captured.model,
        schedule=schedule,
        images=captured.images,
        parameters=captured.parameters,
        labels=captured.labels,
        targets=captured.targets,
        scale=captured.scale,
        seeds=captured.seeds,
        loss=own(captured.loss),
        logits=own(captured.logits),
        boundary=boundary,
        projections=() if cores else tuple(factors),
        batch_projections=tuple(
            context.projections[0] for context in contexts.values() if 0 in context.projections and not cores
        ),
        statistics=tuple(own(value) for value in statistics),
        gradients=tuple(own(value) for value in results),
        activations=tuple(own(value) for value in activations),
        compressed=(*cores, *factors) if cores else (),
    )


def _append_gradients(captured: Captured, method: str, contexts: Mapping[str, LayerContext]) -> list[ir.Value]:
    """The gradient of each parameter, named after it; the method's own of the layers' weights."""
    overrides = {
        (node, 1): _override(METHODS[method].gradient, contexts[layer.name])
        for layer, node in zip(captured.layers, captured.nodes, strict=True)
    }
    emit = Emit(captured.model.graph, "grad/")
    results = gradients(emit, captured.logits, captured.seed, captured.parameters, overrides)
    results = [emit("Identity", v) if v in results[:i] else v for i, v in enumerate(results)]  # a name for each
    for parameter, value in zip(captured.parameters, results, strict=True):
        value.name = gradient_name(str(parameter.name))
    return results


def _all_statistics(
    captured: Captured, contexts: Mapping[str, LayerContext], results: Sequence[ir.Value]
) -> list[ir.Value]:
    """Those of the method, and the gradients that are sums over micro-batches themselves."""
    statistics = [value for context in contexts.values() for value in context.statistics]
    from_statistics = descendants(captured.model.graph, statistics)
    return [*statistics, *(value for value in results if value not in from_statistics)]


def split_prefix(graph: ir.Graph, images: ir.Value, fed: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    """The boundary tensors, `[N, ...]`: what the trainable part reads of the frozen part.

    Where it reads the images themselves, an Identity stands between, so that a prefix always exists.

    Args:
        fed: the parameters, and whatever else the prefix must not read.
    """
    tail = descendants(graph, fed)
    boundary: dict[ir.Value, None] = {}
    for node in graph:
        if any(output in tail for output in node.outputs):
            for value in node.inputs:
                if value is not None and value not in tail and depends_on(value, images):
                    boundary |= dict.fromkeys(_batch_first(value, images))
    if images in boundary:
        copy = ir.Value(name="images/copy", type=images.type, shape=images.shape)
        inner = set(ancestors([*boundary], stop=lambda value: value is images)) - {images}
        readers = [use for use in images.uses() if use.node.outputs[0] not in inner]
        graph.insert_before(graph[0], ir.Node("", "Identity", (images,), outputs=[copy]))
        for use in readers:
            use.node.replace_input_with(use.idx, copy)
        boundary = {copy if value is images else value: None for value in boundary}
    return tuple(boundary)


def _batch_first(value: ir.Value, images: ir.Value) -> Iterator[ir.Value]:
    """A value, or where its first axis does not count samples, what it is computed from.

    The prefix may then take any number of images at a time, and what it made of an image can be kept.
    """
    producer = value.producer()
    if producer is None or value.shape is None or (len(value.shape) and value.shape[0] == BATCH_DIM):
        yield value
        return
    for operand in producer.inputs:
        if operand is not None and depends_on(operand, images):
            yield from _batch_first(operand, images)


def _context(
    layer: Layer, method: str, ranks: Sequence[int], batch_size: int, schedule: Schedule, mode: Mode
) -> LayerContext:
    if not METHODS[method].compresses:
        return LayerContext(layer.name, (), {})
    if schedule == "by layer":
        core, factors = codec_inputs(layer.name, layer.input_shape, ranks)
        return LayerContext(layer.name, tuple(ranks), factors, schedule, mode, core)
    inputs = (
        patch_projection_inputs(layer, ranks, batch_size)
        if mode == "patch"
        else projection_inputs(layer.name, layer.input_shape, ranks, batch_size)
    )
    return LayerContext(layer.name, tuple(ranks), inputs, schedule, mode)


def _override(method: WeightGradient, context: LayerContext) -> InputGradient:
    def weight_gradient(emit: Emit, node: ir.Node, dy: ir.Value) -> ir.Value:
        geo = geometry(node)
        return method(emit, context, geo, input_of(emit, node, geo), dy)

    return weight_gradient


def lower_forward(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Write trainable convolutions as matrix products where that is faster."""
    emit = Emit(graph, "forward/")
    for node in nodes:
        geo = geometry(node)
        if not isinstance(geo, ConvGeometry) or not geo.by_channel:
            continue
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        y = conv.forward(emit, geo, x, weight, node.inputs[2] if len(node.inputs) > 2 else None)
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape  # the next of `nodes` may read it
        ir.convenience.replace_all_uses_with(node.outputs[0], y)
        graph.remove(node, safe=True)
    graph.sort()


def tidy(model: ir.Model, keep: Sequence[ir.Value] = ()) -> Callable[[ir.Value], ir.Value]:
    """Cancel exchanges of axes, and remove what no output needs or what is computed twice.

    Returns:
        What stands for an output, or for a value of `keep`, now: it has its name, but where two were computed
        alike (the shifts of two norms that are added have one gradient) it may be another.
    """
    graph = model.graph
    outputs = list(graph.outputs)
    graph.outputs.extend(value for value in dict.fromkeys(keep) if value not in outputs)
    sink_swaps(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    values = {value.name: value for value in graph.outputs}
    del graph.outputs[len(outputs) :]
    return lambda value: values[value.name]
