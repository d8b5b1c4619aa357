"""What `--layers` selects, and what `lance-host layers` lists."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_networks import CONVS, HEAD, ConvHead, small_net
from torch import nn
from torch.nn.utils import parametrizations

from lance_edge.errors import ModelError
from lance_host.capture import capture
from lance_host.layers import exactly, layer_modules, list_layers, select_layers
from lance_host.network import NetworkRequest, load_network
from lance_host.search_tables import candidate_table

BLOCK = tuple(name for name in CONVS if name.startswith("down."))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", CONVS),
        ("down.first.0", ("down.first.0",)),
        ("down", BLOCK),
        ("down.*", BLOCK),
        ("down.s*.0", ("down.second.0", "down.shortcut.0")),
        ("*.0", CONVS),
        (
            "down.shortcut.0,stem.0",
            ("stem.0", "down.shortcut.0"),
        ),  # in module order, whatever the order asked for
        (" stem , down.first ", ("stem.0", "down.first.0")),
        ("down,down.*", BLOCK),
        ("residual.[de]*", ("residual.expand.0", "residual.depth.0")),
    ],
)
def test_names_and_globs(selection: str, expected: tuple[str, ...]) -> None:
    assert select_layers(small_net(), selection, HEAD) == list(expected)


@pytest.mark.parametrize(
    "selection", ["layer4", "down,layer4.*", "down,", "Down.first.0", HEAD, "residual.expand.1"]
)
def test_a_name_that_no_convolution_has(selection: str) -> None:
    with pytest.raises(ModelError) as caught:
        select_layers(small_net(), selection, HEAD)
    message = str(caught.value)
    assert message.startswith(f"--layers {selection}: expected a count such as 4, several such as 1-10 or 2,4,")
    assert message.endswith("lance-host layers lists them")


def numbered() -> nn.Sequential:
    """Layers `0` to `12`, every third a convolution, and `13.0`, `13.1` in a block."""
    modules = [nn.Conv2d(3, 3, 1) if index % 3 == 0 else nn.ReLU() for index in range(13)]
    return nn.Sequential(*modules, nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("[12]", ["12"]),  # neither the glob for 1 or 2, nor the last twelve
        ("[0],[9]", ["0", "9"]),
        ("[13]", ["13.0", "13.1"]),
        ("13.1", ["13.1"]),
        ("[369]", ["3", "6", "9"]),  # no such name: a glob
        ("2", ["13.0", "13.1"]),
    ],
)
def test_names_that_are_numbers_stand_in_brackets(selection: str, expected: list[str]) -> None:
    assert select_layers(numbered(), selection) == expected
    assert select_layers(numbered(), exactly(expected)) == expected


def test_brackets_are_suggested_for_names_that_are_numbers() -> None:
    with pytest.raises(ModelError, match=r"only 7 such layers; ask for fewer, or for the layer .* '\[9\]'"):
        select_layers(numbered(), "9")
    with pytest.raises(ModelError, match=r"names such as .*\[12\]"):
        select_layers(numbered(), "[123456]x")


def test_close_names_are_suggested() -> None:
    with pytest.raises(ModelError, match=r"names such as down.first.0.* no layer is called 'down.fist.0'"):
        select_layers(small_net(), "down.fist.0")


def test_the_head_is_never_among_the_layers() -> None:
    network = ConvHead()
    assert select_layers(network, "all", head="classifier.1") == ["features.0", "features.2", "unused"]
    assert select_layers(network, "1", head="classifier.1") == ["unused"]
    with pytest.raises(ModelError, match="no layer is called 'classifier'"):
        select_layers(network, "classifier", head="classifier.1")


def test_counts_and_names_are_of_the_layers_that_run() -> None:
    """An auxiliary classifier that only training uses is neither listed nor counted."""
    path = Path(__file__).parent / "small_networks.py"
    loaded = functools.partial(load_network, classes=4, say=lambda line: None, progress=lambda done, size: None)
    request = NetworkRequest(f"{path}:ConvHead", layers="1")
    assert loaded(request).selections == (("features.2",),)
    with pytest.raises(ModelError, match="no layer is called 'unused', or it takes no part"):
        loaded(replace(request, layers="unused"))
    with pytest.raises(ModelError, match="--layers 3: the network has only 2 such layers"):
        loaded(replace(request, layers="3"))


class Auxiliary(nn.Module):
    """As GoogLeNet: a second classifier in the middle, of training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 5)
        self.aux = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        logits: torch.Tensor = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        return (logits, self.aux(x)) if self.training else logits


def test_an_auxiliary_classifier_is_no_layer_and_no_head() -> None:
    request = NetworkRequest(f"{__file__}:Auxiliary", layers="2")
    network = load_network(request, 4, lambda line: None, lambda done, size: None)
    assert (network.head, network.selections) == ("fc", (("stem", "conv"),))
    captured = capture(network.module, 33, network.selections[0], network.head)
    assert [layer.name for layer in captured.layers] == ["stem", "conv"]


def test_a_layer_whose_weight_is_computed_is_none() -> None:
    network = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1))
    assert layer_modules(network) == ["1"]


def test_the_list_has_what_runs_with_shapes_and_bytes() -> None:
    first, second = list_layers(ConvHead().eval(), (3, 17, 17), "classifier.1")
    assert (first.name, first.kind, first.weight_shape) == ("features.0", "3x3, stride 2", (6, 3, 3, 3))
    assert (second.name, second.kind, second.weight_shape) == ("features.2", "3x3, 2 groups", (8, 3, 3, 3))
    assert (first.input_shape, second.input_shape) == ((3, 17, 17), (6, 9, 9))
    assert (first.parameters, second.parameters) == (162, 216)
    assert second.bp_bytes(10) == 4 * 10 * 6 * 9 * 9


def test_the_table_counts_from_the_end_and_adds_up() -> None:
    network = small_net()
    candidates = list_layers(network, (3, 17, 17), HEAD)
    lines = candidate_table(candidates, 128, HEAD).splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith(CONVS)}
    assert list(rows) == list(CONVS)
    assert [line.split()[1] for line in rows.values()] == ["7", "6", "5", "4", "3", "2", "1"]
    # 8 x 9 x 9 and 12 x 5 x 5 float32 values of 128 samples: 324 KiB and 150 KiB
    cells = {name: " ".join(line.split()[2:]) for name, line in rows.items()}
    assert cells["down.shortcut.0"] == "1x1, stride 2 12x8x1x1 96 8x9x9 324.00 KiB 324.00 KiB"
    assert cells["down.second.0"].endswith(" 12x5x5 150.00 KiB 474.00 KiB")
    assert "3x3, dilation 2, 3 groups" in rows["down.second.0"]
    assert "depthwise" in rows["residual.depth.0"]
    assert f"The classifier {HEAD} is replaced and always trains." in lines[-2]
    assert "--layers: a count from the end, conv:K, linear:K" in lines[-1]


def test_the_table_without_a_head_and_without_layers() -> None:
    candidates = list_layers(small_net(), (3, 17, 17), HEAD)
    assert "is not trained (--head none)" in candidate_table(candidates, 1, None)
    assert candidate_table([], 1, HEAD).endswith("--layers 0 trains the classifier alone.")
