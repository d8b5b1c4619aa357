"""A network of `nn.Conv1d` from calibrate to predict: the checkpoint is that of the network as it is."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset

CODE = """
import torch
from torch import nn

class Windows(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 12, 7, 2, 3, bias=False), nn.BatchNorm1d(12)
        self.depth = nn.Conv1d(12, 12, 5, padding=2, groups=12)
        self.last = nn.Conv1d(12, 16, 3, 2, 1)
        self.out = nn.Linear(16, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = x + torch.relu(self.depth(x))
        return self.out(torch.relu(self.last(x)).mean(2))
"""
RATE = 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Oscillations of three frequencies with noise, 30 of each; as a file, and the code of the network."""
    path, random = tmp_path_factory.mktemp("one-d"), np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    phases = random.uniform(0, 2 * np.pi, (90, 3, 1))
    waves = np.sin(2 * np.pi * np.array([2, 5, 9])[labels, None, None] * np.arange(40) / 40 + phases)
    np.savez(path / "windows.npz", x=(waves + 0.3 * random.standard_normal(waves.shape)).astype(np.float32),
             y=labels)  # fmt: skip
    (path / "one_d.py").write_text(CODE)
    return path


@pytest.fixture(scope="module")
def package(folder, lance_host):
    result = lance_host(
        *("calibrate", "--model", f"{folder / 'one_d.py'}:Windows", "--data", folder / "windows.npz"),
        *("--layers", "all", "--train-bias", "--train-norm", "--methods", "all", "--threads", 1),
        *("-o", folder / "pkg.tar"),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    for method in ("lance", "bp", "asi", "hosvd"):
        assert f"loss and gradients of {method} agree with PyTorch" in result.output
    return folder / "pkg.tar"


def train(lance_device, package, folder, out, *words):
    data = folder / "windows.npz"
    lance_device("train", "--artifact", package, "--data", data, "--out", out, "--threads", 1, *words)


def network_of(state):
    scope = {}
    exec(CODE, scope)
    network = scope["Windows"](3).eval()
    network.load_state_dict(state)
    return network


def test_one_step_is_that_of_pytorch(package, folder, lance_host, lance_device, tmp_path):
    train(
        *(lance_device, package, folder, tmp_path / "run", "--method", "bp", "--steps", 1, "--lr", RATE),
        *("--momentum", 0, "--clip", 0, "--no-shuffle", "--micro-batch", 5),
    )
    with Bundle(package) as bundle:
        manifest = bundle.manifest
        network = network_of({k: torch.tensor(v) for k, v in bundle.arrays("weights.npz").items()})
    part = open_dataset(folder / "windows.npz", manifest.split).train
    rows = np.arange(manifest.batch_size)
    samples = np.load(folder / "windows.npz")["x"][[int(name.strip("]").rpartition("[")[2]) for name in
                                                    np.array(part.names)[rows]]]  # fmt: skip
    loss = functional.cross_entropy(network(torch.from_numpy(samples)), torch.from_numpy(part.labels[rows]))
    parameters = dict(network.named_parameters())
    assert {spec.name for spec in manifest.parameters} == set(parameters)
    gradients = torch.autograd.grad(loss, list(parameters.values()))

    words = ("--artifact", package, "--checkpoint", tmp_path / "run" / "last.npz", "-o", tmp_path / "m.pth")
    assert lance_host("merge", *words).exit_code == 0
    merged = torch.load(tmp_path / "m.pth", weights_only=True)
    network_of(merged)  # the shapes are those of nn.Conv1d
    for (name, before), gradient in zip(parameters.items(), gradients, strict=True):
        update, expected = (merged[name] - before.detach()).numpy(), -RATE * gradient.numpy()
        # The difference of two float32 weights: some 1e-7 absolute.
        assert np.abs(update - expected).max() < 1e-4 * np.abs(expected).max() + 2e-7, name


@pytest.mark.parametrize("method", ["lance", "asi", "hosvd"])
def test_compressed_methods_train_and_predict(method, package, folder, lance_host, lance_device, tmp_path):
    train(lance_device, package, folder, tmp_path / "run", "--method", method, "--epochs", 2)
    checkpoint, merged = tmp_path / "run" / "last.npz", tmp_path / "net.onnx"
    assert lance_host("merge", "--artifact", package, "--checkpoint", checkpoint, "-o", merged).exit_code == 0
    with np.load(folder / "windows.npz") as archive:
        np.savez(tmp_path / "some.npz", x=archive["x"][::30])
    by_package, by_file = (
        json.loads(lance_device("predict", *source, "--json", tmp_path / "some.npz").stdout)
        for source in (("--artifact", package, "--checkpoint", checkpoint), ("--model", merged))
    )
    for a, b in zip(by_package, by_file, strict=True):
        assert a["predictions"][0]["class"] == b["predictions"][0]["class"]
        assert a["predictions"][0]["probability"] == pytest.approx(b["predictions"][0]["probability"], abs=1e-4)
