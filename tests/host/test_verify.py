import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lance_edge.errors import ModelError
from lance_edge.names import projection_name
from lance_host.capture import capture
from lance_host.compile import compile_variant
from lance_host.hosvd import Spectrum
from lance_host.ranks import ranks_by_energy
from lance_host.verify import TOLERANCE, check_samples_apart, rebuild, run_graphs, verify

RESOLUTION, CLASSES, BATCH, IMAGES = 12, 3, 8, 5
LAYERS = ("spatial", "depthwise", "pointwise")
METHODS = ("bp", "lance")


class SmallNetwork(nn.Module):
    """A frozen stem, then a trained convolution of each kind, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.spatial = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False)
        self.pointwise = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = torch.relu(self.norm(self.spatial(x)))
        x = self.pointwise(torch.relu(self.depthwise(x)))
        return self.head(torch.relu(x).mean((2, 3)))


def small_network() -> SmallNetwork:
    torch.manual_seed(0)
    network = SmallNetwork()
    with torch.no_grad():
        network.norm.weight.uniform_(0.5, 2.0)
        network.norm.running_var.uniform_(0.5, 2.0)
        network.norm.running_mean.uniform_(-0.2, 0.2)
    return network.eval()


def random_spectrum(size: int, rng: np.random.Generator) -> Spectrum:
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return Spectrum(0.6 ** np.arange(size), basis)


class Case:
    """A compiled network with images and projections, ready to be verified."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.network = small_network()
        self.captured = capture(self.network, RESOLUTION, LAYERS, "head")
        self.spectra = {
            layer.name: tuple(random_spectrum(size, rng) for size in (BATCH, *layer.input_shape))
            for layer in self.captured.layers
        }
        eigenvalues = {name: [one.eigenvalues for one in modes] for name, modes in self.spectra.items()}
        self.compiled = {
            method: compile_variant(self.captured, method, ranks, self.spectra, BATCH)
            for method, ranks in (("bp", {}), ("lance", ranks_by_energy(eigenvalues, 0.8)))
        }
        self.projections = {
            projection_name(plan.layer, mode): self.spectra[plan.layer][mode].projection(rank)
            for plan in self.compiled["lance"].variant.layers
            for mode, rank in enumerate(plan.ranks)
        }
        self.weights = {name: value.detach().numpy() for name, value in self.network.state_dict().items()}
        self.images = rng.standard_normal((IMAGES, 3, RESOLUTION, RESOLUTION)).astype(np.float32)
        self.labels = rng.integers(0, CLASSES, IMAGES)

    def verify(self, compiled):
        arguments = (self.weights, self.projections, self.images, self.labels)
        return verify(self.network, self.captured.layers, compiled, *arguments)


@pytest.fixture(scope="module")
def case():
    return Case()


# --- rebuild ---


def test_rebuild_is_the_kronecker_product_of_the_projectors():
    # vec(A~) = (U0 U0^T (x) U1 U1^T (x) U2 U2^T (x) U3 U3^T) vec(A): 180 x 180, no tensor algebra involved.
    rng = np.random.default_rng(1)
    shape, ranks = (3, 4, 5, 3), (2, 3, 2, 1)
    bases = [np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in zip(shape, ranks, strict=True)]
    activation = rng.standard_normal(shape)
    projector = functools.reduce(np.kron, [basis @ basis.T for basis in bases])
    expected = (projector @ activation.ravel()).reshape(shape)
    found = rebuild(torch.from_numpy(activation), dict(enumerate(bases))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_rebuild_of_fewer_samples_than_a_batch_uses_their_rows_of_the_batch_basis():
    rng = np.random.default_rng(2)
    shape = (4, 2, 3, 3)
    bases = [np.linalg.qr(rng.standard_normal((n, 2)))[0] for n in shape]
    batch = np.zeros(shape)
    batch[:3] = rng.standard_normal((3, *shape[1:]))  # the fourth sample is not there: zero
    whole = rebuild(torch.from_numpy(batch), dict(enumerate(bases)))
    part = rebuild(torch.from_numpy(batch[:3]), dict(enumerate(bases)))
    np.testing.assert_allclose(part.numpy(), whole.numpy()[:3], atol=1e-12)


def test_rebuild_with_full_ranks_changes_nothing():
    rng = np.random.default_rng(3)
    activation = rng.standard_normal((2, 3, 4, 5))
    bases = [np.linalg.qr(rng.standard_normal((n, n)))[0] for n in activation.shape]
    np.testing.assert_allclose(
        rebuild(torch.from_numpy(activation), dict(enumerate(bases))).numpy(), activation, atol=1e-12
    )


# --- verify ---


@pytest.mark.parametrize("method", METHODS)
def test_sound_graphs_agree_to_rounding(case, method):
    # float32 sums of a few hundred terms: 1e-5 of the largest entry is a generous bound.
    assert case.verify(case.compiled[method]) < 1e-5


def test_compression_is_really_under_test(case):
    """The ranks are cut, so that LANCE's gradients are far from the plain ones: verify tells them apart."""
    values = {**case.weights, **case.projections}
    plain, compressed = (
        run_graphs(case.compiled[method], values, case.images, case.labels) for method in METHODS
    )
    for layer in LAYERS:
        difference = np.abs(plain[f"{layer}.weight/grad"] - compressed[f"{layer}.weight/grad"]).max()
        assert difference > 10 * TOLERANCE * np.abs(plain[f"{layer}.weight/grad"]).max()
    lance = case.compiled["lance"]
    claims_bp = replace(lance, variant=replace(lance.variant, layers=case.compiled["bp"].variant.layers))
    with pytest.raises(ModelError, match="differs from PyTorch"):
        case.verify(claims_bp)


def _float_constants(compiled):
    """(role, name) of every float constant with values in it."""
    for role in ("prefix", "forward", "backward", "gradient"):
        if role in compiled.variant.graphs:
            graph = onnx.load_from_string(compiled.graph(role)).graph
            for tensor in graph.initializer:
                if tensor.data_type == onnx.TensorProto.FLOAT and np.any(numpy_helper.to_array(tensor)):
                    yield role, tensor.name


def _corrupt(compiled, role, name, change):
    model = onnx.load_from_string(compiled.graph(role))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))
    members = {**compiled.members, compiled.variant.graphs[role][0]: model.SerializeToString()}
    return replace(compiled, members=members)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_that_is_five_percent_off_is_found_wherever_it_is(case, method):
    compiled = case.compiled[method]
    constants = list(_float_constants(compiled))
    assert {"prefix", "forward", "backward"} <= {role for role, _ in constants}
    for role, name in constants:
        corrupted = _corrupt(compiled, role, name, lambda array: np.float32(1.05) * array)
        with pytest.raises(ModelError, match=f"^method {method}: .* differs from PyTorch by"):
            case.verify(corrupted)


def test_a_value_that_is_no_number_is_found(case):
    compiled = case.compiled["bp"]
    role, name = next(_float_constants(compiled))
    with pytest.raises(ModelError, match="differs from PyTorch by nan"):
        case.verify(_corrupt(compiled, role, name, lambda array: np.full_like(array, np.nan)))


def test_the_message_names_the_tensor_and_what_to_do(case):
    compiled = case.compiled["lance"]
    role, name = next(item for item in _float_constants(compiled) if item[0] == "backward")
    with pytest.raises(ModelError) as raised:
        case.verify(_corrupt(compiled, role, name, lambda array: 2 * array))
    message = str(raised.value)
    assert "/grad differs from PyTorch" in message
    assert "expected at most 1e-03" in message
    assert "the package was not written: please report this network" in message


class Mixing(SmallNetwork):
    """What it makes of a sample depends on the others."""

    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.mix(images))


MIXES = {
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "sum": lambda x: x + x.sum(0, keepdim=True),
    "softmax": lambda x: x.softmax(0),
    "order": lambda x: x.flip(0),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("count", [2, 5])
def test_a_network_that_mixes_samples_is_refused(case, mix, count):
    network = Mixing(MIXES[mix])
    network.load_state_dict(case.network.state_dict())
    message = (
        rf"mixes the samples of a batch: in two parts, the logits of {count} samples differ by .*over other"
    )
    with pytest.raises(ModelError, match=message):
        check_samples_apart(network.eval(), case.images[:count])


def test_a_network_that_looks_at_each_sample_by_itself_is_not(case):
    check_samples_apart(case.network, case.images)
    check_samples_apart(case.network, case.images[:2])


class Cut(SmallNetwork):
    """Its first trained layers are cut off from the loss."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.way != "no_grad" and torch.is_grad_enabled()):
            x = torch.relu(self.norm(self.spatial(torch.relu(self.stem(images)))))
        x = x.detach() if self.way == "detach" else x
        return self.head(torch.relu(self.pointwise(torch.relu(self.depthwise(x)))).mean((2, 3)))


@pytest.mark.parametrize("way", ["no_grad", "detach"])
def test_a_layer_that_pytorch_has_no_gradient_of_is_named(case, way):
    network = Cut(way)
    network.load_state_dict(case.network.state_dict())
    with pytest.raises(
        ModelError, match=r"^spatial: PyTorch has no gradient of it: .*leave it out of --layers"
    ):
        verify(
            network.eval(),
            case.captured.layers,
            case.compiled["bp"],
            case.weights,
            case.projections,
            case.images,
            case.labels,
        )
