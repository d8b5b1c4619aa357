"""A network that is not ours through the whole path: package, one training step, merged network, prediction."""

import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch

CODE = '''
import torch
from torch import nn

class Branches(nn.Module):
    """A strided block of two branches that are put side by side, a residual one, and an unusual classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.left = nn.Conv2d(8, 6, 3, 2, 1)
        self.right = nn.Conv2d(8, 6, 1, 2)
        self.residual = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.old_classifier = nn.Linear(12, 1000)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.left(x).relu(), self.right(x).sigmoid()], 1)
        x = x + torch.tanh(self.residual(x))
        return self.old_classifier(x.mean((2, 3)))

def make():
    network = Branches()
    for part in (network.stem, network.left, network.residual):  # as people freeze a backbone
        part.requires_grad_(False)
    return network
'''
TRAINED = ("left", "right", "residual")
SIZE = 96
RATE = 0.05


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "own_branches.py"
    path.write_text(CODE)
    return path


def network_of(code, classes=None):
    scope = {}
    exec(code.read_text(), scope)
    network = scope["make"]()
    if classes is not None:
        network.old_classifier = torch.nn.Linear(12, classes)
    return network.eval().requires_grad_(True)


@pytest.fixture(scope="module")
def model_file(code, tmp_path_factory):
    """The same network as another tool would hand it over: an ONNX file of one image."""
    path = tmp_path_factory.mktemp("file") / "branches.onnx"
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network_of(code), (torch.zeros(1, 3, SIZE, SIZE),), dynamo=True, verbose=False
        )
    program.save(path)
    return path


@pytest.fixture(scope="module", params=["factory", "onnx"])
def package(request, code, model_file, photos, lance_host, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "pkg.tar"
    model = (f"{code}:make", "--input-size", SIZE) if request.param == "factory" else (model_file,)
    result = lance_host(
        *("calibrate", "--model", *model, "--mean", 0.5, "--std", 0.25, "--data", photos),
        *("--layers", "left,right,resid*", "--threads", 1, "-o", path),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return path


def test_the_package_says_what_it_was_made_of(package):
    with Bundle(package) as bundle:
        manifest = bundle.manifest
    assert manifest.model in ("own_branches.py:make", "branches.onnx")
    assert manifest.weights_source == f"as built by {manifest.model}"
    assert [layer.name for layer in manifest.layers] == list(TRAINED)
    assert manifest.preprocessing.mean == (0.5, 0.5, 0.5)
    assert manifest.preprocessing.std == (0.25, 0.25, 0.25)


def test_one_step_is_that_of_pytorch_and_comes_back_as_the_users_network(
    package, code, photos, lance_host, lance_device, tmp_path
):
    lance_device(
        *("train", "--artifact", package, "--data", photos, "--out", tmp_path / "run", "--method", "bp"),
        *("--steps", 1, "--lr", RATE, "--momentum", 0, "--clip", 0, "--no-shuffle", "--augment", "none"),
    )
    merged = tmp_path / "finetuned.pth"
    words = ("--artifact", package, "--checkpoint", tmp_path / "run" / "last.npz", "-o", merged)
    assert lance_host("merge", *words).exit_code == 0
    found = torch.load(merged, weights_only=True)

    network = network_of(code, classes=3)
    with Bundle(package) as bundle:
        start = {name: torch.tensor(value) for name, value in bundle.arrays("weights.npz").items()}
        dataset = open_dataset(photos, bundle.manifest.split)
        images = load_batch(dataset.train, range(bundle.manifest.batch_size), bundle.manifest.preprocessing)
        labels = torch.from_numpy(dataset.train.labels[: bundle.manifest.batch_size])
    network.load_state_dict(start, strict=bundle.manifest.model.endswith("make"))
    parameters = dict(network.named_parameters())
    names = [f"{layer}.weight" for layer in TRAINED] + ["old_classifier.weight", "old_classifier.bias"]
    loss = functional.cross_entropy(network(torch.from_numpy(images)), labels)
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        update = (found[name] - start[name]).numpy()
        expected = -RATE * gradient.numpy()
        size = np.abs(expected).max()
        assert size > 0
        # The update as the difference of two float32 weights: some 1e-7 absolute.
        assert np.abs(update - expected).max() < 1e-4 * size + 2e-7, name
    assert all(torch.equal(found[name], start[name]) for name in start if name not in names)


def test_the_fine_tuned_network_predicts_as_the_merged_file(
    package, photos, lance_host, lance_device, tmp_path
):
    lance_device("train", "--artifact", package, "--data", photos, "--out", tmp_path / "run", "--epochs", 1)
    checkpoint, merged = tmp_path / "run" / "last.npz", tmp_path / "finetuned.onnx"
    assert lance_host("merge", "--artifact", package, "--checkpoint", checkpoint, "-o", merged).exit_code == 0
    onnx.checker.check_model(onnx.load(merged), full_check=True)
    session = onnxruntime.InferenceSession(merged, providers=["CPUExecutionProvider"])
    assert [value.shape for value in session.get_outputs()] == [["N", 3]]
    photo = photos / "disc" / "disc00.jpg"
    by_file, by_package = (
        json.loads(lance_device("predict", *source, "--json", photo).stdout)
        for source in (("--model", merged), ("--artifact", package, "--checkpoint", checkpoint))
    )
    for a, b in zip(by_file[0]["predictions"], by_package[0]["predictions"], strict=True):
        assert a["class"] == b["class"]
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)
