"""Gradient errors of a whole grid of ranks against one literal projection and convolution each."""

import itertools

import pytest
import torch
from small_layers import conv_layer, linear_layer

from lance_host import gradient_error
from lance_host.gradient_error import gradient_errors

BATCH = 7

# channels, size, out channels, then the convolution
LAYERS = {
    "pointwise": conv_layer(6, (5, 5), 8),
    "spatial": conv_layer(6, (7, 5), 8, 3, padding=1),
    "strided": conv_layer(6, (8, 9), 8, 3, stride=2, padding=1),
    "strided pointwise": conv_layer(6, (8, 8), 4, 1, stride=2),
    "unpadded, dilated": conv_layer(4, (9, 8), 5, 3, dilation=2),
    "depthwise": conv_layer(6, (7, 7), 6, 3, padding=1, groups=6),
    "depthwise with two outputs": conv_layer(4, (6, 6), 8, 5, padding=2, groups=4),
    "grouped": conv_layer(6, (8, 8), 12, 3, stride=2, padding=1, groups=3),
    "one position": conv_layer(5, (1, 1), 3),
    "linear over tokens": linear_layer((6, 9), 5),
    "linear": linear_layer((8,), 5),
}


def random_case(layer, seed=0):
    """Input, output gradient and an orthonormal basis for each mode."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *layer.input_shape, generator=generator)
    dy = torch.randn(BATCH, *layer.output_shape, generator=generator)
    bases = [torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for size in x.shape]
    return x, dy, bases


def grids_of(shape):
    return tuple(tuple(sorted({1, max(1, size // 3), max(1, size // 2), size})) for size in shape)


def autograd_gradient(layer, x, dy):
    """The gradient of a layer's weight by autograd, in float64."""
    weight = torch.zeros(layer.weight_shape, dtype=torch.float64, requires_grad=True)
    if layer.is_linear:
        return torch.autograd.grad(torch.nn.functional.linear(x, weight), weight, dy.double())[0]
    (padding,) = {layer.padding[:2]} & {layer.padding[2:]}
    y = torch.nn.functional.conv2d(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)
    return torch.autograd.grad(y, weight, dy.double())[0]


def literal_distance(layer, x, dy, bases, ranks):
    projected = x.double()
    for mode, (basis, rank) in enumerate(zip(bases, ranks, strict=True)):
        kept = basis[:, :rank].double()
        projected = torch.movedim(torch.tensordot(kept @ kept.T, projected, dims=([1], [mode])), 0, mode)
    difference = autograd_gradient(layer, projected, dy) - autograd_gradient(layer, x.double(), dy)
    return float(torch.linalg.vector_norm(difference))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_entry_is_the_distance_of_one_projected_gradient(kind):
    layer = LAYERS[kind]
    x, dy, bases = random_case(layer)
    grids = grids_of(x.shape)
    distances, norm = gradient_errors(layer, x, dy, bases, grids)
    assert norm == pytest.approx(float(autograd_gradient(layer, x.double(), dy).norm()), rel=1e-5)
    for place in itertools.product(*(range(len(grid)) for grid in grids)):
        ranks = [grid[index] for grid, index in zip(grids, place, strict=True)]
        # Float32 sums of some hundred terms: 1e-6 of the gradient; a wrong term would be about 1e-1.
        expected = literal_distance(layer, x, dy, bases, ranks)
        assert float(distances[place]) == pytest.approx(expected, abs=1e-5 * norm)


@pytest.mark.parametrize("kind", ["spatial", "depthwise", "grouped"])
def test_little_working_memory_changes_nothing(kind, monkeypatch):
    layer = LAYERS[kind]
    case = random_case(layer)
    grids = grids_of(case[0].shape)
    whole, _ = gradient_errors(layer, *case, grids)
    monkeypatch.setattr(gradient_error, "WORKING_VALUES", 500)  # one row, a few output channels at a time
    parts, _ = gradient_errors(layer, *case, grids)
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pointwise", "depthwise"])
def test_ranks_above_the_grid_are_lost_not_kept(kind):
    layer = LAYERS[kind]
    x, dy, bases = random_case(layer)
    distances, norm = gradient_errors(layer, x, dy, bases, ((2,), (3,), (1, 2), (2,)))
    assert distances.shape == (1, 1, 2, 1)
    for place, height in enumerate((1, 2)):
        expected = literal_distance(layer, x, dy, bases, (2, 3, height, 2))
        assert float(distances[0, 0, place, 0]) == pytest.approx(expected, abs=1e-5 * norm)
