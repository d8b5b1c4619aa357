"""Graphs that a board can use again for its next task: other ranks, another number of classes.

A variant is compiled at the ranks of one calibration.  Where no constant of its graphs holds a rank (see
`LayerContext.takes_any_rank`), only the declared shapes do: they are opened here.  What a mode's rank decided
when the graphs were written stays: whether the batch or the positions are compressed at all.
"""

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from lance_edge.manifest import TensorSpec
from lance_edge.names import BATCH_DIM, CLASSES_DIM, LOGITS, TARGET_OFF, TARGET_ON, gradient_name
from lance_host.autodiff.emit import static_dim
from lance_host.shapes import PROBES, infer_shapes
from lance_host.step import Step
from lance_host.traverse import descendants

TRAINING_ROLES = ("prepare", "forward", "backward", "gradient")

Axes = Mapping[str, Collection[int]]


def open_shapes(
    graphs: Mapping[str, ir.Model], boundary: Sequence[TensorSpec], step: Step, head: Collection[str]
) -> None:
    """Take the numbers of ranks and classes out of the declared shapes of the training graphs, in place.

    Args:
        graphs: by role.
        boundary: the prefix's outputs, which stay as they are, as do parameters and their gradients.
        step: what the graphs were cut from; its inputs' shapes are opened too.
        head: those of its parameters whose first dimension are the classes.
    """
    parameters = [str(value.name) for value in step.parameters]
    others = [name for name in parameters if name not in head]
    known = {spec.name for spec in boundary} | {*others, *map(gradient_name, others)}
    decided = decided_axes(step, head)
    for role in TRAINING_ROLES:
        if role in graphs:
            _open(graphs[role].graph, known, head, decided)


def decided_axes(step: Step, head: Collection[str]) -> Axes:
    """By value, the axes whose size a rank or the number of classes decides, alone or times the samples.

    Shapes are inferred twice, the second time with one more of every rank and class: what differs is decided by
    them.  A size alone does not tell: `4*N` is a fixed number, or the rank of the positions, of every sample.
    Values of which inference does not know the shape have no entry.
    """
    sizes = _name_sizes(step, head)
    more = {name: size + 1 for name, size in sizes.items()}
    before, after = (infer_shapes(step.model, PROBES[0], probe) for probe in (sizes, more))
    return {
        name: [axis for axis, pair in enumerate(zip(shape, after[name], strict=True)) if len({*pair}) == 2]
        for name, shape in before.items()
        if name in after and len(shape) == len(after[name])
    }


def _name_sizes(step: Step, head: Collection[str]) -> dict[str, int]:
    """Give ranks and classes names in the inputs of the step's graph; what they are now."""
    sizes = {CLASSES_DIM: static_dim(step.logits, 1)}
    heads = [value for value in step.parameters if value.name in head]
    for value in (*heads, *step.targets):
        value.shape = ir.Shape([CLASSES_DIM, *list(value.shape or ())[1:]])
    for value in step.projections:
        name = f"rank of {value.name}"
        sizes[name] = static_dim(value, -1)
        value.shape = ir.Shape([*list(value.shape or ())[:-1], name])
    inputs = [*heads, *step.targets, *step.projections]
    for value in descendants(step.model.graph, inputs).difference(inputs):
        value.shape = None
    return sizes


def _open(graph: ir.Graph, known: Collection[str], head: Collection[str], decided: Axes) -> None:
    for node in graph:  # the runtime infers them again, from what is really fed
        for value in node.outputs:
            if value not in graph.outputs:
                value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        if value.name not in known and value.shape is not None:
            value.shape = ir.Shape(_dims(value, head, decided))


def _dims(value: ir.Value, head: Collection[str], decided: Axes) -> list[int | str]:
    """The declared dimensions; those that a rank or the classes decide get a name."""
    assert value.shape is not None
    dims: list[int | str] = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    if value.name == LOGITS:
        return [BATCH_DIM, CLASSES_DIM]
    if value.name in (TARGET_ON, TARGET_OFF):
        return [CLASSES_DIM]
    if value.name in {*head, *map(gradient_name, head)}:
        return [CLASSES_DIM, *dims[1:]]
    axes = decided.get(str(value.name), range(len(dims)))
    return [f"{value.name} {axis}" if axis in axes else dim for axis, dim in enumerate(dims)]
