"""Methods hosvd and asi against their formulas, written out in PyTorch in float64."""

import math
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_codecs import literal_asi, literal_hosvd, project, rebuild
from torch.nn.grad import conv2d_weight

from lance_device import multilinear
from lance_device.codecs import AsiCodec, Compressed, hosvd
from lance_edge.errors import CheckpointError, LanceError, NumericalError

# Float32 products of some thousand terms, and subspaces whose next singular value is well below: the
# rebuilt activation agrees to about 1e-6 of its largest value.  A wrong mode or order differs by 1e-1.
TOLERANCE = 2e-5

# Joint spatial modes and separate ones, batch contracted first and last, several blocks, a linear layer.
SHAPES = [(16, 24, 5, 5), (12, 6, 13, 11), (64, 40, 3, 4), (10, 7, 20), (30, 50), (4, 9, 1, 1), (40, 3, 48, 50)]


def activation(shape, seed=0):
    """Like a network's: not negative, few strong directions in each mode, energies apart."""
    generator = np.random.default_rng(seed)
    tensor = generator.standard_normal(shape)
    for mode, size in enumerate(shape):
        basis = np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))[
            0
        ]  # the same at all seeds
        scaled = basis * 0.6 ** np.arange(size)
        tensor = np.moveaxis(np.tensordot(scaled, tensor, axes=(1, mode)), 0, mode)
    return np.ascontiguousarray(np.maximum(tensor + 0.1 * tensor.std(), 0), dtype=np.float32)


def relative_error(found, expected):
    expected = np.asarray(expected)
    return np.abs(found - expected).max() / np.abs(expected).max()


def bases_of(codec):
    return [torch.from_numpy(basis).double() for basis in codec.state().values()]


# --- hosvd --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.97])
def test_hosvd_is_the_truncated_svd_of_every_unfolding(shape, energy):
    array = activation(shape)
    bases = literal_hosvd(array, energy)
    core = project(torch.from_numpy(array).double(), bases)
    found = hosvd(array, energy)
    assert found.core.shape == tuple(core.shape)
    assert relative_error(found.rebuild(), rebuild(core, bases)) < TOLERANCE
    # The squares of the core do not depend on the signs of singular vectors.
    assert relative_error(found.core**2, core**2) < TOLERANCE
    whole = 0 if core.shape[0] == shape[0] else None  # then no U0 is kept
    kept = [basis.numel() for mode, basis in enumerate(bases) if mode != whole]
    assert found.nbytes == 4 * (core.numel() + sum(kept))
    assert found.nbytes == found.core.nbytes + sum(map(np.size, found.factors.values())) * 4


def test_all_energy_rebuilds_the_activation_and_leaves_the_batch_mode_alone():
    array = np.random.default_rng(0).standard_normal((4, 6, 5, 3)).astype(np.float32)
    found = hosvd(array, 1.0)
    assert found.core.shape == array.shape
    assert sorted(found.factors) == [1, 2, 3]
    assert found.nbytes == array.nbytes + 4 * (36 + 25 + 9)
    assert relative_error(found.rebuild(), array) < TOLERANCE
    assert relative_error(found.rebuild(slice(1, 3)), array[1:3]) < TOLERANCE


def test_a_dead_layer_keeps_one_direction_of_zeros():
    found = hosvd(np.zeros((3, 4, 5, 5), np.float32), 0.8)
    assert found.core.shape == (1, 1, 1, 1)
    assert not found.rebuild().any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_refuses_activations_that_are_not_finite(value):
    array = activation((4, 6, 5, 5))
    array[1, 2, 3, 4] = value
    codec = AsiCodec(array.shape, (2, 2, 2, 2), seed=0)
    before = codec.state()
    for compress in (lambda: hosvd(array, 0.8), lambda: codec.compress(array)):
        with pytest.raises(NumericalError, match="an activation is not finite, or too large to be squared"):
            compress()
    assert all(np.array_equal(before[name], codec.state()[name]) for name in before)


def test_refuses_an_energy_that_is_no_share():
    with pytest.raises(LanceError, match=r"above 0 and at most 1, found 1\.5"):
        hosvd(activation((4, 6)), 1.5)


# --- asi ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_asi_is_subspace_iteration_from_the_last_batch(shape, share):
    ranks = tuple(max(1, math.ceil(share * size)) for size in shape)
    codec = AsiCodec(shape, ranks, seed=3)
    bases = bases_of(codec)
    for seed in range(3):
        array = activation(shape, seed)
        bases = literal_asi(array, bases)
        core = project(torch.from_numpy(array).double(), bases)
        found = codec.compress(array)
        assert found.core.shape == ranks
        assert relative_error(found.rebuild(), rebuild(core, bases)) < TOLERANCE
        factors = sum(size * rank for size, rank in zip(shape, ranks, strict=True))
        assert found.nbytes == 4 * (math.prod(ranks) + factors)


def test_asi_on_one_batch_again_and_again_finds_its_hosvd():
    array = activation((16, 24, 5, 5))
    best = hosvd(array, 0.9)
    codec = AsiCodec(array.shape, best.core.shape, seed=0)
    errors = [float(np.linalg.norm(codec.compress(array).rebuild() - array)) for _ in range(12)]
    least = float(np.linalg.norm(best.rebuild() - array))
    assert errors[0] < 1.5 * least  # one step from a random start is near already
    assert errors[-1] == pytest.approx(least, rel=1e-3)


def test_asi_with_all_of_the_batch_keeps_no_factor_for_it():
    array = activation((5, 12, 4, 4))
    codec = AsiCodec(array.shape, (5, 3, 2, 2), seed=0)
    found = codec.compress(array)
    assert sorted(found.factors) == [1, 2, 3]
    assert list(codec.state()) == ["U1", "U2", "U3"]
    tensor = torch.from_numpy(array).double()
    bases = [torch.eye(5).double(), *bases_of(codec)]
    assert relative_error(found.rebuild(), rebuild(project(tensor, bases), bases)) < TOLERANCE


def test_asi_survives_dead_layers_and_repeated_images():
    shape = (8, 10, 4, 4)
    codec = AsiCodec(shape, (6, 5, 3, 3), seed=0)
    codec.compress(activation(shape))
    before = codec.state()
    assert not codec.compress(np.zeros(shape, np.float32)).core.any()
    for name, basis in codec.state().items():
        np.testing.assert_allclose(basis, before[name], atol=1e-6)  # nothing seen, nothing forgotten
    repeated = np.repeat(activation((1, *shape[1:])), 8, axis=0)  # rank 1 of 6 in the batch mode
    found = codec.compress(repeated)
    for basis in codec.state().values():
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    rebuilt = found.rebuild()
    assert np.ptp(rebuilt, axis=0).max() < 1e-5 * rebuilt.max()  # equal images stay equal
    assert rebuilt.max() > 0.1 * repeated.max()


def test_asi_resumes_bit_for_bit():
    shape = (8, 10, 4, 4)
    first, second = (AsiCodec(shape, (3, 5, 3, 2), seed=seed) for seed in (0, 1))
    first.compress(activation(shape, 0))
    second.load_state(first.state())
    left, right = (codec.compress(activation(shape, 1)) for codec in (first, second))
    assert left.core.tobytes() == right.core.tobytes()
    assert all(left.factors[mode].tobytes() == right.factors[mode].tobytes() for mode in range(4))


def test_asi_starts_from_its_seed():
    start = {seed: AsiCodec((8, 6), (3, 2), seed).state()["U0"].tobytes() for seed in (0, 1)}
    assert start[0] != start[1]
    assert start[0] == AsiCodec((8, 6), (3, 2), 0).state()["U0"].tobytes()


@pytest.mark.parametrize("ranks", [(2, 3), (0, 3, 2, 2), (2, 3, 2, 5), ()])
def test_asi_refuses_ranks_outside_the_modes(ranks):
    expected = f"for each mode of (4, 6, 4, 4) a rank from 1 to its size, found {ranks}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        AsiCodec((4, 6, 4, 4), ranks, seed=0)


def test_asi_refuses_another_shape():
    codec = AsiCodec((4, 6, 4, 4), (2, 2, 2, 2), seed=0)
    with pytest.raises(
        ValueError, match=r"expected an activation of shape \(4, 6, 4, 4\), found \(3, 6, 4, 4\)"
    ):
        codec.compress(np.zeros((3, 6, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"U1": None}, "ASI subspace U1: expected float32 [6, 2], found none; use a checkpoint of this"),
        (
            {"U1": np.zeros((5, 2), np.float32)},
            "ASI subspace U1: expected float32 [6, 2], found float32 [5, 2];",
        ),
        ({"U0": np.zeros((4, 2))}, "ASI subspace U0: expected float32 [4, 2], found float64 [4, 2];"),
        ({"U0": np.ones((4, 2), np.float32)}, "U0: expected orthonormal columns, found others; use another"),
        ({"U0": np.full((4, 2), np.nan, np.float32)}, "U0: expected orthonormal columns, found others"),
    ],
)
def test_asi_refuses_a_state_that_is_not_its_own(change, message):
    codec = AsiCodec((4, 6), (2, 2), seed=0)
    before = codec.state()
    state = {name: value for name, value in {**before, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        codec.load_state(state)
    assert all(np.array_equal(before[name], codec.state()[name]) for name in before)


# --- both ---------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "pointwise": {"kernel": 1, "stride": 1, "padding": 0, "groups": 1},
    "strided": {"kernel": 3, "stride": 2, "padding": 1, "groups": 1},
    "grouped": {"kernel": 3, "stride": 1, "padding": 1, "groups": 3},
    "depthwise": {"kernel": 5, "stride": 1, "padding": 2, "groups": 12},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("method", ["hosvd", "asi"])
def test_the_gradient_is_that_of_the_rebuilt_activation(kind, method):
    """Autograd through the convolution of the literal rebuilt tensor; ours in micro-batches of three."""
    options = {name: value for name, value in CONVOLUTIONS[kind].items() if name != "kernel"}
    kernel = CONVOLUTIONS[kind]["kernel"]
    array = activation((10, 12, 7, 7))
    tensor = torch.from_numpy(array).double()
    if method == "hosvd":
        found, bases = hosvd(array, 0.8), literal_hosvd(array, 0.8)
    else:
        codec = AsiCodec(array.shape, (4, 5, 3, 3), seed=0)
        bases = literal_asi(array, bases_of(codec))
        found = codec.compress(array)
    weight = torch.zeros(24, 12 // options["groups"], kernel, kernel, dtype=torch.float64, requires_grad=True)
    output = torch.nn.functional.conv2d(rebuild(project(tensor, bases), bases), weight, **options)
    delta = torch.from_numpy(np.random.default_rng(1).standard_normal(output.shape))
    (expected,) = torch.autograd.grad(output, weight, delta)
    total = torch.zeros_like(expected)
    for start in range(0, 10, 3):
        rows = slice(start, start + 3)
        part = torch.from_numpy(found.rebuild(rows)).double()
        total += conv2d_weight(part, weight.shape, delta[rows], **options)
    assert relative_error(total.numpy(), expected) < TOLERANCE


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)


def check_subspaces(found: Compressed, shape):
    for mode, basis in found.factors.items():
        assert basis.shape == (shape[mode], found.core.shape[mode])
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)


@settings(deadline=None)
@given(shapes, st.floats(0.05, 0.999), st.integers(0, 1000))
def test_hosvd_keeps_the_energy_in_every_mode_and_is_a_projection(shape, energy, seed):
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    found = hosvd(array, energy)
    check_subspaces(found, shape)
    for mode, basis in found.factors.items():
        kept = np.square(basis.T @ np.moveaxis(array, mode, 0).reshape(shape[mode], -1)).sum()
        assert kept >= (energy - 1e-5) * np.square(array).sum()  # float32 Gram matrices and sums
    rebuilt = found.rebuild()
    again = multilinear.project(rebuilt, found.factors)
    np.testing.assert_allclose(again, found.core, atol=1e-4)
    np.testing.assert_allclose(found.rebuild(slice(1, 3)), rebuilt[1:3], atol=1e-5)
    assert np.linalg.norm(rebuilt) <= np.linalg.norm(array) * (1 + 1e-5)
    assert found.core.tobytes() == hosvd(array, energy).core.tobytes()


@settings(deadline=None)
@given(shapes, st.integers(0, 1000), st.data())
def test_asi_is_a_projection(shape, seed, data):
    ranks = tuple(data.draw(st.integers(1, size)) for size in shape)
    codec = AsiCodec(shape, ranks, seed)
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    found = codec.compress(array)
    check_subspaces(found, shape)
    np.testing.assert_allclose(multilinear.project(found.rebuild(), found.factors), found.core, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96, 10, 10), (64, 16, 40, 40)])
def test_little_memory_beside_the_activation(shape):
    """Peak of what numpy allocates while it compresses 2.3 and 6.3 MiB; a transposed copy would be 1."""
    array = activation(shape)
    codec = AsiCodec(shape, hosvd(array, 0.8).core.shape, seed=0)
    for compress in (lambda: hosvd(array, 0.8), lambda: codec.compress(array)):
        tracemalloc.start()
        compress()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 0.4 * array.nbytes
