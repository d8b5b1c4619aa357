"""Forward in parts, for methods that compress an activation of the whole batch as soon as it is complete.

Between two parts the device holds what the later ones read, for all samples at once.  So that this is little:

1. A part ends where an activation is complete, in the order in which the graph computes them; the last part
   ends with the results.
2. A result that cheap operators make of what an earlier part has belongs to that part: the mask of an
   activation is taken while the activation is there, and does not keep it alive.
3. Nothing is passed on twice.  Copies of a value, and exchanges of its first two axes, are made again in the
   part that reads them; of an activation, the tensor that the codec reads is also what later parts read.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lance_edge.names import forward_role
from lance_host.autodiff.cut import EXPENSIVE
from lance_host.autodiff.emit import Emit
from lance_host.layout import is_swap
from lance_host.traverse import ancestors


@dataclass(frozen=True)
class Cut:
    """A stage of the joint graph: what it may read and what it gives.

    `views` are those of `reads` that the device does not have under their own name: each is a copy of an
    activation, or (`True`) that with its first two axes exchanged.
    """

    reads: Sequence[ir.Value]
    gives: Sequence[ir.Value]
    views: Mapping[ir.Value, tuple[ir.Value, bool]] = field(default_factory=dict)


def forward_parts(
    boundary: Sequence[ir.Value],
    constants: Sequence[ir.Value],
    activations: Sequence[ir.Value],
    results: Sequence[ir.Value],
    specs: Collection[str],
) -> dict[str, Cut]:
    """Forward as one graph, or in parts by role.

    Args:
        activations: what a codec compresses; those that are boundary tensors are complete from the start.
        specs: names of the values that may pass from one part to another.
    """
    if not activations:
        return {"forward": Cut([*boundary, *constants], results)}
    inner = _in_order(value for value in activations if value not in boundary)
    ends = _ends([*boundary, *constants], inner, results)
    # Of two activations that view the same tensor, the first one counts.
    views = {view: seen for value in reversed(inner) for view, seen in _views(value).items()}
    cuts, known, done = dict[str, Cut](), dict.fromkeys(boundary), {*boundary, *constants}
    for index, end in enumerate(ends):
        computed = set(ancestors(end, stop=done.__contains__)) - done
        inside = {value for value in computed if value.name in specs and _root(value) is value}
        later = [value for later_end in ends[index + 1 :] for value in later_end]
        needed = ancestors(later, stop=(done | inside).__contains__)
        passed = (views[value][0] if value in views else value for value in needed if value in inside)
        gives = list(dict.fromkeys([*end, *passed]))
        at_hand = {view: seen for view, seen in views.items() if seen[0] in done}
        cuts[forward_role(index + 1)] = Cut([*known, *at_hand, *constants], gives, at_hand)
        known |= dict.fromkeys(gives)
        done |= {*gives, *(view for view, (activation, _) in views.items() if activation in gives)}
    return cuts


def _in_order(values: Iterable[ir.Value]) -> list[ir.Value]:
    """Each once; what depends on another stands behind it (it has all of its ancestors, and more)."""

    def depth(value: ir.Value) -> int:
        return sum(1 for _ in ancestors([value], stop=lambda _: False))

    return sorted(dict.fromkeys(values), key=depth)


def _ends(
    given: Sequence[ir.Value], activations: Sequence[ir.Value], results: Sequence[ir.Value]
) -> list[list[ir.Value]]:
    """What each part is there for: rules 1 and 2."""
    home = dict.fromkeys(given, 0)
    for part, activation in enumerate(activations):
        home |= {value: part for value in ancestors([activation], stop=home.__contains__) if value not in home}
    ends = [[activation] for activation in activations] + [[]]
    for result in results:
        ends[_first_part(result, home, last=len(activations))].append(result)
    return ends


def _first_part(value: ir.Value, home: dict[ir.Value, int], last: int) -> int:
    """The first part that can compute a value by cheap operators alone, else the last; noted in `home`."""
    if value not in home:
        producer = value.producer()
        if producer is not None and producer.op_type in EXPENSIVE:
            home[value] = last
        else:
            operands = producer.inputs if producer is not None else ()
            parts = [_first_part(operand, home, last) for operand in operands if operand is not None]
            home[value] = max(parts, default=0)
    return home[value]


def _views(activation: ir.Value) -> dict[ir.Value, tuple[ir.Value, bool]]:
    """The values that an activation is a copy or an exchange of, and whether its axes are exchanged."""
    found, value, is_swapped = dict[ir.Value, tuple[ir.Value, bool]](), activation, False
    while (source := _source(value)) is not None:
        is_swapped ^= is_swap(value.producer())
        value = source
        found[value] = (activation, is_swapped)
    return found


def _root(value: ir.Value) -> ir.Value:
    """The value of which this is a copy or an exchange, or itself."""
    while (source := _source(value)) is not None:
        value = source
    return value


def _source(value: ir.Value) -> ir.Value | None:
    producer = value.producer()
    if producer is None or not (producer.op_type == "Identity" or is_swap(producer)):
        return None
    return producer.inputs[0]


def read_activations(part: ir.Model, cut: Cut) -> None:
    """Make an extracted part read the activations in place of its views of them."""
    graph = part.graph
    views = {view.name: seen for view, seen in cut.views.items()}
    own = {value.name: value for value in graph.inputs}
    for view in [value for value in graph.inputs if value.name in views]:
        activation, is_swapped = views[view.name]
        if activation.name not in own:
            own[activation.name] = _input_like(view, activation, is_swapped)
            graph.inputs.append(own[activation.name])
        replacement = own[activation.name]
        if is_swapped:
            assert view.shape is not None
            replacement = Emit(graph, f"{activation.name}/").transpose(
                replacement, 1, 0, *range(2, len(view.shape))
            )
        ir.convenience.replace_all_uses_with(view, replacement)
        graph.inputs.remove(view)
    graph.sort()


def _input_like(view: ir.Value, activation: ir.Value, is_swapped: bool) -> ir.Value:
    assert view.shape is not None
    first, second, *rest = view.shape
    shape = ir.Shape([second, first, *rest] if is_swapped else [first, second, *rest])
    return ir.Value(name=activation.name, type=view.type, shape=shape)
