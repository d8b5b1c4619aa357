"""The minimum cut against a search through all sets of values."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_host.autodiff.cut import values_to_save

EXPENSIVE = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Exp", "LogSoftmax", "Softmax", "Erf"}


@dataclass
class Forward:
    """A hand-made forward graph: names, sizes in bytes, and what is given or free."""

    values: dict[str, ir.Value] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    free: set[str] = field(default_factory=set)

    def leaf(self, name: str, size: int, *, given: bool = False, free: bool = False) -> None:
        self._note(ir.Value(name=name), size, given, free)

    def node(self, name: str, op: str, *operands: str, size: int | None, given: bool = False) -> None:
        value = ir.Value(name=name)
        ir.Node("", op, [self.values[operand] for operand in operands], outputs=[value])
        self._note(value, size, given, free=False)

    def constant(self, name: str) -> None:
        self.values[name] = ir.Value(name=name, const_value=ir.tensor([1.0]))
        self.free.add(name)  # known to both phases, as a free value is

    def _note(self, value: ir.Value, size: int | None, given: bool, free: bool) -> None:
        assert value.name is not None
        self.values[value.name] = value
        if size is not None:
            self.sizes[value.name] = size
        if given:
            self.given.add(value.name)
        if free:
            self.free.add(value.name)

    def saved(self, *reads: str) -> set[str]:
        found = values_to_save(
            [self.values[name] for name in reads],
            given={self.values[name] for name in self.given},
            free={self.values[name] for name in self.free},
            sizes={self.values[name]: size for name, size in self.sizes.items()},
        )
        assert len(found) == len(set(found))
        return {str(value.name) for value in found}

    def can_compute(self, name: str, saved: Collection[str]) -> bool:
        """Whether backward has `name`: fed, saved, or cheap to compute from what it has."""
        if name in saved or not self.has_data(name):
            return True
        producer = self.values[name].producer()
        if name in self.given or producer is None or producer.op_type in EXPENSIVE:
            return False
        return all(self.can_compute(str(operand.name), saved) for operand in producer.inputs if operand)

    def has_data(self, name: str) -> bool:
        """Whether a value is computed from more than what both phases are fed anyway."""
        if name in self.free:
            return False
        producer = self.values[name].producer()
        return producer is None or any(
            self.has_data(str(operand.name)) for operand in producer.inputs if operand
        )

    def bytes_of(self, saved: Collection[str]) -> int:
        return sum(self.sizes[name] for name in saved)

    def fewest_bytes(self, reads: Sequence[str]) -> int:
        """Of all sets of values from which `reads` can be computed, the bytes of the smallest."""
        names = sorted(self.sizes)
        counts = range(len(names) + 1)
        subsets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in counts)
        for subset in sorted(subsets, key=self.bytes_of):
            if all(self.can_compute(name, subset) for name in reads):
                return self.bytes_of(subset)
        raise AssertionError(f"{reads} cannot be computed even from {names}")


@st.composite
def forwards(draw: st.DrawFn) -> tuple[Forward, list[str]]:
    """A random graph of up to 9 values, cheap and expensive, some given, free or without a known size."""
    graph = Forward()
    size = st.integers(1, 6)  # small, so that ties and near ties are frequent
    for index in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["given", "free", "plain"]))
        graph.leaf(f"leaf{index}", draw(size), given=kind == "given", free=kind == "free")
    for index in range(draw(st.integers(1, 6))):
        operands = draw(st.lists(st.sampled_from(sorted(graph.values)), min_size=1, max_size=2))
        op = draw(st.sampled_from(["Add", "Relu", "Mul", "Conv", "MatMul", "Exp"]))
        # A value without a known size cannot be saved; an expensive one always has a size here.
        known = op in EXPENSIVE or draw(st.integers(0, 5)) > 0
        graph.node(f"v{index}", op, *operands, size=draw(size) if known else None)
        if known and graph.has_data(f"v{index}") and draw(st.integers(0, 5)) == 0:
            graph.given.add(f"v{index}")
    reads = draw(st.lists(st.sampled_from(sorted(graph.values)), min_size=1, max_size=4, unique=True))
    return graph, reads


@settings(max_examples=200, deadline=None, derandomize=True)
@given(drawn=forwards())
def test_the_fewest_bytes_of_all_sets_that_suffice(drawn: tuple[Forward, list[str]]) -> None:
    graph, reads = drawn
    saved = graph.saved(*reads)
    assert all(graph.can_compute(name, saved) for name in reads)
    assert all(graph.has_data(name) for name in saved)
    assert graph.bytes_of(saved) == graph.fewest_bytes(reads)


def test_many_small_values_beat_one_that_is_a_byte_larger() -> None:
    graph, parts = Forward(), [f"part{index}" for index in range(8)]
    for part in parts:
        graph.leaf(part, 10)
    graph.node("whole", "Concat", *parts, size=81)
    assert graph.saved("whole") == set(parts)


def test_a_relu_is_recomputed_from_its_smaller_input_and_saved_where_it_is_smaller() -> None:
    for input_bytes, output_bytes, expected in ((4, 8, {"x"}), (8, 4, {"y"})):
        graph = Forward()
        graph.leaf("x", input_bytes)
        graph.node("y", "Relu", "x", size=output_bytes)
        assert graph.saved("y") == expected


def test_expensive_operators_are_not_repeated_however_small_their_input() -> None:
    for op in sorted(EXPENSIVE):
        graph = Forward()
        graph.leaf("x", 1)
        graph.node("y", op, "x", size=1000)
        graph.node("z", "Relu", "y", size=1000)
        assert graph.saved("z") in ({"y"}, {"z"})


def test_a_mask_is_saved_rather_than_the_activation_it_is_made_of() -> None:
    """Conv -> Relu -> mask: backward of the activation reads one byte a value, not four."""
    graph = Forward()
    graph.constant("zero")
    graph.leaf("x", 64, given=True)
    graph.node("conv", "Conv", "x", size=128)
    graph.node("relu", "Relu", "conv", size=128)
    graph.node("mask", "Greater", "relu", "zero", size=32)
    assert graph.saved("mask") == {"mask"}
    assert graph.saved("mask", "relu") == {"relu"}  # the mask comes back from it


def test_prefix_outputs_are_preferred_to_copies_of_them() -> None:
    graph = Forward()
    graph.leaf("boundary", 64, given=True)
    graph.node("copy", "Reshape", "boundary", size=64)
    graph.node("again", "Relu", "copy", size=64)
    assert graph.saved("again") == {"boundary"}


def test_a_prefix_output_is_not_computed_again_from_what_the_prefix_read() -> None:
    graph = Forward()
    graph.leaf("images", 1)
    graph.node("boundary", "Relu", "images", size=100, given=True)
    graph.node("y", "Neg", "boundary", size=100)
    assert graph.saved("y") == {"boundary"}


def test_of_equal_bytes_the_fewest_tensors() -> None:
    graph = Forward()
    graph.leaf("a", 8)
    graph.leaf("b", 8)
    graph.node("sum", "Concat", "a", "b", size=16)
    assert graph.saved("sum") == {"sum"}


def test_free_values_and_constants_are_never_saved() -> None:
    graph = Forward()
    graph.leaf("weight", 1, free=True)
    graph.constant("scale")
    graph.node("folded", "Mul", "weight", "scale", size=1)
    assert graph.saved("weight", "scale", "folded") == set()


def test_one_value_serves_several_readers() -> None:
    graph = Forward()
    graph.leaf("x", 10)
    graph.node("left", "Relu", "x", size=8)
    graph.node("right", "Neg", "x", size=8)
    assert graph.saved("left", "right") == {"x"}
    assert graph.saved("left") == {"left"}


def test_an_expensive_value_of_unknown_size_is_recomputed_too() -> None:
    graph = Forward()
    graph.leaf("x", 100)
    graph.node("y", "MatMul", "x", size=None)
    graph.node("z", "Relu", "y", size=None)
    assert graph.saved("z") == {"x"}


def test_a_value_of_unknown_size_is_recomputed() -> None:
    graph = Forward()
    graph.leaf("x", 100)
    graph.node("flat", "Reshape", "x", size=None)
    assert graph.saved("flat") == {"x"}
