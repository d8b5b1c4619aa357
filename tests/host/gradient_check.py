"""The gradients that a device gets from the graphs of a step, against PyTorch in float64."""

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import Array, Device, relative_error
from literal_method import compress_layers
from torch import nn

# float32 graphs against float64 autograd through a few wide layers: sums over up to 4,608 products, whose
# rounding is some 1e-6 of the largest entry; 1e-4 is the bound that the project promises.
TOLERANCE = 1e-4


def check_gradients(
    device: Device,
    network: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    projections: Mapping[str, Array],
    parts: Sequence[int],
    compress: Sequence[str] = (),
) -> None:
    """Loss and all gradients of a batch in micro-batches, against autograd through `network`.

    The layers of `compress` take their weight gradients literally by the method, with these projections.
    """
    images, labels = batch
    network = copy.deepcopy(network).double().eval().requires_grad_(False)
    names = [str(value.name) for value in device.step.parameters]
    tensors = dict(network.named_parameters())
    parameters = {name: tensors[name].requires_grad_() for name in names}
    fed = {name: tensor.detach().float().numpy() for name, tensor in parameters.items()}
    compress_layers(network, compress, projections)
    loss = F.cross_entropy(network(images.double()), labels)
    truth = torch.autograd.grad(loss, list(parameters.values()))
    found_loss, found = device.gradients({**fed, **projections}, images.numpy(), labels.numpy(), parts)
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, expected in zip(names, truth, strict=True):
        assert expected.abs().max() > 0, name
        assert relative_error(found[name], expected) < TOLERANCE, name
