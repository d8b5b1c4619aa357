"""Graphs in parts: the joined bytes run as the whole graph did."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lance_edge.manifest import Variant
from lance_host.compile import Compiled
from lance_host.share import LEAST_CONSTANT_BYTES, share

SIDE = 32
RNG = np.random.default_rng(0)
LARGE = {name: RNG.normal(size=(SIDE, SIDE)).astype(np.float32) for name in ("a", "b", "c")}
SMALL = RNG.normal(size=SIDE).astype(np.float32)  # below LEAST_CONSTANT_BYTES


def matrices(weights: dict[str, np.ndarray], **extra) -> bytes:
    """y = x W1 + s, then W2, ...: `weights` are names and arrays of the initializers."""
    value, nodes = "x", []
    for index, name in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [value, name], [f"m{index}"]))
        nodes.append(helper.make_node("Add", [f"m{index}", "small"], [f"y{index}"]))
        value = f"y{index}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    tensors = [numpy_helper.from_array(array, name) for name, array in {**weights, "small": SMALL}.items()]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("N", SIDE)) for name in ("x", "y")]
    outputs = [info[1], *extra.get("outputs", ())]
    graph = helper.make_graph(nodes + extra.get("nodes", []), "g", [info[0]], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def compiled(method: str, **graphs: bytes) -> Compiled:
    names = {role: (f"graphs/{method}/{role}.onnx",) for role in graphs}
    variant = Variant(method, None, "one pass", names, (), (), (), (), (), (), (), (), {})
    return Compiled(variant, {names[role][0]: data for role, data in graphs.items()})


def run(data: bytes) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.ones((3, SIDE), np.float32)})


def initializers(data: bytes) -> list[str]:
    return [tensor.name for tensor in onnx.load_from_string(data).graph.initializer]


@pytest.fixture(scope="module")
def pair():
    """Two variants: one graph that is the same, and two that have matrices in common, under other names."""
    same = matrices({"a": LARGE["a"]})
    first = compiled("one", prefix=same, forward=matrices({"a": LARGE["a"], "b": LARGE["b"]}))
    second = compiled("two", prefix=same, forward=matrices({"q": LARGE["b"], "c": LARGE["c"], "z": LARGE["a"]}))
    return (first, second), share((first, second))


def test_every_graph_runs_as_before_to_the_last_bit_and_is_valid(pair):
    for before, after in zip(*pair, strict=True):
        for role in before.variant.graphs:
            data = after.graph(role)
            onnx.checker.check_model(data, full_check=True)
            np.testing.assert_array_equal(run(data), run(before.graph(role)))


def test_the_order_of_the_parts_does_not_matter(pair):
    after = pair[1][1]
    names = after.variant.graphs["forward"]
    assert len(names) > 1
    turned = b"".join(after.members[name] for name in reversed(names))
    np.testing.assert_array_equal(run(turned), run(after.graph("forward")))


def test_a_constant_is_stored_once_whatever_its_name(pair):
    members = {name: data for one in pair[1] for name, data in one.members.items()}
    values = [
        numpy_helper.to_array(tensor).tobytes()
        for data in members.values()
        for tensor in onnx.load_from_string(data).graph.initializer
        if tensor.ByteSize() >= LEAST_CONSTANT_BYTES
    ]
    assert len(values) == len(set(values)) == len(LARGE)
    assert {array.tobytes() for array in LARGE.values()} == set(values)


def test_no_name_stands_twice_in_a_graph(pair):
    for one in pair[1]:
        for role in one.variant.graphs:
            names = initializers(one.graph(role))
            assert len(names) == len(set(names))


def test_a_graph_that_holds_a_matrix_twice_keeps_one():
    twice = compiled("one", forward=matrices({"a": LARGE["a"], "again": LARGE["a"]}))
    other = compiled("two", forward=matrices({"a": LARGE["a"], "b": LARGE["b"]}))
    one, _ = share((twice, other))
    assert len(initializers(one.graph("forward"))) == 2  # the matrix and the small vector
    np.testing.assert_array_equal(run(one.graph("forward")), run(twice.graph("forward")))


def test_constants_with_the_same_users_share_a_member_and_equal_graphs_are_one(pair):
    one, two = (compiled.variant.graphs for compiled in pair[1])
    assert one["prefix"] == two["prefix"]
    assert one["prefix"][0] == "graphs/one/prefix.onnx"
    # a is in all three graphs, b in both forwards, c in one: two members of constants.
    assert len({name for graphs in (one, two) for names in graphs.values() for name in names[1:]}) == 2
    assert len(one["prefix"]) == 2
    assert len(one["forward"]) == len(two["forward"]) == 3


def test_what_does_not_repeat_or_does_not_pay_stays_where_it_is():
    first = compiled("one", forward=matrices({"a": LARGE["a"]}))
    (alone,) = share((first,))
    assert (alone.members, alone.variant) == (first.members, first.variant)
    pair = (first, compiled("two", forward=matrices({"b": LARGE["b"]})))
    for before, after in zip(pair, share(pair), strict=True):
        assert after.members == before.members, "only the small vector repeats"


def test_a_prefix_has_the_same_digest_however_it_is_divided(pair):
    (alone,) = share((compiled("alone", prefix=matrices({"a": LARGE["a"]})),))
    other_value, other_nodes = share(
        (
            compiled("one", prefix=matrices({"a": LARGE["b"]})),
            compiled("two", prefix=matrices({"a": LARGE["a"], "b": LARGE["b"]})),
        )
    )
    assert len(alone.variant.graphs["prefix"]) == 1
    assert len(pair[1][0].variant.graphs["prefix"]) == 2
    digests = [one.variant.prefix_sha256 for one in (alone, *pair[1], other_value, other_nodes)]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 3
    (headless,) = share((compiled("one", forward=matrices({"a": LARGE["a"]})),))
    assert headless.variant.prefix_sha256 is None


def test_a_constant_that_is_an_output_keeps_its_name():
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, (SIDE, SIDE))
    graph = matrices({"a": LARGE["a"], "b": LARGE["b"]}, outputs=[output])
    shared = share((compiled("one", forward=graph), compiled("two", forward=matrices({"b": LARGE["b"]}))))
    assert "b" in initializers(shared[0].graph("forward"))
    for found, expected in zip(run(shared[0].graph("forward")), run(graph), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_graph_with_graphs_inside_its_nodes_is_left_whole():
    """A branch reads constants of the graph around it by name."""
    info = helper.make_tensor_value_info("taken", TensorProto.FLOAT, (SIDE, SIDE))
    branch = helper.make_graph([helper.make_node("Identity", ["a"], ["taken"])], "branch", [], [info])
    yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    choose = helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch)
    output = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, (SIDE, SIDE))
    graph = matrices({"a": LARGE["a"]}, nodes=[yes, choose], outputs=[output])
    first = compiled("one", forward=graph)
    shared = share((first, compiled("two", forward=matrices({"a": LARGE["a"], "b": LARGE["b"]}))))
    assert shared[0].members == first.members


def test_the_same_graphs_give_the_same_members_in_less_room():
    graphs = [
        compiled(str(i), forward=matrices({f"left{i}": LARGE["a"], f"right{i}": LARGE["b"]})) for i in range(3)
    ]
    first, second = ([(one.variant, one.members) for one in share(graphs)] for _ in range(2))
    assert first == second

    def size(variants):
        return sum(map(len, {name: data for one in variants for name, data in one.members.items()}.values()))

    assert size(graphs) - size(share(graphs)) > 0.95 * 2 * (LARGE["a"].nbytes + LARGE["b"].nbytes)
