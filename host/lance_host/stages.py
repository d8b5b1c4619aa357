"""The joint graph of a step, cut into the graphs that a device runs one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from lance_edge.manifest import TensorSpec
from lance_host.autodiff.cut import values_to_save
from lance_host.methods import PLANNED_MICRO_BATCH
from lance_host.shapes import infer_specs
from lance_host.step import Step
from lance_host.traverse import ancestors, descendants

IR_VERSION = 8  # read by every onnxruntime that has a wheel for a Pi


@dataclass(frozen=True)
class Stages:
    """The graphs of a variant by role, and the tensors that pass between them."""

    graphs: dict[str, ir.Model]
    boundary: tuple[TensorSpec, ...]
    saved: tuple[TensorSpec, ...]
    statistics: tuple[TensorSpec, ...]


def cut_stages(step: Step) -> Stages:
    """Cut into prefix, forward, backward, predict, and gradient where gradients come from statistics.

    A statistic that does not depend on the loss (the core G) is an output of forward, the others of
    backward.  What crosses between the two is chosen by a minimum cut.
    """
    specs = infer_specs(step.model)
    after_loss = descendants(step.model.graph, [step.scale])
    early = [value for value in step.statistics if value not in after_loss]
    late = [value for value in step.statistics if value in after_loss]
    saved = _choose_saved(step, late, after_loss, specs)
    final = [value for value in step.gradients if value not in step.statistics]
    fed = [*step.parameters, *step.projections, step.labels, step.scale]
    crossing = [value for value in saved if value not in step.boundary and value is not step.logits]

    def stage(inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        return extract(step.model, inputs, outputs, specs)

    graphs = {
        "prefix": stage([step.images], step.boundary),
        "forward": stage([*step.boundary, *fed], [step.loss, step.logits, *crossing, *early]),
        "backward": stage([*saved, *fed], late),
        "predict": stage([*step.boundary, *fed], [step.logits]),
    }
    if final:
        graphs["gradient"] = stage([*step.statistics, *fed], final)
    return Stages(
        graphs,
        boundary=tuple(_spec(value, specs) for value in step.boundary),
        saved=tuple(_spec(value, specs) for value in saved),
        statistics=tuple(_spec(value, specs) for value in step.statistics),
    )


def _choose_saved(
    step: Step, late: Sequence[ir.Value], after_loss: set[ir.Value], specs: dict[str, TensorSpec]
) -> list[ir.Value]:
    backward = ancestors(late, stop=lambda value: value not in after_loss)
    reads = [value for value in backward if value not in after_loss]
    sizes = {
        value: specs[value.name].nbytes(PLANNED_MICRO_BATCH)
        for node in step.model.graph
        for value in node.outputs
        if value.name in specs
    }
    free = {*step.parameters, *step.projections, step.labels}
    return values_to_save(reads, given=set(step.boundary), free=free, sizes=sizes)


def _spec(value: ir.Value, specs: dict[str, TensorSpec]) -> TensorSpec:
    assert value.name is not None
    return specs[value.name]


def extract(
    model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], specs: dict[str, TensorSpec]
) -> ir.Model:
    """The part of the graph between `inputs` and `outputs`; of the inputs only those that it reads."""
    bounds = set(inputs)
    reached = set(ancestors(outputs, stop=lambda value: value in bounds))
    read = [value for value in inputs if value in reached]
    graph = ir.convenience.extract(model.graph, read, outputs)
    for value in (*graph.inputs, *graph.outputs):
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
