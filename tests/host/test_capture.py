"""From PyTorch to the forward graph, and what every graph of a package must be."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graph_runner import Device, relative_error, run_graph
from small_networks import (
    CLASSES,
    CONVS,
    HEAD,
    RESOLUTION,
    captured,
    random_batch,
    randomise_norms,
    small_net,
)
from torch import nn

from lance_edge.errors import ModelError
from lance_edge.targets import Targets
from lance_host.capture import capture, clone
from lance_host.layers import layer_modules, select_layers
from lance_host.stages import cut_stages
from lance_host.step import differentiate

# One worker exports each small network once, for both files that use it.
pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.xdist_group("captures")]

# The graph and PyTorch both run in float32, and folding batch-norm reorders a product and a sum: errors of
# some 1e-7 a layer, on logits of size 1.
TOLERANCE = 1e-5


PLAIN = Targets.plain(CLASSES).arrays() | {"scale": np.array(1, np.float32)}


def logits_of(model: ir.Model, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """The captured graph's logits with the network's own weights, fed by state-dict name."""
    state = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    values = {**state, **PLAIN, "images": images.numpy(), "labels": labels.numpy()}
    return run_graph(model, values)["logits"]


# --- batch-norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), CONVS[-2:], CONVS])
def test_folded_batch_norm_gives_the_networks_own_logits(layers: tuple[str, ...]) -> None:
    """Frozen convolutions are folded into their numbers, trainable ones (one of them with a bias) by a Mul."""
    images, labels = random_batch(0, 6)
    graph = captured(layers)
    found = logits_of(graph.model, small_net(), images, labels)
    truth = small_net(torch.float64)(images.double()).numpy()
    assert np.abs(found - truth).max() < TOLERANCE * np.abs(truth).max()
    assert "BatchNormalization" not in {node.op_type for node in graph.model.graph}


def test_the_graph_is_that_of_a_network_in_evaluation_mode() -> None:
    network = small_net()
    network.train()
    graph = capture(network, RESOLUTION, (), HEAD)
    images, labels = random_batch(0, 6)
    found = logits_of(graph.model, small_net(), images, labels)
    truth = small_net()(images).numpy()
    assert np.abs(found - truth).max() < TOLERANCE * np.abs(truth).max()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_seed_are_cross_entropy_and_its_gradient(weighted: bool, smoothing: float) -> None:
    """The loss is summed over the samples; the seed is the gradient of scale times the loss."""
    weights = np.linspace(0.5, 3, CLASSES) if weighted else np.ones(CLASSES)
    targets = Targets(weights, smoothing)
    images, labels = random_batch(0, 6)
    graph = captured(())
    graph.seed.type = ir.TensorType(ir.DataType.FLOAT)
    graph.model.graph.outputs.append(graph.seed)
    state = {name: tensor.detach().numpy() for name, tensor in small_net().state_dict().items()}
    total = targets.total_weight(labels.numpy())
    values = {**state, **targets.arrays(), "images": images.numpy(), "labels": labels.numpy()}
    values["scale"] = np.array(1 / total, np.float32)
    found = run_graph(graph.model, values)
    logits = small_net(torch.float64)(images.double()).requires_grad_()
    loss = F.cross_entropy(logits, labels, torch.from_numpy(weights), label_smoothing=smoothing)
    (seed,) = torch.autograd.grad(loss, logits)
    assert float(found["loss"]) / total == pytest.approx(loss.item(), rel=TOLERANCE)
    np.testing.assert_allclose(found[str(graph.seed.name)], seed.numpy(), atol=1e-6)


# --- inputs -------------------------------------------------------------------------------------------


def test_trainable_weights_are_inputs_by_state_dict_name() -> None:
    layers = CONVS[-2:]
    graph = captured(layers)
    names = [value.name for value in graph.model.graph.inputs]
    parameters = [f"{name}.weight" for name in layers] + [f"{HEAD}.weight", f"{HEAD}.bias"]
    assert names == ["images", *parameters, "labels", "target/on", "target/off", "scale"]
    assert [value.name for value in graph.parameters] == parameters
    assert not set(parameters) & set(graph.model.graph.initializers)
    assert all(value.const_value is None for value in graph.parameters)
    state = small_net().state_dict()
    shapes = {str(value.name): tuple(value.shape or ()) for value in graph.parameters}
    assert shapes == {name: tuple(state[name].shape) for name in parameters}


def test_layers_are_described_as_pytorch_knows_them() -> None:
    network, sizes = small_net(), {}
    for name in CONVS:

        def note(_: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor, name: str = name) -> None:
            sizes[name] = (tuple(inputs[0].shape[1:]), tuple(y.shape[1:]))

        network.get_submodule(name).register_forward_hook(note)
    network(random_batch(0, 1)[0])
    for layer in captured(CONVS).layers:
        conv = network.get_submodule(layer.name)
        assert isinstance(conv, nn.Conv2d)
        assert (layer.input_shape, layer.output_shape) == sizes[layer.name]
        assert layer.weight == f"{layer.name}.weight"
        assert layer.weight_shape == tuple(conv.weight.shape)
        assert (layer.stride, layer.dilation, layer.groups) == (conv.stride, conv.dilation, conv.groups)
        assert layer.padding == (*conv.padding, *conv.padding)


def test_a_head_without_bias_has_one_parameter() -> None:
    network = small_net()
    network.head = nn.Linear(12, CLASSES, bias=False)
    assert [value.name for value in capture(network, RESOLUTION, (), HEAD).parameters] == ["head.weight"]


def test_a_clone_is_consumed_instead_of_the_original() -> None:
    original = captured(CONVS[-2:])
    before = [node.op_type for node in original.model.graph]
    differentiate(clone(original), "bp", {}, 8)
    assert [node.op_type for node in original.model.graph] == before
    assert len(differentiate(original, "bp", {}, 8).gradients) == 4


# --- which layers -------------------------------------------------------------------------------------


def test_layers_are_counted_from_the_end_in_module_order() -> None:
    network = small_net()
    assert layer_modules(network) == [*CONVS, HEAD]
    assert select_layers(network, "0", HEAD) == []
    assert select_layers(network, "2", HEAD) == ["down.second.0", "down.shortcut.0"]
    assert select_layers(network, "7", HEAD) == list(CONVS)


def test_pointwise_selection_leaves_out_grouped_convolutions() -> None:
    network = small_net()
    assert select_layers(network, "pointwise:0", HEAD) == []
    assert select_layers(network, "pointwise:3", HEAD) == [
        "residual.project.0",
        "down.first.0",
        "down.shortcut.0",
    ]


@pytest.mark.parametrize(("selection", "available"), [("8", 7), ("pointwise:6", 5)])
def test_too_many_layers(selection: str, available: int) -> None:
    message = f"--layers {selection}: the network has only {available} such layers; ask for fewer"
    with pytest.raises(ModelError, match=message):
        select_layers(small_net(), selection, HEAD)


@pytest.mark.parametrize("selection", ["", "four", "-1", "2.5", "depthwise:2", "pointwise:", "pointwise:x"])
def test_a_selection_that_is_not_understood(selection: str) -> None:
    with pytest.raises(
        ModelError,
        match=f"--layers {selection}: expected a count such as 4, several such as 1-10 or 2,4, or pointwise:4",
    ):
        select_layers(small_net(), selection)


# --- networks that cannot be captured -----------------------------------------------------------------


class Forks(nn.Module):
    """What becomes of the features is decided by their values, which no export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = x.mean((2, 3))
        result: torch.Tensor = self.head(features if features.sum() > 0 else -features)
        return result


def test_a_network_that_cannot_be_exported() -> None:
    with pytest.raises(ModelError, match=r"cannot be exported to ONNX: .*check that torch.export.export works"):
        capture(Forks(), RESOLUTION, (), HEAD)


class Twice(nn.Module):
    """One convolution used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.conv(self.conv(x)).mean((2, 3)))
        return result


def test_a_weight_that_is_used_twice_is_named() -> None:
    with pytest.raises(ModelError, match=r"conv.weight: expected one Conv, .*choose others with --layers"):
        capture(Twice(), RESOLUTION, ["conv"], HEAD)


class FixedBatch(nn.Module):
    """`len` makes a plain number of the batch size, and the exporter then fixes it without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(x.reshape(len(x), 3, -1).mean(2))
        return result


def test_a_network_that_fixes_its_batch_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"batches of any size: .* as in len\(x\); write x.shape\[0\]"):
        capture(FixedBatch(), RESOLUTION, [], HEAD)


class NormFirst(nn.Module):
    """Batch-norm before the convolution: nothing to fold it into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(torch.relu(self.first(x))))
        result: torch.Tensor = self.head(self.second(y).mean((2, 3)))
        return result


def test_a_batch_norm_that_cannot_be_folded_is_exact_in_the_prefix_and_trained_through_in_the_tail() -> None:
    torch.manual_seed(0)
    network = NormFirst().eval()
    randomise_norms(network, torch.Generator().manual_seed(0))
    network.requires_grad_(False)
    network.first.weight.requires_grad_()
    graph = capture(network, RESOLUTION, ["second"], HEAD)
    images, labels = random_batch(0, 4)
    found = logits_of(graph.model, network, images, labels)
    truth = network(images).detach().numpy()
    assert np.abs(found - truth).max() < TOLERANCE * np.abs(truth).max()
    assert "BatchNormalization" in {node.op_type for node in differentiate(graph, "bp", {}, 8).model.graph}
    step = differentiate(capture(network, RESOLUTION, ["first", "second"], HEAD), "bp", {}, 8)
    weights = {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}
    gradients = Device.of(step).gradients(weights, images.numpy(), labels.numpy())[1]
    loss = F.cross_entropy(network(images), labels)
    (expected,) = torch.autograd.grad(loss, [network.first.weight])
    assert relative_error(gradients["first.weight"], expected) < TOLERANCE


# --- the graphs of a package --------------------------------------------------------------------------

# Only the training builds of onnxruntime have kernels for these; no *Grad operator is in the ONNX standard.
TRAINING_ONLY = {
    "SoftmaxCrossEntropyLoss",
    "NegativeLogLikelihoodLoss",
    "Adam",
    "Momentum",
    "Gradient",
    "Dropout",
}


@pytest.mark.parametrize("layers", [(), CONVS[-4:], CONVS], ids=["head only", "last four", "all"])
@pytest.mark.parametrize("method", ["bp", "lance"])
def test_every_graph_is_plain_valid_onnx(layers: tuple[str, ...], method: str) -> None:
    graph = captured(layers)
    ranks = {layer.name: (4, 2, 2, 2) for layer in graph.layers} if method == "lance" else {}
    stages = cut_stages(differentiate(graph, method, ranks, 8))
    expected = {"prefix", "forward", "backward"}
    assert set(stages.graphs) - {"gradient", "prepare"} == expected
    for role, model in stages.graphs.items():
        for node in model.graph:
            assert node.domain in ("", "ai.onnx"), f"{role}: {node.domain}"
            assert onnx.defs.has(node.op_type, 18), f"{role}: {node.op_type}"
            assert node.op_type not in TRAINING_ONLY, role
            assert node.op_type != "BatchNormalization", role
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def test_graphs_declare_the_shapes_that_their_tensors_have() -> None:
    stages = cut_stages(differentiate(captured(CONVS[-4:]), "bp", {}, 8))
    declared = {
        str(value.name): tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ())
        for value in stages.graphs["backward"].graph.inputs
    }
    for spec in stages.saved:
        assert declared[spec.name] == spec.shape


def test_the_first_convolution_can_be_trained() -> None:
    """The prefix is then a copy of the images, and nothing of the network is in it."""
    layers = select_layers(small_net(), str(len(CONVS)), HEAD)
    stages = cut_stages(differentiate(captured(layers), "bp", {}, 8))
    (boundary,) = stages.boundary
    assert boundary.shape == ("N", 3, RESOLUTION, RESOLUTION)
    prefix = stages.graphs["prefix"]
    assert [node.op_type for node in prefix.graph] == ["Identity"]
    images = random_batch(0, 3)[0].numpy()
    np.testing.assert_array_equal(run_graph(prefix, {"images": images})[boundary.name], images)
