"""Questions about who depends on whom in a graph."""

from collections.abc import Callable, Collection, Iterator, Sequence

import onnx_ir as ir


def descendants(graph: ir.Graph, values: Sequence[ir.Value]) -> set[ir.Value]:
    """`values` and everything computed from them; the graph must be in topological order."""
    found = set(values)
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def ancestors(values: Sequence[ir.Value], stop: Callable[[ir.Value], bool]) -> Iterator[ir.Value]:
    """`values` and everything they are computed from, each once; not behind those where `stop` holds."""
    seen: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        yield value
        producer = value.producer()
        if producer is not None and not stop(value):
            stack.extend(operand for operand in producer.inputs if operand is not None)


def depends_on(value: ir.Value, root: ir.Value) -> bool:
    """Whether `value` is `root` or computed from it."""
    return any(found is root for found in ancestors([value], stop=lambda _: False))


def depends_on_data(value: ir.Value, free: Collection[ir.Value]) -> bool:
    """Whether a value is computed from more than constants and `free` values."""
    for found in ancestors([value], stop=lambda v: v in free):
        is_leaf = found.producer() is None or found in free
        if is_leaf and found not in free and found.const_value is None:
            return True
    return False
