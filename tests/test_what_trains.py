"""A network of convolutions and linear layers, with its own classifier: biases and norms train too."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch

CODE = '''
import torch
from torch import nn

class Hybrid(nn.Module):
    """Convolutions, then a map's positions as tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.conv, self.norm = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.layer_norm, self.wide, self.narrow = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(torch.tanh(self.stem(x)))))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.layer_norm(x))))
        return self.classifier(x.mean(1))

def make():
    torch.manual_seed(4)
    network = Hybrid()
    nn.init.uniform_(network.norm.weight, 0.5, 1.5)
    nn.init.uniform_(network.norm.running_mean, -0.2, 0.2)
    return network
'''
LAYERS = ("conv", "wide", "narrow")
EXTRAS = (
    *("conv.bias", "wide.bias", "narrow.bias"),
    *("norm.weight", "norm.bias", "layer_norm.weight", "layer_norm.bias"),
)
SIZE, RATE = 48, 0.05


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "hybrid.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def package(code, photos, lance_host, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "pkg.tar"
    result = lance_host(
        *("calibrate", "--model", f"{code}:make", "--input-size", SIZE, "--data", photos, "--threads", 1),
        *("--layers", 3, "--head", "none", "--train-bias", "--train-norm", "--methods", "all", "-o", path),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    for method in ("lance", "bp", "asi", "hosvd"):
        assert f"loss and gradients of {method} agree with PyTorch" in result.output
    return path


def test_a_count_takes_both_kinds_and_leaves_a_kept_classifier_out(package):
    with Bundle(package) as bundle:
        manifest = bundle.manifest
    assert [layer.name for layer in manifest.layers] == list(LAYERS)
    assert [spec.name for spec in manifest.parameters] == [*(f"{name}.weight" for name in LAYERS), *EXTRAS]


def test_inspect_says_what_trains_and_over_which_modes(package, lance_host):
    output = " ".join(lance_host("inspect", package).output.split())
    assert f"trainable 3 layers and {', '.join(EXTRAS)}: 10 tensors" in output
    assert "Input is channels x height x width or tokens x features." in output
    assert "batch, channels, height, width or batch, tokens, features" in output


def test_the_list_says_how_the_kept_classifier_may_train(code, lance_host):
    words = ("layers", "--model", f"{code}:make", "--input-size", SIZE, "--head", "none")
    output = lance_host(*words).output
    assert "The classifier is not trained (--head none) unless --layers names classifier." in output
    rows = [line.split()[0] for line in output.splitlines() if line.startswith(("stem", *LAYERS, "classifier"))]
    assert rows == ["stem", *LAYERS]


def test_help_says_what_may_train(lance_host):
    output = " ".join(lance_host("calibrate", "--help").output.split())
    assert "--train-bias Train the biases of these layers as well." in output
    assert "--train-norm Train scale and shift of the norm layers from the first trained layer on" in output
    assert "the network's own stays, frozen unless --layers names it" in output


def test_one_step_is_that_of_pytorch(package, code, photos, lance_host, lance_device, tmp_path):
    lance_device(
        *("train", "--artifact", package, "--data", photos, "--out", tmp_path / "run", "--method", "bp"),
        *("--steps", 1, "--lr", RATE, "--momentum", 0, "--clip", 0, "--no-shuffle", "--augment", "none"),
    )
    merged = tmp_path / "finetuned.pth"
    words = ("--artifact", package, "--checkpoint", tmp_path / "run" / "last.npz", "-o", merged)
    assert lance_host("merge", *words).exit_code == 0
    found, scope = torch.load(merged, weights_only=True), {}
    exec(code.read_text(), scope)
    network = scope["make"]().eval()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    with Bundle(package) as bundle:
        manifest = bundle.manifest
        dataset = open_dataset(photos, manifest.split)
        images = load_batch(dataset.train, range(manifest.batch_size), manifest.preprocessing)
        labels = torch.from_numpy(dataset.train.labels[: manifest.batch_size])
    parameters, names = dict(network.named_parameters()), [spec.name for spec in manifest.parameters]
    loss = functional.cross_entropy(network(torch.from_numpy(images)), labels)
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        update, expected = (found[name] - start[name]).numpy(), -RATE * gradient.numpy()
        size = np.abs(expected).max()
        assert size > 0
        # The update as the difference of two float32 weights: some 1e-7 absolute.
        assert np.abs(update - expected).max() < 1e-4 * size + 2e-7, name
    assert all(torch.equal(found[name], start[name]) for name in start if name not in names)


@pytest.mark.parametrize("method", ["lance", "asi", "hosvd"])
def test_compressed_methods_train_on_the_device(method, package, photos, lance_device, tmp_path):
    words = ("train", "--artifact", package, "--data", photos, "--out", tmp_path / "run", "--epochs", 1)
    assert lance_device(*words, "--method", method, "--lr", 0.01).exit_code == 0
    with np.load(tmp_path / "run" / "last.npz") as trained, Bundle(package) as bundle:
        start = bundle.arrays("weights.npz")
        assert all(
            np.abs(trained[spec.name] - start[spec.name]).max() > 0 for spec in bundle.manifest.parameters
        )
