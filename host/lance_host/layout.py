"""Which axis stands outside, batch or channels: sink the exchanges of the two, and cancel them.

Matrix products want channels outside (`autodiff/conv.py`), the exported network has the batch outside, so
the differentiated graph is full of exchanges (`swap`, Transpose with perm 1, 0, 2, ...).  Rules:

1. swap(swap(x)) = x.
2. f(swap(x)) = swap(f(x)) for elementwise f; with several operands the others are swapped too, or keep
   their place because they broadcast along the two axes.
3. Reductions, Squeeze and Unsqueeze of the axes behind the first two commute with swap.

Rule 2 is applied where at least as many large operands come swapped as do not.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from lance_host.autodiff.emit import Emit
from lance_host.shapes import infer_shapes

# fmt: off
ELEMENTWISE = frozenset({
    "Abs", "Add", "And", "Cast", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "Max", "Min", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh",
    "Where", "Xor",
})
# fmt: on
OVER_TRAILING_AXES = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "Squeeze", "Unsqueeze"})
PROBE_BATCH = 5


def sink_swaps(model: ir.Model) -> None:
    """Apply the rules to the whole graph, in place; its outputs stay as they are."""
    graph = model.graph
    values = ir.convenience.create_value_mapping(graph)
    shapes = {values[name]: shape for name, shape in infer_shapes(model, PROBE_BATCH).items()}
    emit = Emit(graph, "layout/")
    fixed = set(graph.outputs)
    for node in list(graph):
        if is_swap(node):
            _cancel(node, fixed)
        elif node.outputs[0] not in fixed and len(shapes.get(node.outputs[0], ())) >= 2:
            operands = _operands_behind_swap(emit, node, shapes)
            if operands is not None:
                _move_behind(emit, node, operands, shapes)
    graph.sort()
    passes.RemoveUnusedNodesPass()(model)


def is_swap(node: ir.Node | None) -> bool:
    """Whether a node exchanges the first two axes and leaves the others."""
    if node is None or node.op_type != "Transpose":
        return False
    perm = tuple(node.attributes.get_ints("perm", ()))
    return perm[:2] == (1, 0) and perm[2:] == tuple(range(2, len(perm)))


def _source(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is swap(x)."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and is_swap(producer) else None


def _cancel(swap: ir.Node, fixed: Collection[ir.Value]) -> None:
    """Rule 1."""
    inner = _source(swap.inputs[0])
    if inner is not None and swap.outputs[0] not in fixed:
        ir.convenience.replace_all_uses_with(swap.outputs[0], inner)


def _operands_behind_swap(
    emit: Emit, node: ir.Node, shapes: Mapping[ir.Value, tuple[int, ...]]
) -> list[ir.Value | None] | None:
    """What the node reads if its output is to come out swapped; `None` where no rule applies."""
    if node.op_type in ELEMENTWISE:
        return _elementwise_operands(emit, node, shapes)
    if node.op_type in OVER_TRAILING_AXES:
        return _trailing_operands(node)
    return None


def _elementwise_operands(
    emit: Emit, node: ir.Node, shapes: Mapping[ir.Value, tuple[int, ...]]
) -> list[ir.Value | None] | None:
    """Rule 2."""
    rank = len(shapes[node.outputs[0]])
    known = [_shape(value, shapes) for value in node.inputs if value is not None]
    sources = [  # with fewer axes, the exchanged ones are not the first two of the output
        _source(value) if value is not None and len(_shape(value, shapes) or ()) == rank else None
        for value in node.inputs
    ]
    swapped = sum(source is not None for source in sources)
    large = sum(shape is None or len(shape) == rank for shape in known)
    if not swapped or None in known or 2 * swapped < large:
        return None
    return [
        source if source is not None else _swapped_operand(emit, value, rank, shapes)
        for source, value in zip(sources, node.inputs, strict=True)
    ]


def _swapped_operand(
    emit: Emit, value: ir.Value | None, rank: int, shapes: Mapping[ir.Value, tuple[int, ...]]
) -> ir.Value | None:
    """An operand that broadcasts to the output, for the swapped output."""
    shape = () if value is None else _shape(value, shapes) or ()
    lacking = rank - len(shape)
    if value is None or all(size == 1 for size in shape[: max(0, 2 - lacking)]):
        return value  # it does not reach the first two axes
    if lacking == 1:  # its first axis is the output's second
        return emit("Unsqueeze", value, emit.constant([1]))
    return _swap(emit, value, rank)


def _trailing_operands(node: ir.Node) -> list[ir.Value | None] | None:
    """Rule 3."""
    source = _source(node.inputs[0])
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    if source is None or axes is None or axes.size == 0 or int(np.min(axes.numpy())) < 2:
        return None
    return [source, node.inputs[1]]


def _move_behind(
    emit: Emit,
    node: ir.Node,
    operands: Sequence[ir.Value | None],
    shapes: dict[ir.Value, tuple[int, ...]],
) -> None:
    """Replace y = f(...) by swap(f(operands))."""
    old = node.outputs[0]
    first, second, *rest = shapes[old]
    new = ir.Value(name=f"{old.name}/channels_outside")
    emit.graph.append(ir.Node("", node.op_type, operands, attributes=node.attributes.values(), outputs=[new]))
    back = _swap(emit, new, len(shapes[old]))
    shapes[new], shapes[back] = (second, first, *rest), shapes[old]
    ir.convenience.replace_all_uses_with(old, back)


def _swap(emit: Emit, value: ir.Value, rank: int) -> ir.Value:
    return emit.transpose(value, 1, 0, *range(2, rank))


def _shape(value: ir.Value, shapes: Mapping[ir.Value, tuple[int, ...]]) -> tuple[int, ...] | None:
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    return shapes.get(value)
