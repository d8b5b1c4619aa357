"""The zoo against the published checkpoints, architecture files and photographs."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lance_edge.errors import ModelError
from lance_edge.images import load_image, prepare
from lance_host.zoo import MCUNET_BASE, ZOO
from lance_host.zoo.mcunet import Block, MCUNet

PUBLISHED = [name for name, model in ZOO.items() if model.published is not None]
MCUNETS = [name for name in PUBLISHED if ZOO[name].published.base == MCUNET_BASE]

# Parameters with 1,000 classes (2 for VWW), counted in the published state dicts; 512kb has no checkpoint here.
PARAMETERS = {
    "mcunet": (1000, 729_392),
    "mcunet-320kb": (1000, 737_408),
    "mcunet-10fps-vww": (2, 368_970),
    "mcunet-5fps-vww": (2, 432_746),
    "proxyless-w0.3": (1000, 754_280),
}


def checkpoint(shared, name):
    """The published state dict, where it is at hand."""
    path = shared / "weights" / ZOO[name].published.file
    if not path.exists():
        pytest.skip(f"{path} is absent; download {ZOO[name].published.url} to that place")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    classes, expected = PARAMETERS[name]
    assert sum(p.numel() for p in ZOO[name].build(classes).parameters()) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_loads_strictly(shared, name):
    state = checkpoint(shared, name)
    network = ZOO[name].build(len(state[f"{ZOO[name].head}.bias"]))
    network.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", MCUNETS)
def test_blocks_are_those_of_the_published_architecture_file(shared, name):
    file = ZOO[name].published.file.replace(".pth", ".json")
    published = json.loads((shared / "weights" / file).read_text())
    network = ZOO[name].build(2)
    assert isinstance(network, MCUNet)
    assert published["resolution"] == ZOO[name].preprocessing.resolution
    assert len(published["blocks"]) == len(network.blocks)
    for ours, theirs in zip(network.blocks, published["blocks"], strict=True):
        inner = theirs["mobile_inverted_conv"]
        if inner["name"] == "ZeroLayer":
            assert isinstance(ours, nn.Identity)
            continue
        assert isinstance(ours, Block)
        assert ours.has_shortcut == (theirs["shortcut"] is not None)
        depthwise = ours.mobile_inverted_conv.depth_conv.conv
        width = inner["mid_channels"] or inner["in_channels"] * inner["expand_ratio"]
        assert depthwise.weight.shape == (width, 1, inner["kernel_size"], inner["kernel_size"])
        assert depthwise.stride == (inner["stride"], inner["stride"])
        assert ours.mobile_inverted_conv.point_linear.conv.out_channels == inner["out_channels"]
    epsilons = {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)}
    assert epsilons == {published["bn"]["eps"]}


@pytest.mark.parametrize("name", ZOO)
def test_shape_of_the_logits(name):
    model = ZOO[name]
    side = min(64, model.preprocessing.resolution)  # those of 32 pixels take no others
    logits = model.build(7).eval()(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, 7)


def test_published_weights_know_elephants(shared):
    model = ZOO["mcunet"]
    network = model.build(1000).eval()
    network.load_state_dict(checkpoint(shared, "mcunet"))
    photos = sorted((shared / "data" / "animals" / "elephant").iterdir())
    pixels = np.stack([prepare(load_image(photo), model.preprocessing) for photo in photos])  # [20, R, R, 3]
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        classes = network(images).argmax(1).tolist()
    assert len(photos) == 20
    assert sum(found in (101, 385, 386) for found in classes) >= 15  # tusker, Indian and African elephant


def test_preprocessing_is_the_published_one():
    preprocessing = ZOO["mcunet"].preprocessing
    assert (preprocessing.resolution, preprocessing.resize) == (160, 182)
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)


def test_export_has_plain_operators_only():
    network = ZOO["mcunet-10fps-vww"].build(2).eval()
    program = torch.onnx.export(network, (torch.zeros(1, 3, 64, 64),), dynamo=True, optimize=True)
    operators = {node.op_type for node in program.model.graph}
    assert operators <= {"Conv", "BatchNormalization", "Clip", "Add", "ReduceMean", "GlobalAveragePool", "Gemm"}


def test_a_network_needs_classes():
    with pytest.raises(ModelError, match="mcunet: expected at least 1 class, found 0; check the data's class"):
        ZOO["mcunet"].build(0)
