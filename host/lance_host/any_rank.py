"""Graphs that a board can use again for its next task: other ranks, another number of classes.

A variant is compiled at the ranks of one calibration.  Where no constant of its graphs holds a rank (see
`LayerContext.takes_any_rank`), only the declared shapes do: they are opened here.  What a mode's rank decided
when the graphs were written stays: whether the batch or the positions are compressed at all.
"""

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from lance_edge.manifest import TensorSpec, batch_multiple
from lance_edge.names import BATCH_DIM, CLASSES_DIM, LOGITS, TARGET_OFF, TARGET_ON, gradient_name

TRAINING_ROLES = ("prepare", "forward", "backward", "gradient")


def open_shapes(
    graphs: Mapping[str, ir.Model],
    boundary: Sequence[TensorSpec],
    parameters: Collection[str],
    head: Collection[str],
) -> None:
    """Take the numbers of ranks and classes out of the declared shapes of the training graphs, in place.

    Args:
        graphs: by role.
        boundary: the prefix's outputs, which stay as they are, as do parameters and their gradients.
        head: those of `parameters` whose first dimension are the classes.
    """
    others = [name for name in parameters if name not in head]
    known = {spec.name for spec in boundary} | {*others, *map(gradient_name, others)}
    for role in TRAINING_ROLES:
        if role in graphs:
            _open(graphs[role].graph, known, head)


def _open(graph: ir.Graph, known: Collection[str], head: Collection[str]) -> None:
    for node in graph:  # the runtime infers them again, from what is really fed
        for value in node.outputs:
            if value not in graph.outputs:
                value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        if value.name not in known and value.shape is not None:
            value.shape = ir.Shape(_dims(value, head))


def _dims(value: ir.Value, head: Collection[str]) -> list[int | str]:
    """The declared dimensions; those that may be a rank or the classes get a name."""
    assert value.shape is not None
    dims: list[int | str] = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    if value.name == LOGITS:
        return [BATCH_DIM, CLASSES_DIM]
    if value.name in (TARGET_ON, TARGET_OFF):
        return [CLASSES_DIM]
    if value.name in {*head, *map(gradient_name, head)}:
        return [CLASSES_DIM, *dims[1:]]
    return [
        dim if isinstance(dim, str) and batch_multiple(dim) else f"{value.name} {axis}"
        for axis, dim in enumerate(dims)
    ]
