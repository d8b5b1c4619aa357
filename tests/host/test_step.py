"""Training steps of whole networks, run graph by graph as a device runs them, against PyTorch."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import (
    Array,
    Device,
    MomentumSgd,
    random_projections,
    relative_error,
)
from literal_method import compress_layers, ranks_of
from small_networks import CLASSES, CONVS, HEAD, captured, random_batch, randomise_norms, small_net
from torch import nn

from lance_edge.accounting import bp_activation_bytes
from lance_edge.manifest import Schedule
from lance_edge.targets import Targets
from lance_host.capture import Captured, capture, clone
from lance_host.layers import select_layers
from lance_host.methods import METHODS
from lance_host.step import differentiate
from lance_host.traverse import depends_on_data, descendants
from lance_host.zoo.mcunet import MCUNet, build_mcunet

SCHEDULES = METHODS["lance"].schedules

# One worker exports each small network once, for both files that use it.
pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.xdist_group("captures")]

# Truth is PyTorch in float64, the graphs run in float32: through a few convolutions the difference is some 1e-6
# of a gradient's largest entry, through the whole of MCUNet 1e-5.  1e-4 is the bound that the project promises.
TOLERANCE = 1e-4
# Over 20 steps such differences feed back through the weights, and grow by a factor of ten or so.
LOSS_TOLERANCE = 1e-3

BATCH = 16
UNEVEN_PARTS = (5, 3, 8)
SELECTIONS = {
    "head only": (),
    "one branch": CONVS[-1:],
    "both branches": CONVS[-2:],
    "last four": CONVS[-4:],
    "all": CONVS,
    "scattered": ("residual.expand.0", "down.first.0"),
}


def parameters_of(network: nn.Module, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """The trainable tensors by state-dict name, asking for gradients."""
    names = [f"{name}.weight" for name in layers] + [f"{HEAD}.weight", f"{HEAD}.bias"]
    found = dict(network.named_parameters())
    return {name: found[name].requires_grad_() for name in names}


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}


def check_gradients(
    device: Device,
    network: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    fed: Mapping[str, Array],
    targets: Targets | None = None,
) -> None:
    """Loss and gradients of one batch, in uneven micro-batches, against autograd through `network`."""
    images, labels = random_batch(1, BATCH)
    targets = targets or Targets.plain(CLASSES)
    weights, smoothing = torch.from_numpy(targets.class_weights), targets.smoothing
    loss = F.cross_entropy(network(images.double()), labels, weights, label_smoothing=smoothing)
    truth = torch.autograd.grad(loss, list(parameters.values()))
    feeds = {**as_arrays(parameters), **fed}
    for parts in ([BATCH], UNEVEN_PARTS):
        found_loss, found = device.gradients(feeds, images.numpy(), labels.numpy(), parts, targets)
        assert found_loss == pytest.approx(loss.item(), rel=1e-5)
        assert set(found) == set(parameters)
        for (name, gradient), expected in zip(found.items(), truth, strict=True):
            assert relative_error(gradient, expected) < TOLERANCE, f"{name} in parts of {parts}"


def losses_of_training(
    device: Device, parameters: Mapping[str, Array], fed: Mapping[str, Array]
) -> list[float]:
    tensors, optimizer, losses = dict(parameters), MomentumSgd(0.05, 0.9), []
    for step in range(20):
        images, labels = random_batch(step, BATCH)
        loss, gradients = device.gradients({**tensors, **fed}, images.numpy(), labels.numpy(), UNEVEN_PARTS)
        optimizer.update(tensors, gradients)
        losses.append(loss)
    return losses


def losses_of_pytorch(network: nn.Module, parameters: Mapping[str, torch.Tensor]) -> list[float]:
    optimizer, losses = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9), []
    for step in range(20):
        images, labels = random_batch(step, BATCH)
        loss = F.cross_entropy(network(images.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compressed_device(
    layers: Sequence[str], share: float, schedule: Schedule, batch_share: float | None = None
) -> tuple[Device, dict[str, Array]]:
    """A device for LANCE with random projections that keep a share of each mode's dimension."""
    graph = captured(layers)
    ranks = ranks_of(graph.layers, BATCH, share, share if batch_share is None else batch_share)
    rng = np.random.default_rng(0)
    projections: dict[str, Array] = {}
    for layer in graph.layers:
        projections |= random_projections(rng, layer.name, BATCH, layer.input_shape, ranks[layer.name])
    return Device.of(differentiate(graph, "lance", ranks, BATCH, schedule)), projections


# --- gradients and training of a small network --------------------------------------------------------


@pytest.mark.parametrize("selection", SELECTIONS)
def test_bp_gradients_are_those_of_autograd(selection: str) -> None:
    layers = SELECTIONS[selection]
    network = small_net(torch.float64)
    device = Device.of(differentiate(captured(layers), "bp", {}, BATCH))
    check_gradients(device, network, parameters_of(network, layers), {})


@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "head only"])
@pytest.mark.parametrize("share", [(0.4, 0.4), (1.0, 0.4), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lance_gradients_are_those_of_the_literal_method(
    selection: str, share: tuple[float, float], schedule: Schedule
) -> None:
    layers = SELECTIONS[selection]
    device, projections = compressed_device(layers, share[1], schedule, share[0])
    network = small_net(torch.float64)
    parameters = parameters_of(network, layers)
    if share[1] < 1:  # at full rank the method is backpropagation
        compress_layers(network, layers, projections)
    check_gradients(device, network, parameters, projections)


@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name != "head only"])
@pytest.mark.parametrize("method", ["asi", "hosvd"])
def test_gradients_from_a_codec_are_those_of_the_literal_method(selection: str, method: str) -> None:
    """Whatever core and factors the codec gives; those of hosvd may be of any rank."""
    layers = SELECTIONS[selection]
    graph = captured(layers)
    ranks = ranks_of(graph.layers, BATCH, 0.4, 0.5)
    rng, factors = np.random.default_rng(0), dict[str, Array]()
    for layer in graph.layers:
        factors |= random_projections(rng, layer.name, BATCH, layer.input_shape, ranks[layer.name])
    device = Device.of(differentiate(graph, method, ranks if method == "asi" else {}, BATCH, "by layer"))
    network = small_net(torch.float64)
    parameters = parameters_of(network, layers)
    compress_layers(network, layers, factors)
    check_gradients(device, network, parameters, factors)


@pytest.mark.parametrize("selection", ["head only", "last four"])
@pytest.mark.parametrize("method", ["bp", "lance"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_label_smoothing_are_those_of_pytorch(
    selection: str, method: str, smoothing: float
) -> None:
    """In micro-batches of uneven weight: what divides the sum is the weight of the whole batch."""
    layers = SELECTIONS[selection]
    network = small_net(torch.float64)
    parameters = parameters_of(network, layers)
    projections: dict[str, Array] = {}
    if method == "lance" and layers:
        device, projections = compressed_device(layers, 0.5, "one pass")
        compress_layers(network, layers, projections)
    else:
        device = Device.of(differentiate(captured(layers), "bp", {}, BATCH))
    targets = Targets(np.array([0.2, 3.0, 1.0, 0.7, 1.9]), smoothing)
    check_gradients(device, network, parameters, projections, targets)


@pytest.mark.parametrize("selection", ["last four", "all"])
def test_twenty_steps_of_bp_lose_as_pytorch_does(selection: str) -> None:
    layers = SELECTIONS[selection]
    network = small_net(torch.float64)
    parameters = parameters_of(network, layers)
    device = Device.of(differentiate(captured(layers), "bp", {}, BATCH))
    found = losses_of_training(device, as_arrays(parameters), {})
    truth = losses_of_pytorch(network, parameters)
    assert found == pytest.approx(truth, abs=LOSS_TOLERANCE)
    assert np.ptp(truth) > 100 * LOSS_TOLERANCE  # the training moved; the comparison is not an empty one


@pytest.mark.parametrize("selection", ["last four", "all"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps_of_lance_lose_as_the_literal_method_does(selection: str, schedule: Schedule) -> None:
    layers = SELECTIONS[selection]
    device, projections = compressed_device(layers, 0.5, schedule)
    network = small_net(torch.float64)
    parameters = parameters_of(network, layers)
    start = as_arrays(parameters)
    compress_layers(network, layers, projections)
    found = losses_of_training(device, start, projections)
    truth = losses_of_pytorch(network, parameters)
    assert found == pytest.approx(truth, abs=LOSS_TOLERANCE)
    plain = small_net(torch.float64)
    exact = losses_of_pytorch(plain, parameters_of(plain, layers))
    assert np.abs(np.subtract(truth, exact)).max() > 10 * LOSS_TOLERANCE  # it is not plain backpropagation


# --- what passes between the graphs -------------------------------------------------------------------


def test_boundary_tensors() -> None:
    """One per value that the trainable part reads of the frozen part; where there is none, the images."""
    counts = {
        name: len(differentiate(captured(SELECTIONS[name]), "bp", {}, BATCH).boundary) for name in SELECTIONS
    }
    assert counts == {
        "head only": 1,  # the features
        "one branch": 2,  # the input of the block, and the other branch's output
        "both branches": 2,  # the input of the block, and that of the second convolution
        "last four": 2,  # the input of the linear convolution, and the residual's
        "all": 1,
        "scattered": 1,
    }


@pytest.mark.parametrize(("schedule", "late"), [("one pass", "D"), ("two passes", "narrow")])
def test_lance_statistics_stand_for_the_inputs_of_the_convolutions(schedule: Schedule, late: str) -> None:
    device, _ = compressed_device(SELECTIONS["last four"], 0.4, schedule)
    names = {spec.name for spec in device.stages.statistics}
    cores = {f"{layer}/G" for layer in SELECTIONS["last four"]}
    others = names - cores
    assert cores <= names
    assert {f"{HEAD}.weight/grad", f"{HEAD}.bias/grad"} <= others
    # A layer whose narrow gradient is its gradient has it under the gradient's name.
    kinds = {name.rpartition("/")[2] for name in others}
    assert kinds <= {late, "grad"}
    assert late in kinds
    outputs = {
        role: {value.name for value in model.graph.outputs} for role, model in device.stages.graphs.items()
    }
    assert cores <= outputs["forward"]
    assert others == outputs["backward"]
    reads = {value.name for value in device.stages.graphs["backward"].graph.inputs}
    assert cores & reads == (cores if schedule == "two passes" else set())


def test_without_a_batch_mode_only_narrow_gradients_outlive_a_micro_batch() -> None:
    device, _ = compressed_device(SELECTIONS["last four"], 0.4, "one pass", batch_share=1.0)
    kinds = {spec.name.rpartition("/")[2] for spec in device.stages.statistics}
    assert kinds <= {"narrow", "grad"}
    assert not device.step.batch_projections


@pytest.mark.parametrize("method", ["bp", "lance"])
def test_backward_reads_saved_tensors_and_what_a_device_is_fed(method: str) -> None:
    if method == "lance":
        device, _ = compressed_device(CONVS, 0.4, "one pass")
    else:
        device = Device.of(differentiate(captured(CONVS), method, {}, BATCH))
    step, stages = device.step, device.stages
    reads = {value.name for value in stages.graphs["backward"].graph.inputs}
    given = (*step.parameters, *step.projections, step.labels, *step.targets, step.scale)
    fed = {value.name for value in given}
    fed |= {value.name for value in stages.graphs["prepare"].graph.outputs}
    assert reads - fed == {spec.name for spec in stages.saved}


def test_what_no_sample_changes_is_computed_once() -> None:
    """Scaled weights, position matrices and spatial bases: no graph that runs per micro-batch has them."""
    device, _ = compressed_device(SELECTIONS["last four"], 0.4, "two passes")
    for role in ("forward", "backward"):
        graph = device.stages.graphs[role].graph
        varying = descendants(graph, [v for v in graph.inputs if "N" in [str(dim) for dim in v.shape or ()]])
        fixed = {
            node.op_type
            for node in graph
            if node.outputs[0] not in varying and depends_on_data(node.outputs[0], ())
        }
        assert fixed <= {"Reshape", "Transpose", "Unsqueeze"}, role


# --- MCUNet -------------------------------------------------------------------------------------------

MCUNET_HEAD = "classifier.linear"
MCUNET_CLASSES = 10
PUBLISHED_WEIGHTS = Path("weights/mcunet-256kb-1mb_imagenet.pth")
SHARED = Path(os.environ.get("LANCE_SHARED", Path(__file__).parents[3] / "shared"))
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def mcunet() -> MCUNet:
    """With the published weights where they are, else with random weights and batch-norm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_mcunet("mcunet", MCUNET_CLASSES)
    randomise_norms(network, torch.Generator().manual_seed(0))
    path = SHARED / PUBLISHED_WEIGHTS
    if path.is_file():
        published = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        body = {name: value for name, value in published.items() if not name.startswith(MCUNET_HEAD)}
        network.load_state_dict(body, strict=False)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mcunet_captured(mcunet: MCUNet) -> Captured:
    return capture(mcunet, 160, select_layers(mcunet, "4", MCUNET_HEAD), MCUNET_HEAD)


@pytest.fixture(scope="module")
def mcunet_bp(mcunet_captured: Captured) -> Device:
    return Device.of(differentiate(clone(mcunet_captured), "bp", {}, BATCH))


@pytest.fixture(scope="module", params=SCHEDULES)
def mcunet_lance(mcunet_captured: Captured, request: pytest.FixtureRequest) -> Device:
    ranks, schedule = ranks_of(mcunet_captured.layers, BATCH, 0.3, 0.3), request.param
    return Device.of(differentiate(clone(mcunet_captured), "lance", ranks, BATCH, schedule))


def test_mcunet_bp_gradients_are_those_of_autograd(
    mcunet: MCUNet, mcunet_captured: Captured, mcunet_bp: Device
) -> None:
    network = copy.deepcopy(mcunet).double()
    names = [str(value.name) for value in mcunet_captured.parameters]
    found_parameters = dict(network.named_parameters())
    parameters = {name: found_parameters[name].requires_grad_() for name in names}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 160, 160, generator=generator)
    labels = torch.randint(0, MCUNET_CLASSES, (4,), generator=generator)
    loss = F.cross_entropy(network(images.double()), labels)
    truth = torch.autograd.grad(loss, list(parameters.values()))
    found_loss, found = mcunet_bp.gradients(as_arrays(parameters), images.numpy(), labels.numpy(), (3, 1))
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, expected in zip(names, truth, strict=True):
        assert relative_error(found[name], expected) < TOLERANCE, name


def test_mcunet_bp_saves_no_more_than_the_inputs_of_its_layers(
    mcunet_captured: Captured, mcunet_bp: Device
) -> None:
    """The masks of ReLU6 come from the same activations; the head adds its input and softmax - one-hot."""
    found = sum(spec.nbytes(128) for spec in mcunet_bp.stages.saved)
    convolutions = sum(bp_activation_bytes(layer, 128) for layer in mcunet_captured.layers)
    assert found == convolutions + 4 * 128 * (160 + MCUNET_CLASSES)


def test_mcunet_lance_saves_masks_and_what_the_head_needs(mcunet_lance: Device) -> None:
    """No activation crosses from forward to backward: of each ReLU6 a mask, and the classifier's own part."""
    saved = mcunet_lance.stages.saved
    maps = [spec for spec in saved if len(spec.shape) == 4]
    assert {spec.dtype for spec in maps} == {"bool"}
    others = sorted((spec.shape, spec.dtype) for spec in saved if spec not in maps)
    assert others == [(("N", MCUNET_CLASSES), "float32"), (("N", 160), "float32")]


@pytest.mark.parametrize(("count", "mebibytes"), [(2, 11.72), (4, 17.58)])
def test_mcunet_bp_activation_bytes_are_the_published_ones(
    mcunet_captured: Captured, count: int, mebibytes: float
) -> None:
    layers = mcunet_captured.layers[-count:]
    found = sum(bp_activation_bytes(layer, 128) for layer in layers) / MEBIBYTE
    assert found == pytest.approx(mebibytes, abs=0.005)  # the paper prints two decimals
    inputs = sum(4 * 128 * math.prod(layer.input_shape) for layer in layers) / MEBIBYTE
    assert found == inputs
