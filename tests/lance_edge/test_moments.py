"""Streamed second moments against `torch.nn.functional.unfold` and the literal mode products."""

import numpy as np
import pytest
import torch

from lance_edge import moments
from lance_edge.errors import LanceError, NumericalError
from lance_edge.manifest import Layer
from lance_edge.memory import pack
from lance_edge.moments import LayerMoments, mode_sizes, protected_mode, protected_shape
from lance_edge.subspace import orthonormal

# Sums of some thousand products of float32 values of size 1 in float64: the inputs' rounding is all there is.
RELATIVE = 1e-9


def conv_layer(
    channels=6, groups=1, kernel=(3, 2), stride=(2, 1), padding=(1, 0, 1, 2), dilation=(1, 2), size=(7, 9)
):
    """A convolution with everything unequal that can be unequal; padding is top, left, bottom, right."""
    rows, columns = (
        (size[i] + padding[i] + padding[i + 2] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    weight = (2 * groups, channels // groups, *kernel)
    input_shape, output_shape = (channels, *size), (2 * groups, rows, columns)
    return Layer("conv", "conv.weight", weight, input_shape, output_shape, stride, padding, dilation, groups)


def linear_layer(*input_shape):
    weight = (4, input_shape[-1])
    return Layer("fc", "fc.weight", weight, input_shape, (*input_shape[:-1], 4), (), (), (), 1)


def literal_patches(layer: Layer, x: np.ndarray) -> np.ndarray:
    """`[B, g, D, L]` by torch's im2col."""
    top, left, bottom, right = layer.padding
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
    columns = torch.nn.functional.unfold(padded, layer.weight_shape[2:], layer.dilation, 0, layer.stride)
    return columns.reshape(len(x), layer.groups, -1, columns.shape[-1]).double().numpy()


def activation(layer: Layer, samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, *layer.input_shape), dtype=np.float32)


def random_memory(groups: int, rows: int) -> tuple:
    """Bases of different ranks, and I - M M^T of every group."""
    rng = np.random.default_rng(9)
    memory = pack([orthonormal(rng.standard_normal((rows, 1 + g % 3))) for g in range(groups)])
    return memory, np.stack([np.eye(rows) - memory.basis(g) @ memory.basis(g).T for g in range(groups)])


@pytest.mark.parametrize("chunk_values", [1, 500, 1 << 20])
@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize(
    "layer", [conv_layer(), conv_layer(groups=3), conv_layer(groups=6), conv_layer(kernel=(1, 1))]
)
def test_patch_mode_is_im2col(monkeypatch, layer, with_memory, chunk_values):
    monkeypatch.setattr(moments, "CHUNK_VALUES", chunk_values)
    groups, rows = protected_shape(layer, "patch")
    memory, outside = random_memory(groups, rows) if with_memory else (None, np.stack([np.eye(rows)] * groups))
    running = LayerMoments(layer, "patch", 5, memory)
    expected = {0: 0.0, 1: 0.0, 2: 0.0}
    for seed in (0, 1):
        x = activation(layer, 5, seed)
        running.add(x)
        patches = literal_patches(layer, x)
        left = np.einsum("gde,bgel->bgdl", outside, patches)
        expected[1] += np.einsum("bgdl,bgel->gde", patches, patches) / 2
        expected[0] += np.einsum("bgdl,cgdl->bc", left, left) / 2
        expected[2] += np.einsum("bgdl,bgdm->lm", left, left) / 2
    found = running.moments()
    assert found.keys() == expected.keys()
    assert mode_sizes(layer, "patch", 5) == (5, rows, expected[2].shape[0])
    for mode, matrix in expected.items():
        # float32 bases are orthonormal to 1e-7, and the module subtracts where the formula multiplies
        np.testing.assert_allclose(found[mode], matrix, rtol=RELATIVE, atol=1e-5 if with_memory else 1e-9)
        assert np.array_equal(found[mode], np.swapaxes(found[mode], -1, -2))


@pytest.mark.parametrize("chunk_values", [1, 1 << 20])
def test_channel_mode_are_the_four_unfoldings(monkeypatch, chunk_values):
    monkeypatch.setattr(moments, "CHUNK_VALUES", chunk_values)
    layer = conv_layer()
    running = LayerMoments(layer, "channel", 5)
    x = activation(layer, 5, 0)
    running.add(x)
    found = running.moments()
    unfoldings = [np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1).astype(np.float64) for mode in range(4)]
    assert found[1].shape == (1, 6, 6)
    for mode, unfolded in enumerate(unfoldings):
        np.testing.assert_allclose(
            found[mode].reshape(len(unfolded), -1), unfolded @ unfolded.T, rtol=RELATIVE, atol=1e-9
        )


@pytest.mark.parametrize("mode", ["patch", "channel"])
@pytest.mark.parametrize("shape", [(8,), (3, 8)])
def test_linear_layers_have_features_and_tokens(mode, shape):
    layer = linear_layer(*shape)
    running = LayerMoments(layer, mode, 5)
    x = activation(layer, 5, 0)
    running.add(x)
    found = running.moments()
    assert sorted(found) == list(range(x.ndim))
    assert protected_mode(layer) == x.ndim - 1
    assert mode_sizes(layer, mode, 5) == x.shape
    for index in range(x.ndim):
        unfolded = np.moveaxis(x, index, 0).reshape(x.shape[index], -1).astype(np.float64)
        np.testing.assert_allclose(np.squeeze(found[index]), unfolded @ unfolded.T, rtol=RELATIVE, atol=1e-9)


def test_too_many_positions_stay_whole(monkeypatch):
    monkeypatch.setattr(moments, "MOST_POSITIONS", 10)
    running = LayerMoments(conv_layer(), "patch", 5)
    running.add(activation(conv_layer(), 5, 0))
    assert sorted(running.moments()) == [0, 1]


def test_what_is_refused():
    layer = conv_layer()
    running = LayerMoments(layer, "patch", 5)
    with pytest.raises(ValueError, match="no batch was added; add at least one before reading them"):
        running.moments()
    with pytest.raises(
        ValueError, match=r"expected an activation of shape \(5, 6, 7, 9\), found \(4, 6, 7, 9\)"
    ):
        running.add(activation(layer, 4, 0))
    with pytest.raises(
        NumericalError, match="input of conv: expected finite values, found NaN or infinity; check the"
    ):
        running.add(np.full((5, 6, 7, 9), np.inf, np.float32))
    with pytest.raises(LanceError) as raised:
        LayerMoments(conv_layer(groups=3), "channel", 5)
    assert str(raised.value) == (
        "conv: a grouped convolution has no protected subspace in channel mode; use --mode patch"
    )
