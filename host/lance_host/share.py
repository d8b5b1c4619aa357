"""What several graphs of a package have in common is stored once.

A protobuf message is its fields one after the other, and a message field that comes in two pieces is
merged: the bytes of a `ModelProto` without some of its initializers, followed by the bytes of a
`ModelProto` that holds nothing but these, read as the whole model.  So a graph is a list of members: its
structure, and constants that other graphs have too.  Constants with the same users share a member, so
that the members stay few.

Source: protobuf.dev, "Encoding", on embedded messages that occur more than once.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from lance_host.compile import Compiled

# Smaller initializers (shapes, axes) stay in their graph.
LEAST_CONSTANT_BYTES = 256
# A member has its price beside its content: header and padding in the tar, entries in the manifest.
LEAST_SAVED_BYTES = 4096


@dataclass(frozen=True)
class _Graph:
    """A graph; `contents` maps the names of its large initializers to names that say their content."""

    model: onnx.ModelProto
    contents: Mapping[str, str]

    def tensors(self) -> dict[str, onnx.TensorProto]:
        """The large initializers by content name, each once."""
        large = (tensor for tensor in self.model.graph.initializer if tensor.name in self.contents)
        return {self.contents[tensor.name]: tensor for tensor in large}


def share(compiled: Sequence[Compiled]) -> tuple[Compiled, ...]:
    """The same variants with every whole graph, and every large constant, that several have stored once.

    Graphs stay what they were, but for the names and the order of shared constants.
    """
    members = _distinct(compiled)  # content of a graph -> its member
    graphs = {member: _read(data) for data, member in members.items()}
    groups = {users: _constants_member(graphs[users[0]], names) for users, names in _groups(graphs).items()}
    parts: dict[str, dict[str, bytes]] = {}
    for member, graph in graphs.items():
        shared = [group for users, group in groups.items() if member in users]
        moved = {name for group in shared for name in group.names}
        structure = _structure(graph, moved)
        parts[member] = {member: structure, **{group.member: group.data for group in shared}}
    digests = {member: _digest(graph) for member, graph in graphs.items()}
    return tuple(_with_parts(one, members, parts, digests) for one in compiled)


def _distinct(compiled: Iterable[Compiled]) -> dict[bytes, str]:
    """Every graph once, under the name that the first variant gave it."""
    members: dict[bytes, str] = {}
    for one in compiled:
        for role in one.variant.graphs:
            members.setdefault(one.graph(role), one.variant.graphs[role][0])
    return members


def _with_parts(
    compiled: Compiled,
    members: Mapping[bytes, str],
    parts: Mapping[str, Mapping[str, bytes]],
    digests: Mapping[str, str],
) -> Compiled:
    own = {role: parts[members[compiled.graph(role)]] for role in compiled.variant.graphs}
    graphs = {role: tuple(pieces) for role, pieces in own.items()}
    data = {name: piece for pieces in own.values() for name, piece in pieces.items()}
    prefix = digests[members[compiled.graph("prefix")]] if "prefix" in own else None
    return Compiled(replace(compiled.variant, graphs=graphs, prefix_sha256=prefix), data)


def _read(data: bytes) -> _Graph:
    model = onnx.load_from_string(data)
    graph = model.graph
    # A graph inside a node may read a name of ours; an output is known to others by its name.
    has_inner_graphs = any(item.HasField("g") or item.graphs for node in graph.node for item in node.attribute)
    fixed = {value.name for value in (*graph.input, *graph.output)}
    large = [
        tensor
        for tensor in graph.initializer
        if tensor.ByteSize() >= LEAST_CONSTANT_BYTES and tensor.name not in fixed and not has_inner_graphs
    ]
    return _Graph(model, {tensor.name: _content_name(tensor) for tensor in large})


def _content_name(tensor: onnx.TensorProto) -> str:
    """`constant/3f0c...`, the same for the same type, shape and values."""
    anonymous = onnx.TensorProto()
    anonymous.CopyFrom(tensor)
    anonymous.ClearField("name")
    return f"constant/{hashlib.sha256(anonymous.SerializeToString(deterministic=True)).hexdigest()[:16]}"


def _groups(graphs: Mapping[str, _Graph]) -> dict[tuple[str, ...], list[str]]:
    """Constants by the graphs that use them, where one member for all takes less room than copies."""
    users: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for member, graph in graphs.items():
        for name, tensor in graph.tensors().items():
            users.setdefault(name, []).append(member)
            sizes[name] = tensor.ByteSize()
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, who in users.items():
        groups.setdefault(tuple(who), []).append(name)

    def saved_bytes(who: tuple[str, ...]) -> int:
        return (len(who) - 1) * sum(sizes[name] for name in groups[who])

    return {who: names for who, names in groups.items() if saved_bytes(who) > LEAST_SAVED_BYTES}


@dataclass(frozen=True)
class _Constants:
    """A member of constants."""

    member: str
    names: Sequence[str]
    data: bytes


def _constants_member(user: _Graph, names: Sequence[str]) -> _Constants:
    """A model of nothing but these initializers, taken from one of the graphs that have them."""
    tensors, model = user.tensors(), onnx.ModelProto()
    for name in names:
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(tensors[name])
        tensor.name = name
    data: bytes = model.SerializeToString(deterministic=True)
    return _Constants(f"constants/{hashlib.sha256(data).hexdigest()[:12]}.onnx", names, data)


def _digest(graph: _Graph) -> str:
    """The same for the same graph, whichever constants others have: all go by the name of their content."""
    return hashlib.sha256(_structure(graph, set(graph.contents.values()))).hexdigest()


def _structure(graph: _Graph, moved: set[str]) -> bytes:
    """The graph without the constants that moved, which its nodes read under their content names."""
    renamed = {old: name for old, name in graph.contents.items() if name in moved}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    kept = [tensor for tensor in graph.model.graph.initializer if tensor.name not in renamed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    data: bytes = model.SerializeToString(deterministic=True)
    return data
