"""Biases and norms that train beside the weights: gradients where batch-norm is folded, and where it is not."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gradient_check import TOLERANCE, check_gradients
from graph_runner import Device, random_projections, relative_error
from literal_method import ranks_of
from small_networks import CLASSES, HEAD, RESOLUTION, small_net
from torch import nn

from lance_host.capture import Captured, capture, clone
from lance_host.extras import Extras, norm_modules
from lance_host.step import differentiate
from lance_host.verify import scale_gradient

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.xdist_group("captures")]

BATCH, PARTS = 6, (4, 2)
# The frozen convolution between them keeps its norm: `down.second.1` cannot be folded.
LAYERS = ("residual.project.0", "down.first.0", "down.shortcut.0")
NORMS = ("residual.project.1", "down.first.1", "down.second.1", "down.shortcut.1")
BIASES = ("down.first.0.bias",)  # the others have none


@functools.cache
def _captured() -> Captured:
    network = small_net()
    return capture(network, RESOLUTION, LAYERS, HEAD, Extras(True, norm_modules(network)))


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def test_what_trains_lies_behind_the_first_trained_layer() -> None:
    names = [str(value.name) for value in _captured().parameters]
    weights, head = [f"{name}.weight" for name in LAYERS], [f"{HEAD}.weight", f"{HEAD}.bias"]
    affine = [f"{norm}.{part}" for norm in NORMS for part in ("weight", "bias")]
    assert names == [*weights, *head, *BIASES, *affine]


def test_folded_norms_are_those_of_trained_convolutions() -> None:
    assert _captured().norms == {
        "residual.project.0": "residual.project.1",
        "down.first.0": "down.first.1",
        "down.shortcut.0": "down.shortcut.1",
    }


@pytest.mark.parametrize("extras", [Extras(biases=True), Extras(norms=NORMS), Extras()])
def test_each_is_a_choice_of_its_own(extras: Extras) -> None:
    captured = capture(small_net(), RESOLUTION, LAYERS, HEAD, extras)
    names = {str(value.name) for value in captured.parameters}
    assert names.issuperset(BIASES) == extras.biases
    assert names.issuperset(f"{norm}.weight" for norm in NORMS) == bool(extras.norms)
    device = Device.of(differentiate(captured, "bp", {}, BATCH))
    check_gradients(device, small_net(), random_batch(), {}, PARTS)


def test_bp_gradients_are_those_of_autograd() -> None:
    device = Device.of(differentiate(clone(_captured()), "bp", {}, BATCH))
    check_gradients(device, small_net(), random_batch(), {}, PARTS)


def test_of_compressed_layers_only_the_scale_of_a_folded_norm_is_approximated() -> None:
    """It is what the norm's own formula gives for the convolution of the rebuilt input; all else is exact."""
    captured, network = clone(_captured()), small_net().double().requires_grad_(False)
    ranks, rng = ranks_of(captured.layers, BATCH, 0.5, 0.5), np.random.default_rng(0)
    projections = {}
    for layer in captured.layers:
        projections |= random_projections(rng, layer.name, BATCH, layer.input_shape, ranks[layer.name])
    folded = captured.norms
    names = [str(value.name) for value in captured.parameters]
    device = Device.of(differentiate(captured, "lance", ranks, BATCH))

    images, labels = random_batch()
    truth, inputs, slopes = _autograd(network, names, images.double(), labels, [*folded, *folded.values()])
    fed = {name: value.detach().float().numpy() for name, value in network.named_parameters() if name in names}
    _, found = device.gradients({**fed, **projections}, images.numpy(), labels.numpy(), PARTS)
    for layer, norm in folded.items():
        rebuilt = inputs[layer]
        for mode in range(4):
            basis = torch.from_numpy(projections[f"{layer}/U{mode}"]).double()
            rebuilt = (rebuilt.movedim(mode, -1) @ basis @ basis.T).movedim(-1, mode)
        y = network.get_submodule(layer)(rebuilt)
        bare = network.get_submodule(norm)
        assert isinstance(bare, nn.BatchNorm2d)
        unit = F.batch_norm(y, bare.running_mean, bare.running_var, eps=bare.eps)
        expected = (slopes[norm] * unit).sum((0, 2, 3))
        assert relative_error(expected.numpy(), truth[f"{norm}.weight"]) > 0.01, "it is an approximation"
        truth[f"{norm}.weight"] = expected
        checked = scale_gradient(network, norm, y, slopes[norm])
        assert relative_error(checked.numpy(), expected) < 1e-10
    for name in set(names) - {f"{layer}.weight" for layer in folded}:
        assert relative_error(found[name], truth[name]) < TOLERANCE, name


def _autograd(
    network: nn.Module, names: list[str], images: torch.Tensor, labels: torch.Tensor, tapped: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of parameters; inputs and output gradients of modules."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name in tapped:

        def keep(_: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = x[0].detach(), y

        network.get_submodule(name).register_forward_hook(keep)
    parameters = {name: value for name, value in network.named_parameters() if name in names}
    for value in parameters.values():
        value.requires_grad_()
    loss = F.cross_entropy(network(images), labels)
    kept = dict(outputs)
    results = torch.autograd.grad(loss, [*parameters.values(), *kept.values()])
    for value in parameters.values():
        value.requires_grad_(False)
    slopes = dict(zip(kept, results[len(parameters) :], strict=True))
    return dict(zip(parameters, results, strict=False)), inputs, slopes
