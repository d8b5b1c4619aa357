"""The gradient angle of figures 2 and 4, against LANCE written out as an autograd function."""

import math

import numpy as np
import pytest
import torch
from literal_method import compress_layers
from small_networks import captured, random_batch, small_net

from lance_edge.names import projection_name
from lance_host.layers import layer_modules
from lance_host.reproduce.gradients import angle_deg, batch_angle

BATCH = 6


@pytest.fixture(scope="module")
def layers():
    names = [name for name in layer_modules(small_net()) if name != "head"][-3:]
    return captured(names).layers


def gradients(network, layers, images, labels):
    weights = [network.get_submodule(layer.name).weight.requires_grad_() for layer in layers]
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)])


def test_the_angle_is_that_of_autograds_gradients(layers):
    images, labels = random_batch(3, BATCH)
    generator = torch.Generator().manual_seed(4)
    projections = {
        projection_name(layer.name, mode): torch.linalg.qr(
            torch.randn(size, -(-size // 2), generator=generator)
        ).Q
        for layer in layers
        for mode, size in enumerate((BATCH, *layer.input_shape))
    }
    found = batch_angle(small_net(), layers, projections, images.numpy(), labels.numpy())
    exact = gradients(small_net(), layers, images, labels)
    network = small_net()
    compress_layers(network, [layer.name for layer in layers], {n: u.numpy() for n, u in projections.items()})
    compressed = gradients(network, layers, images, labels)
    cosine = float(exact.double() @ compressed.double() / (exact.double().norm() * compressed.double().norm()))
    # float32 gradients agree to some 1e-6; the angle of 60 to 90 degrees to 1e-4 of a degree.
    assert 5 < found < 120
    assert found == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-3)


def test_whole_subspaces_give_no_angle(layers):
    images, labels = random_batch(5, BATCH)
    whole = {
        projection_name(layer.name, mode): torch.eye(size)
        for layer in layers
        for mode, size in enumerate((BATCH, *layer.input_shape))
        if mode != 0  # a mode without a projection is whole, too
    }
    # acos near 1 turns a relative error of 1e-7 into 0.03 degrees
    assert batch_angle(small_net(), layers, whole, images.numpy(), labels.numpy()) < 0.1


@pytest.mark.parametrize(
    ("second", "expected"),
    [((2.0, 0.0), 0), ((0.0, 3.0), 90), ((-1.0, 0.0), 180), ((0.0, 0.0), 90), ((1, 1), 45)],
)
def test_angles_of_vectors(second, expected):
    assert angle_deg(torch.tensor([1.0, 0.0]), torch.tensor(np.array(second))) == pytest.approx(expected)
