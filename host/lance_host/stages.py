"""The joint graph of a step, cut into the graphs that a device runs one after the other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from lance_edge.manifest import Schedule, TensorSpec
from lance_host.autodiff.cut import values_to_save
from lance_host.forward_parts import Cut, forward_parts, read_activations
from lance_host.shapes import infer_specs
from lance_host.step import Step
from lance_host.traverse import ancestors, depends_on_data, descendants

PLANNED_MICRO_BATCH = 8  # the micro-batch for which bytes are compared where they depend on it
IR_VERSION = 8  # read by every onnxruntime that has a wheel for a Pi


@dataclass(frozen=True)
class Stages:
    """The graphs of a variant by role, and the tensors that pass between them."""

    schedule: Schedule
    graphs: dict[str, ir.Model]
    boundary: tuple[TensorSpec, ...]
    activations: tuple[TensorSpec, ...]
    saved: tuple[TensorSpec, ...]
    statistics: tuple[TensorSpec, ...]


def cut_stages(step: Step) -> Stages:
    """Cut into prefix, prepare, forward, backward and gradient.

    prepare computes what depends on the parameters alone, once a step; gradient what depends on complete
    statistics, once a step.  A statistic that does not depend on the loss (the core G) is an output of
    forward, the others of backward.  What crosses between the two is chosen by a minimum cut.
    """
    # By layer, the device joins micro-batches along the axis N, and takes them apart again.
    specs = infer_specs(step.model, multiples=step.schedule != "by layer")
    after_loss = descendants(step.model.graph, [step.scale])
    early = [value for value in step.statistics if value not in after_loss]
    late = [value for value in step.statistics if value in after_loss]
    complete = [*step.compressed, *(early if step.schedule == "two passes" else [])]
    saved = _choose_saved(step, late, complete, after_loss, specs)
    crossing = [value for value in saved if value not in step.boundary and value is not step.logits]
    fed = [*step.parameters, *step.projections, *_of_samples(step), *step.targets, step.scale]
    results = [step.loss, step.logits, *crossing, *early]
    prepared = _prepared(step, [*results, *step.activations, *late])
    final = [value for value in step.gradients if value not in step.statistics]
    activations = [_behind_copies(value, step.boundary) for value in step.activations]
    cuts = {
        "prefix": Cut([step.images], step.boundary),
        "prepare": Cut(fed, prepared),
        **forward_parts(step.boundary, [*prepared, *fed], activations, results, specs),
        "backward": Cut([*saved, *prepared, *complete, *fed], late),
        "gradient": Cut([*step.statistics, *complete, *fed], final),
    }
    return Stages(
        step.schedule,
        {role: extract_cut(step.model, cut, specs) for role, cut in cuts.items() if cut.gives},
        boundary=tuple(_spec(value, specs) for value in step.boundary),
        activations=tuple(_spec(value, specs) for value in activations),
        saved=tuple(_spec(value, specs) for value in saved),
        statistics=tuple(_spec(value, specs) for value in step.statistics),
    )


def _of_samples(step: Step) -> list[ir.Value]:
    """What a micro-batch is fed of its samples beside the images."""
    return [step.labels] if step.seeds is None else [step.labels, step.seeds]


def _behind_copies(value: ir.Value, boundary: Sequence[ir.Value]) -> ir.Value:
    """A boundary tensor for the copy of one."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Identity" else None
    return source if source is not None and source in boundary else value


def _choose_saved(
    step: Step,
    late: Sequence[ir.Value],
    complete: Sequence[ir.Value],
    after_loss: set[ir.Value],
    specs: dict[str, TensorSpec],
) -> list[ir.Value]:
    backward = ancestors(late, stop=lambda value: value not in after_loss)
    reads = [value for value in backward if value not in after_loss]
    sizes = {
        value: specs[value.name].nbytes(PLANNED_MICRO_BATCH)
        for node in step.model.graph
        for value in node.outputs
        if value.name in specs
    }
    free = {*step.parameters, *step.projections, *_of_samples(step), *step.targets, *complete}
    return values_to_save(reads, given=set(step.boundary), free=free, sizes=sizes)


def _prepared(step: Step, ends: Sequence[ir.Value]) -> list[ir.Value]:
    bounds = {*step.boundary, *step.statistics} - set(ends)
    return prepared_values(
        step.model.graph,
        data=[step.images, *step.batch_projections, *step.compressed, *_of_samples(step), step.scale],
        fed=[*step.parameters, *step.projections, *step.targets],
        needed=ancestors(ends, stop=lambda value: value in bounds),
    )


def prepared_values(
    graph: ir.Graph, data: Sequence[ir.Value], fed: Iterable[ir.Value], needed: Iterable[ir.Value]
) -> list[ir.Value]:
    """Values that no sample changes and that nodes which samples do change read, in a fixed order.

    A Reshape or Transpose is not worth a tensor of its own: what it shows is prepared (the runtime fuses
    a transposition into the matrix product that reads it).

    Args:
        data: inputs that samples change.
        fed: inputs that every stage is given anyway.
        needed: only nodes which compute one of these count.
    """
    varying, wanted = descendants(graph, data), set(needed)
    constant = {*graph.initializers.values(), *fed}
    prepared: dict[ir.Value, None] = {}
    for node in graph:
        if node.outputs[0] not in varying or node.outputs[0] not in wanted:
            continue
        for operand in node.inputs:
            if operand is not None and operand not in varying:
                source = _behind_views(operand)
                if source not in constant and depends_on_data(source, free=()):
                    prepared[source] = None
    return list(prepared)


def _behind_views(value: ir.Value) -> ir.Value:
    producer = value.producer()
    while producer is not None and producer.op_type in ("Reshape", "Transpose", "Shape"):
        assert producer.inputs[0] is not None
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _spec(value: ir.Value, specs: dict[str, TensorSpec]) -> TensorSpec:
    assert value.name is not None
    return specs[value.name]


def extract_cut(model: ir.Model, cut: Cut, specs: dict[str, TensorSpec]) -> ir.Model:
    """The graph of a stage; it reads activations in place of views of them."""
    part = extract(model, cut.reads, cut.gives, specs)
    read_activations(part, cut)
    return part


def extract(
    model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], specs: dict[str, TensorSpec]
) -> ir.Model:
    """The part of the graph between `inputs` and `outputs`; of the inputs only those that it reads."""
    bounds = set(inputs)
    reached = set(ancestors(outputs, stop=lambda value: value in bounds))
    read = [value for value in inputs if value in reached]
    graph = ir.convenience.extract(model.graph, read, outputs)
    declared = {value.name for value in model.graph.inputs}
    for value in (*graph.inputs, *graph.outputs):
        if value.name not in declared:
            _declare(value, _spec(value, specs))
    constants = sorted(graph.initializers.items())  # extraction leaves them in the order of a set
    graph.initializers.clear()
    graph.initializers.update(constants)
    extracted = ir.Model(graph, ir_version=IR_VERSION, producer_name="lance-edge")
    passes.RemoveUnusedNodesPass()(extracted)
    passes.ClearMetadataAndDocStringPass()(extracted)
    return extracted


def bind(model: ir.Model, weights: Mapping[str, NDArray[np.generic]]) -> None:
    """Turn those inputs of the graph that `weights` names into constants."""
    graph = model.graph
    for value in [value for value in graph.inputs if value.name in weights]:
        assert value.name is not None
        graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray(weights[value.name]), name=value.name)
        graph.register_initializer(value)


def _declare(value: ir.Value, spec: TensorSpec) -> None:
    kinds = {
        "float32": ir.DataType.FLOAT,
        "int64": ir.DataType.INT64,
        "int32": ir.DataType.INT32,
        "bool": ir.DataType.BOOL,
        "uint8": ir.DataType.UINT8,
    }
    value.type = ir.TensorType(kinds[spec.dtype])
    value.shape = ir.Shape(spec.shape)
