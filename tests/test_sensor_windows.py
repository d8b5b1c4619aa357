"""Data that are no photographs, and a network of which everything trains: from calibrate to predict."""

import csv
import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch
from lance_edge.input_spec import ArrayInput

CHANNELS, LENGTH, RATE = 3, 40, 0.02
CLASSES = ("slow", "middle", "fast")
CODE = f'''
import torch
from torch import nn

class Windows(nn.Module):
    """One-dimensional convolutions over a window of a sensor, written with a height of 1."""

    def __init__(self, num_classes):
        super().__init__()
        first = nn.Conv2d({CHANNELS}, 12, (1, 7), (1, 2), (0, 3), bias=False)
        self.first = nn.Sequential(first, nn.BatchNorm2d(12))
        depth = nn.Conv2d(12, 12, (1, 5), padding=(0, 2), groups=12, bias=False)
        self.depth = nn.Sequential(depth, nn.BatchNorm2d(12))
        self.point = nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(12, 16, (1, 3), (1, 2), (0, 1))
        self.out = nn.Linear(16, num_classes)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + self.point(torch.relu(self.depth(x)))
        return self.out(torch.relu(self.last(x)).mean((2, 3)))
'''
TRAINED = ("first.0", "depth.0", "point", "last")


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Oscillations of three frequencies with noise, 30 of each; as a file, and the code of the network."""
    folder, random = tmp_path_factory.mktemp("windows"), np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    times = np.arange(LENGTH) / LENGTH
    phases = random.uniform(0, 2 * np.pi, (90, CHANNELS, 1, 1))
    waves = np.sin(2 * np.pi * np.array([2, 5, 9])[labels, None, None, None] * times + phases)
    x = (waves + 0.3 * random.standard_normal(waves.shape)).astype(np.float32)
    np.savez(folder / "windows.npz", x=x, y=labels, classes=np.array(CLASSES))
    (folder / "windows_net.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module")
def package(windows, lance_host):
    result = lance_host(
        *("calibrate", "--model", f"{windows / 'windows_net.py'}:Windows", "--data", windows / "windows.npz"),
        *("--layers", "all", "--energy", 0.9, "--threads", 1, "-o", windows / "pkg.tar"),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return windows / "pkg.tar"


def train(lance_device, package, windows, out, *words):
    data = windows / "windows.npz"
    lance_device("train", "--artifact", package, "--data", data, "--out", out, "--threads", 1, *words)
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_trains_and_nothing_is_done_to_the_data(package):
    with Bundle(package) as bundle:
        manifest = bundle.manifest
    assert manifest.preprocessing == ArrayInput((CHANNELS, 1, LENGTH))
    assert [layer.name for layer in manifest.layers] == list(TRAINED)
    for variant in manifest.variants:
        (boundary,) = variant.boundary
        assert boundary.shape == ("N", CHANNELS, 1, LENGTH), "the arrays themselves: no part is frozen"


def test_one_step_is_that_of_pytorch(package, windows, lance_device, tmp_path):
    train(
        *(lance_device, package, windows, tmp_path / "run", "--method", "bp", "--steps", 1, "--lr", RATE),
        *("--momentum", 0, "--clip", 0, "--no-shuffle", "--micro-batch", 5),
    )
    scope = {}
    exec(CODE, scope)
    network = scope["Windows"](3).eval()
    with Bundle(package) as bundle:
        network.load_state_dict({k: torch.tensor(v) for k, v in bundle.arrays("weights.npz").items()})
        part = open_dataset(windows / "windows.npz", bundle.manifest.split).train
        rows = range(bundle.manifest.batch_size)
        images = load_batch(part, rows, bundle.manifest.preprocessing)
    loss = functional.cross_entropy(
        network(torch.from_numpy(images)), torch.from_numpy(part.labels[: len(rows)])
    )
    names = [f"{layer}.weight" for layer in TRAINED] + ["out.weight", "out.bias"]
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    with np.load(tmp_path / "run" / "last.npz") as checkpoint:
        for name, gradient in zip(names, gradients, strict=True):
            update = checkpoint[name] - parameters[name].detach().numpy()
            expected = -RATE * gradient.numpy()
            # The difference of two float32 weights: some 1e-7 absolute.
            assert np.abs(update - expected).max() < 1e-4 * np.abs(expected).max() + 2e-7, name


@pytest.mark.parametrize("method", ["lance", "bp"])
def test_it_learns_and_every_form_predicts_the_same(
    method, package, windows, lance_device, lance_host, tmp_path
):
    history = train(lance_device, package, windows, tmp_path / "run", "--method", method, "--epochs", 40)
    assert float(history[-1]["test_accuracy"]) > 0.7  # chance is a third
    checkpoint, merged = tmp_path / "run" / "last.npz", tmp_path / "net.onnx"
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert options["augment"] == "none", "arrays are not mirrored unless somebody says so"
    result = lance_device(
        *(
            "eval",
            "--artifact",
            package,
            "--checkpoint",
            checkpoint,
            "--data",
            windows / "windows.npz",
            "--json",
        ),
    )
    assert json.loads(result.stdout)["accuracy"] == pytest.approx(float(history[-1]["test_accuracy"]), abs=1e-6)

    assert lance_host("merge", "--artifact", package, "--checkpoint", checkpoint, "-o", merged).exit_code == 0
    with np.load(windows / "windows.npz") as archive:
        np.savez(tmp_path / "some.npz", x=archive["x"][::30])
    by_package, by_file = (
        json.loads(lance_device("predict", *source, "--json", tmp_path / "some.npz").stdout)
        for source in (("--artifact", package, "--checkpoint", checkpoint), ("--model", merged))
    )
    assert [entry["file"] for entry in by_package] == [f"{tmp_path / 'some.npz'}[{row}]" for row in range(3)]
    for a, b in zip(by_package, by_file, strict=True):
        assert a["predictions"][0]["class"] == b["predictions"][0]["class"]
        assert a["predictions"][0]["probability"] == pytest.approx(b["predictions"][0]["probability"], abs=1e-4)


def test_inspect_says_that_arrays_are_unchanged(package, lance_host):
    assert "none: float32 arrays 3x1x40" in lance_host("inspect", package).stdout


def test_layers_are_listed_for_such_arrays(windows, lance_host):
    words = ("--model", f"{windows / 'windows_net.py'}:Windows", "--data", windows / "windows.npz")
    result = lance_host("layers", *words, "--batch-size", 10)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith(TRAINED)}
    assert list(rows) == list(TRAINED)
    assert "1x7, stride 2" in rows["first.0"]
    assert "3x1x40  4.69 KiB" in rows["first.0"], "10 x 3 x 40 float32 values"


def refused(result, exit_code):
    assert result.exit_code == exit_code, (result.output, result.exception)
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize(
    "words", [("--input-size", 64), ("--mean", "0.5"), ("--std", "0.5"), ("--interpolation", "bicubic")]
)
def test_preprocessing_is_for_images(words, windows, lance_host, tmp_path):
    result = lance_host(
        *("calibrate", "--model", f"{windows / 'windows_net.py'}:Windows", "--data", windows / "windows.npz"),
        *("-o", tmp_path / "pkg.tar", *words),
    )
    line = refused(result, 1)
    assert (
        line
        == f"error: {words[0]}: --data holds float32 arrays, which go to the network unchanged; leave it out"
    )


def test_a_network_that_does_not_take_such_arrays(windows, lance_host, tmp_path):
    x = np.zeros((20, 5, 1, LENGTH), np.float32)
    np.savez(tmp_path / "five.npz", x=x, y=np.arange(20) % 2, classes=np.array(["a", "b"]))
    result = lance_host(
        *("calibrate", "--model", "mcunet", "--weights", "random", "--data", tmp_path / "five.npz"),
        *("-o", tmp_path / "pkg.tar"),
    )
    assert "the network cannot be run on float32 [2, 5, 1, 40]: " in refused(result, 6)


def test_arrays_are_not_mirrored(package, windows, tmp_path):
    from click.testing import CliRunner

    from lance_device.cli import main

    words = ("train", "--artifact", package, "--data", windows / "windows.npz", "--out", tmp_path / "run")
    result = CliRunner().invoke(main, [str(word) for word in (*words, "--augment", "flip")])
    assert refused(result, 5) == (
        "error: --augment flip: the package takes arrays, which go to the network unchanged; leave it out"
    )
    assert not (tmp_path / "run").exists()


def test_photographs_for_a_package_of_arrays(package, photos, tmp_path):
    from click.testing import CliRunner

    from lance_device.cli import main

    words = ("train", "--artifact", package, "--data", photos, "--out", tmp_path / "run")
    assert "the classes differ" in refused(CliRunner().invoke(main, [str(word) for word in words]), 5)
