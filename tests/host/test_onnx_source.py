"""Networks from ONNX files: those that PyTorch exports, and what other tools write."""

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_networks import CLASSES, RESOLUTION, small_net
from torch import nn

from lance_edge.errors import ModelError
from lance_host.network import NetworkRequest, load_network, open_network
from lance_host.sources import open_source
from lance_host.sources.onnx_ops import OPS
from lance_host.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Two float32 runtimes: some 1e-6 of the largest logit.
TOLERANCE = 1e-5


def save(network: nn.Module, path: Path, size: int, **options) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(), (torch.zeros(2, 3, size, size),), dynamo=True, verbose=False, **options
        )
    program.save(path)
    return path


def runtime_logits(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


def built(path: Path, classes: int = 7) -> nn.Module:
    return open_source(str(path)).build(classes).eval()


def assert_logits(network: nn.Module, images: np.ndarray, expected: np.ndarray) -> None:
    with torch.no_grad():
        found = network(torch.from_numpy(images)).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


# --- files that PyTorch writes ---


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return save(small_net(), path, RESOLUTION, dynamic_shapes=({0: torch.export.Dim("batch")},), optimize=False)


def test_a_file_gives_the_logits_of_the_network_for_any_batch(small_file):
    network = built(small_file)
    for count in (1, 3):
        images = noise(count, 3, RESOLUTION, RESOLUTION)
        assert_logits(network, images, small_net()(torch.from_numpy(images)).numpy())
        assert_logits(network, images, runtime_logits(small_file, images))


def test_layers_bear_the_names_and_weights_of_the_file(small_file):
    network, original = built(small_file), small_net()
    for name, module in original.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found = network.get_submodule(name)
            assert type(found) is type(module)
            assert torch.equal(found.weight, module.weight)


def test_an_optimised_file_with_a_fixed_batch_takes_any_batch(tmp_path):
    path = save(small_net(), tmp_path / "fixed.onnx", RESOLUTION, optimize=True)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    images = noise(5, 3, RESOLUTION, RESOLUTION)
    assert_logits(built(path), images, small_net()(torch.from_numpy(images)).numpy())


def test_a_residual_network_with_a_flatten(tmp_path):
    torch.manual_seed(0)
    network = ZOO["resnet18"].build(6)
    path = save(network, tmp_path / "resnet.onnx", 32, dynamic_shapes=({0: torch.export.Dim("batch")},))
    images = noise(3, 3, 32, 32)
    assert_logits(built(path), images, network(torch.from_numpy(images)).detach().numpy())


def test_the_whole_path_from_a_file(small_file):
    said = []
    network = load_network(
        NetworkRequest(str(small_file), layers="down"), 4, said.append, lambda done, size: None
    )
    assert (network.name, network.head) == ("small.onnx", "head")
    assert network.selections == (("down.first.0", "down.second.0", "down.shortcut.0"),)
    assert network.preprocessing.sample_shape == (3, RESOLUTION, RESOLUTION)
    assert network.weights_source == "as built by small.onnx"
    assert network.module(torch.zeros(2, 3, RESOLUTION, RESOLUTION)).shape == (2, 4)
    assert said[0].startswith(f"input: 3 x {RESOLUTION} x {RESOLUTION}, mean 0.485")


def test_a_copy_is_independent(small_file):
    """Its plan names layers, and does not hold those of the original."""
    network = built(small_file)
    images = torch.from_numpy(noise(2, 3, RESOLUTION, RESOLUTION))
    twin = copy.deepcopy(network)
    with torch.no_grad():
        network.get_submodule("head").weight.zero_()
    assert torch.equal(twin(images), built(small_file)(images))


# --- what other tools write, by hand ---


def proto_of(nodes, constants, images=("N", 3, 8, 8), opset=13, output="y", logits=("N", 4)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, images)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, logits)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def written(tmp_path, proto) -> Path:
    onnx.save(proto, tmp_path / "hand.onnx")
    return tmp_path / "hand.onnx"


def node(kind, inputs, outputs, name="", **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), name=name, **attributes)


RNG = np.random.default_rng(1)
CONV, FC, BIAS = (RNG.standard_normal(s).astype(np.float32) for s in ((6, 3, 3, 3), (6, 4), (4,)))
CONV_NODES = [
    node("Conv", "x conv", "c", name="/features/0/Conv", strides=[2, 2], pads=[1, 1, 1, 1]),
    node("LeakyRelu", "c", "r", alpha=0.2),
    node("GlobalAveragePool", "r", "pooled"),
]
FLATTENED = [*CONV_NODES, node("Flatten", "pooled", "flat")]
LINEAR = [node("MatMul", "flat fc", "product", name="/classifier/MatMul"), node("Add", "bias product", "y")]
WEIGHTS = {"conv": CONV, "fc": FC, "bias": BIAS}


def test_matmul_and_add_are_one_linear_layer_named_after_its_node(tmp_path):
    path = written(tmp_path, proto_of([*FLATTENED, *LINEAR], WEIGHTS))
    network = built(path)
    images = noise(3, 3, 8, 8)
    assert_logits(network, images, runtime_logits(path, images))
    linear = network.get_submodule("classifier")
    assert isinstance(linear, nn.Linear)
    np.testing.assert_array_equal(linear.weight.detach().numpy(), FC.T)
    np.testing.assert_array_equal(linear.bias.detach().numpy(), BIAS)
    assert isinstance(network.get_submodule("features.0"), nn.Conv2d)


def test_names_of_an_exporters_scopes_are_those_of_the_modules(tmp_path):
    scopes = "/layers/layers.13/layers.13.0/layers/layers.3"
    conv = node("Conv", "x conv", "c", name=f"{scopes}/Conv")
    network = built(written(tmp_path, proto_of([conv, *FLATTENED[1:], *LINEAR], WEIGHTS)))
    assert isinstance(network.get_submodule("layers.13.0.layers.3"), nn.Conv2d)


def test_a_convolution_can_be_the_head(tmp_path):
    """The reshape behind it does not insist on the classes of the file."""
    conv = node("Conv", "x head", "c", name="/classifier/classifier.1/Conv")
    nodes = [conv, node("GlobalAveragePool", "c", "g"), node("Reshape", "g to", "y")]
    head = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32)
    path = written(tmp_path, proto_of(nodes, {"head": head, "to": np.array([-1, 4])}))
    opened = open_network(NetworkRequest(str(path), layers="0"), 9, lambda line: None)
    assert opened.head == "classifier.1"
    assert opened.module(torch.zeros(3, 3, 8, 8)).shape == (3, 9)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_a_softmax_at_the_end_is_left_off(tmp_path, kind):
    plain = runtime_logits(written(tmp_path, proto_of([*FLATTENED, *LINEAR], WEIGHTS)), noise(3, 3, 8, 8))
    proto = proto_of([*FLATTENED, *LINEAR, node(kind, "y", "p", axis=1)], WEIGHTS, output="p")
    network = built(written(tmp_path, proto))
    assert_logits(network, noise(3, 3, 8, 8), plain)


def test_a_gemm_with_factors(tmp_path):
    gemm = node("Gemm", "flat fc bias", "y", alpha=0.5, beta=2.0)
    path = written(tmp_path, proto_of([*FLATTENED, gemm], WEIGHTS))
    network = built(path)
    assert_logits(network, noise(3, 3, 8, 8), runtime_logits(path, noise(3, 3, 8, 8)))
    (linear,) = (module for module in network.modules() if isinstance(module, nn.Linear))
    np.testing.assert_array_equal(linear.weight.detach().numpy(), 0.5 * FC.T)


def test_a_reshape_by_shape_arithmetic(tmp_path):
    """`x.view(x.size(0), -1)`, as older exporters write it."""
    nodes = [
        *CONV_NODES,
        node("Shape", "pooled", "s"),
        node("Gather", "s zero", "n", axis=0),
        node("Unsqueeze", "n axis", "n1"),
        node("Concat", "n1 rest", "to", axis=0),
        node("Reshape", "pooled to", "flat"),
        *LINEAR,
    ]
    numbers = {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1])}
    path = written(tmp_path, proto_of(nodes, WEIGHTS | numbers))
    for count in (1, 4):
        assert_logits(built(path), noise(count, 3, 8, 8), runtime_logits(path, noise(count, 3, 8, 8)))


@pytest.mark.parametrize("target", [[1, -1], [1, 6]])
def test_a_reshape_with_the_batch_of_the_export(tmp_path, target):
    nodes = [*CONV_NODES, node("Reshape", "pooled to", "flat"), *LINEAR]
    proto = proto_of(nodes, WEIGHTS | {"to": np.array(target)}, images=(1, 3, 8, 8), logits=(1, 4))
    path = written(tmp_path, proto)
    images = noise(3, 3, 8, 8)
    expected = np.concatenate([runtime_logits(path, images[i : i + 1]) for i in range(3)])
    assert_logits(built(path), images, expected)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_that_is_worked_out(tmp_path, mode, kernel):
    weight = RNG.standard_normal((6, 3, kernel, kernel)).astype(np.float32)
    conv = node("Conv", "x conv", "c", strides=[2, 2], auto_pad=mode)
    path = written(tmp_path, proto_of([conv, *FLATTENED[1:], *LINEAR], WEIGHTS | {"conv": weight}))
    assert_logits(built(path), noise(2, 3, 8, 8), runtime_logits(path, noise(2, 3, 8, 8)))


def test_channels_last_of_the_file_are_channels_first_here(tmp_path):
    nodes = [
        node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t conv", "c"),
        *FLATTENED[1:],
        *LINEAR,
    ]
    path = written(tmp_path, proto_of(nodes, WEIGHTS, images=("N", 8, 8, 3)))
    assert open_source(str(path)).input_shape == (3, 8, 8)
    images = noise(2, 3, 8, 8)
    assert_logits(built(path), images, runtime_logits(path, images.transpose(0, 2, 3, 1)))


def test_float32_arrays_of_the_files_own_shape_go_in_unchanged(tmp_path):
    """49 steps of 40 features and one channel look like an image with its channels last."""
    head = RNG.standard_normal((40, 4)).astype(np.float32)
    nodes = [node("ReduceMean", "x", "m", axes=[1, 3], keepdims=0), node("MatMul", "m head", "y")]
    path = written(tmp_path, proto_of(nodes, {"head": head}, images=("N", 49, 40, 1)))
    request = NetworkRequest(str(path), layers="0")
    opened = open_network(request, 4, lambda line: None, array_shape=(49, 40, 1))
    assert opened.preprocessing.sample_shape == (49, 40, 1)
    assert opened.module(torch.zeros(2, 49, 40, 1)).shape == (2, 4)
    assert_logits(
        open_source(str(path)).for_arrays().build(4),
        noise(2, 49, 40, 1),
        runtime_logits(path, noise(2, 49, 40, 1)),
    )


def test_a_squeeze_of_an_axis_before_the_batch(tmp_path):
    nodes = [*FLATTENED, *LINEAR[:1], node("Add", "bias product", "z")]
    front = [node("Unsqueeze", "z zero", "u"), node("Squeeze", "u zero", "y")]
    path = written(tmp_path, proto_of([*nodes, *front], WEIGHTS | {"zero": np.array([0])}))
    assert_logits(built(path), noise(3, 3, 8, 8), runtime_logits(path, noise(3, 3, 8, 8)))


@pytest.mark.parametrize(
    "back", [node("Squeeze", "u", "y"), node("Reshape", "u to", "y")], ids=lambda part: part.op_type
)
def test_what_has_the_batch_first_only_behind_a_reshape(tmp_path, back):
    nodes = [*FLATTENED, *LINEAR[:1], node("Add", "bias product", "z"), node("Unsqueeze", "z zero", "u"), back]
    numbers = {"zero": np.array([0]), "to": np.array([-1, 4])}
    used = {name: value for name, value in numbers.items() if name == "zero" or name in back.input}
    path = written(tmp_path, proto_of(nodes, WEIGHTS | used))
    assert_logits(built(path), noise(3, 3, 8, 8), runtime_logits(path, noise(3, 3, 8, 8)))


def test_a_reshape_of_a_constant_keeps_its_numbers(tmp_path):
    """`Reshape(gamma, [1, C, 1, 1])` in a file of one image begins with a 1 that is not the batch."""
    nodes = [*CONV_NODES[:1], node("Reshape", "gamma to", "g"), node("Mul", "c g", "m"),
             node("GlobalAveragePool", "m", "pooled"), node("Flatten", "pooled", "flat"), *LINEAR]  # fmt: skip
    constants = WEIGHTS | {"gamma": NUMBERS["gamma"], "to": np.array([1, 6, 1, 1])}
    path = written(tmp_path, proto_of(nodes, constants, images=(1, 3, 8, 8), logits=(1, 4)))
    images = noise(3, 3, 8, 8)
    expected = np.concatenate([runtime_logits(path, images[i : i + 1]) for i in range(3)])
    assert_logits(built(path), images, expected)


ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Elu", "Softplus", "HardSigmoid", "Abs", "Exp")
OPERATORS = {
    "activations": [
        *(node(kind, "c", kind) for kind in ACTIVATIONS),
        node("Sum", "Relu Sigmoid Tanh Elu", "s1"),
        node("Max", "Exp s1 Abs Softplus HardSigmoid", "s2"),
        node("Clip", "s2 none six", "r"),
    ],
    "hard swish and prelu": [node("HardSwish", "c", "h"), node("PRelu", "h slope", "r")],
    "gelu by parts": [
        node("Div", "c root", "d"),
        node("Erf", "d", "e"),
        node("Add", "e one", "e1"),
        node("Mul", "c e1", "m"),
        node("Mul", "m half", "r"),
    ],
    "pooling": [
        node("MaxPool", "c", "p", kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1]),
        node("AveragePool", "p", "r", kernel_shape=[2, 2], strides=[2, 2], count_include_pad=1),
    ],
    "uneven max pool": [node("MaxPool", "c", "r", kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")],
    "pad and slice": [node("Pad", "c pads", "p"), node("Slice", "p start stop axes2", "r")],
    "parts": [
        node("Split", "c", "a b", axis=1),
        node("Concat", "b a", "k", axis=1),
        node("Gather", "k order", "r", axis=1),
    ],
    "squeeze and excitation": [
        node("ReduceMean", "c", "m", axes=[2, 3], keepdims=1),
        node("Conv", "m se", "e"),
        node("Sigmoid", "e", "g"),
        node("Mul", "g c", "r"),
    ],
    "norms": [
        node("BatchNormalization", "c gamma beta mean var", "b", epsilon=0.01),
        node("InstanceNormalization", "b gamma beta", "r"),
    ],
    "resize": [
        node("Resize", "c none scales", "n", mode="nearest", nearest_mode="floor",
             coordinate_transformation_mode="asymmetric"),
        node("Resize", "n none scales", "r", mode="linear", coordinate_transformation_mode="half_pixel"),
    ],
    "axes": [
        node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        node("ReduceMax", "t", "m", axes=[3], keepdims=0),
        node("Unsqueeze", "m axis3", "u"),
        node("Squeeze", "u axis3", "q"),
        node("Unsqueeze", "q axis3", "u2"),
        node("Sub", "t u2", "d"),
        node("Transpose", "d", "r", perm=[0, 3, 1, 2]),
    ],
}  # fmt: skip
NUMBERS = {
    "six": np.array(6, np.float32), "slope": RNG.standard_normal((6, 1, 1)).astype(np.float32),
    "root": np.array(np.sqrt(2), np.float32), "one": np.array(1, np.float32), "half": np.array(0.5, np.float32),
    "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "start": np.array([1]), "stop": np.array([2**63 - 1]),
    "axes2": np.array([2]), "order": np.array([5, 0, 1, 2, 3, 4]), "axis3": np.array([3]),
    "se": RNG.standard_normal((6, 6, 1, 1)).astype(np.float32),
    "gamma": RNG.uniform(0.5, 2, 6).astype(np.float32),
    "beta": RNG.standard_normal(6).astype(np.float32), "mean": RNG.standard_normal(6).astype(np.float32),
    "var": RNG.uniform(0.5, 2, 6).astype(np.float32), "scales": np.array([1, 1, 2, 2], np.float32),
}  # fmt: skip


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_are_those_of_onnx_runtime(tmp_path, case):
    conv = node("Conv", "x conv", "c", pads=[1, 1, 1, 1])
    for part in OPERATORS[case]:
        part.input[:] = ["" if name == "none" else name for name in part.input]
    tail = [*FLATTENED[2:], *LINEAR]
    used = {name for part in OPERATORS[case] for name in part.input}
    constants = WEIGHTS | {name: value for name, value in NUMBERS.items() if name in used}
    path = written(tmp_path, proto_of([conv, *OPERATORS[case], *tail], constants, opset=14))
    images = noise(3, 3, 8, 8)
    assert_logits(built(path), images, runtime_logits(path, images))


# --- what cannot be used ---


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"absent.onnx: no such file; give the path of an ONNX model"):
        open_source(str(tmp_path / "absent.onnx"))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08"])
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"--model .*bad.onnx: cannot be used \(.*export it again with opset 18"
    ):
        open_source(str(tmp_path / "bad.onnx"))


def test_an_operator_that_is_not_known(tmp_path):
    nodes = [node("Conv", "x conv", "c"), node("Det", "c", "d"), node("Flatten", "d", "y")]
    path = written(tmp_path, proto_of(nodes, {"conv": CONV}, logits=("N", 6), images=("N", 3, 8, 8)))
    with pytest.raises(
        ModelError, match=r"hand.onnx: operator Det \(node .*\) is not known; known are Abs, Add, "
    ):
        built(path)


def test_two_inputs_or_outputs_and_other_types(tmp_path):
    proto = proto_of([*FLATTENED, *LINEAR], WEIGHTS)
    two = copy.deepcopy(proto)
    two.graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ("N", 6, 1, 1)))
    with pytest.raises(
        ModelError, match="expected one output, the logits, found y, pooled; export the network with"
    ):
        open_source(str(written(tmp_path, two)))
    two = copy.deepcopy(proto)
    two.graph.input.append(helper.make_tensor_value_info("z", TensorProto.INT64, ("N",)))
    with pytest.raises(ModelError, match=r"expected one float32 input, found x \(FLOAT\), z \(INT64\); export"):
        open_source(str(written(tmp_path, two)))


def test_a_shape_that_is_left_open(tmp_path):
    proto = proto_of([*FLATTENED, *LINEAR], WEIGHTS, images=("N", "C", "H", "W"))
    assert open_source(str(written(tmp_path, proto))).input_shape == (3, 224, 224)
    proto = proto_of([node("MatMul", "x fc", "y")], {"fc": FC}, images=("N", "K"))
    with pytest.raises(
        ModelError, match=r"its input x has the shape \[0, 0\]; expected \[N, 3, H, W\], or fixed"
    ):
        open_source(str(written(tmp_path, proto)))


def test_logits_that_differ_are_not_accepted(small_file, monkeypatch):
    monkeypatch.setitem(OPS, "Add", lambda op, x: x[0])
    with pytest.raises(
        ModelError, match=r"come out .* different in PyTorch, expected at most 1e-03; please report"
    ):
        built(small_file)


def test_listing_layers_of_a_file(small_file):
    opened = open_network(NetworkRequest(str(small_file)), None, lambda line: None)
    assert opened.head == "head"
    assert opened.module(torch.zeros(2, 3, RESOLUTION, RESOLUTION)).shape == (2, CLASSES)
