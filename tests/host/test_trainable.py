"""What calibration says when an operator behind the layers cannot be differentiated."""

import functools

import pytest
import torch
from torch import nn

from lance_edge.errors import ModelError
from lance_host.capture import Captured, capture, clone
from lance_host.extras import Extras
from lance_host.scopes import module_of
from lance_host.trainable import check_trainable

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.xdist_group("captures")]

LAYERS = ("first", "second", "third.conv", "fourth")


class Wave(nn.Module):
    """Something that no rule differentiates."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.atanh(0.1 * x)


class Blocked(nn.Module):
    """Four convolutions; between the second and the last two an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.middle = nn.Sequential(nn.ReLU(), Wave())
        self.third = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1)})
        self.fourth, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.middle(self.second(self.first(x)))
        logits: torch.Tensor = self.head(self.fourth(self.third["conv"](y)).mean((2, 3)))
        return logits


@functools.cache
def _captured(layers: tuple[str, ...]) -> Captured:
    torch.manual_seed(0)
    return capture(Blocked().eval(), 8, layers, "head")


@pytest.mark.parametrize(
    ("layers", "selection", "works"),
    [(LAYERS, "4", "2"), (LAYERS[1:], "3", "2"), (LAYERS, "pointwise:4", "pointwise:2")],
)
def test_the_operator_its_module_and_what_works_are_named(
    layers: tuple[str, ...], selection: str, works: str
) -> None:
    with pytest.raises(ModelError) as error:
        check_trainable(_captured(layers), selection)
    message = str(error.value)
    assert message.startswith(f"--layers {selection}: operator Atanh (node node_atanh, output atanh) has no")
    assert "backward rule in module middle.1, and the gradient of second passes it" in message
    assert message.endswith(f"of these layers the last 2 can be trained: --layers {works}")


def test_layers_given_by_name_are_answered_by_name() -> None:
    with pytest.raises(ModelError, match=r"the last 2 can be trained: --layers third.conv,fourth$"):
        check_trainable(_captured(LAYERS), "first,second,third.*,fourth")


@pytest.mark.parametrize("layers", [(), LAYERS[2:], LAYERS[3:]])
def test_what_it_says_works_works(layers: tuple[str, ...]) -> None:
    check_trainable(_captured(layers), str(len(layers)))


def test_the_captured_graph_is_left_as_it_was() -> None:
    graph = _captured(LAYERS[2:])
    before = [(node.op_type, node.name) for node in graph.model.graph]
    check_trainable(graph, "2")
    assert [(node.op_type, node.name) for node in graph.model.graph] == before


def test_a_use_that_a_rule_does_not_cover_is_a_problem_too() -> None:
    graph = clone(_captured(LAYERS[2:]))
    (mean,) = [node for node in graph.model.graph if node.op_type == "ReduceMean"]
    axes = mean.inputs[1]
    assert axes is not None
    axes.const_value, axes.name = None, "computed"
    with pytest.raises(ModelError, match=r"computed: expected a constant, found a computed value.*--layers 0$"):
        check_trainable(graph, "2")


class BlockedAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.wave = nn.Conv2d(3, 4, 1), nn.Linear(4, 3), Wave()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.wave(self.head(self.conv(x).mean((2, 3))))
        return logits


def test_a_head_that_cannot_be_trained_is_named() -> None:
    graph = capture(BlockedAtTheEnd().eval(), 8, ["conv"], "head")
    with pytest.raises(
        ModelError, match=r"head.weight cannot be trained: operator Atanh .* in module wave; use"
    ):
        check_trainable(graph, "1")


def test_the_module_of_a_node_is_its_innermost() -> None:
    modules = {node.op_type: module_of(node) for node in _captured(LAYERS).model.graph}
    assert modules["Atanh"] == "middle.1"
    assert modules["Relu"] == "middle.0"
    assert modules["LogSoftmax"] is None  # the loss is no part of the network


def test_biases_and_norms_do_not_hide_how_many_layers_can_be_trained() -> None:
    graph = capture(Blocked().eval(), 8, LAYERS, "head", Extras(biases=True))
    with pytest.raises(ModelError, match=r"of these layers the last 2 can be trained: --layers 2$"):
        check_trainable(graph, "4")
