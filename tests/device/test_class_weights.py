"""Class weights and label smoothing on the command line, against the same training in PyTorch."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from device_harness import refused, started, table, train
from tiny_package import PREPROCESSING, SPLIT, write_tiny_package
from tiny_training import features_of, logits_of, rebuilt, trainable
from torch.nn import functional

from lance_device.class_weights import training_targets
from lance_device.class_weights_text import is_understood, parse_weights
from lance_edge.bundle import Bundle, describe, write_bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import DataError
from lance_edge.images import load_batch

CLASSES = ("blue", "green", "red")
STEPS = ("--steps", 4, "--lr", 0.1, "--no-shuffle", "--augment", "none", "--micro-batch", 5, "--cache", "off")


@pytest.fixture
def unbalanced(images, tmp_path):
    """Only some of the images of two classes."""
    root = tmp_path / "unbalanced"
    for name, count in (("blue", 20), ("green", 5), ("red", 9)):
        (root / name).mkdir(parents=True)
        for path in sorted((images / name).iterdir())[:count]:
            shutil.copy(path, root / name)
    return root


def train_in_torch(package, root, method, weights, smoothing):
    """Plain PyTorch: CrossEntropyLoss with these weights and smoothing on each whole batch."""
    part, parameters = open_dataset(root, SPLIT).train, trainable(package)
    sgd = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=4, eta_min=0.001)
    class_weights = torch.tensor(weights, dtype=torch.float32)
    projections = [torch.from_numpy(package.projections[f"conv/U{mode}"]) for mode in range(4)]
    losses = []
    for step in range(4):
        indices = [(step * 16 + i) % len(part) for i in range(16)]
        features = features_of(package, load_batch(part, indices, PREPROCESSING))
        stand_in = rebuilt(features, projections) if method == "lance" else features
        logits = logits_of(features, parameters, stand_in)
        labels = torch.from_numpy(part.labels[indices])
        loss = functional.cross_entropy(logits, labels, class_weights, label_smoothing=smoothing)
        sgd.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 2.0)
        sgd.step()
        rates.step()
        losses.append(loss.item())
    return {name: value.detach().numpy() for name, value in parameters.items()}, losses


@pytest.mark.parametrize("method", ["bp", "lance"])
@pytest.mark.parametrize(
    ("words", "smoothing"),
    [
        (("--class-weights", "balanced"), 0.0),
        (("--label-smoothing", 0.1), 0.1),
        (("--class-weights", "0.5,4,1.5", "--label-smoothing", 0.2), 0.2),
    ],
)
def test_training_is_that_of_pytorch(package, unbalanced, method, words, smoothing, tmp_path):
    labels = open_dataset(unbalanced, SPLIT).train.labels
    counts = np.bincount(labels)
    weights = {
        "balanced": len(labels) / (3 * counts),
        "0.5,4,1.5": [0.5, 4, 1.5],
    }.get(words[1], [1, 1, 1])
    out = tmp_path / "run"
    started(train(package, unbalanced, out, "--method", method, *STEPS, *words))
    expected, losses = train_in_torch(package, unbalanced, method, weights, smoothing)
    found = [float(row["loss"]) for row in table(out / "steps.csv") if row["phase"] == "step"]
    assert found == pytest.approx(losses, rel=1e-5)
    with np.load(out / "last.npz") as checkpoint:
        for name, value in expected.items():
            # Four steps in float32 on both sides.
            np.testing.assert_allclose(checkpoint[name], value, atol=2e-6, err_msg=name)


def test_the_options_are_stored_and_kept_when_resumed(package, images, tmp_path):
    words = ("--class-weights", "1,2,3", "--label-smoothing", 0.1)
    started(train(package, images, tmp_path / "run", "--steps", 2, *words))
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert (options["class_weights"], options["label_smoothing"]) == ("1,2,3", 0.1)
    line = refused(train(package, images, tmp_path / "run", "--resume", "--class-weights", "none"), 4)
    assert "this run was started with --class-weights 1,2,3, not --class-weights none" in line


def test_another_number_of_weights_leaves_nothing(package, images, tmp_path):
    line = refused(train(package, images, tmp_path / "run", "--class-weights", "1,2"), 5)
    assert line == (
        "error: --class-weights 1,2: expected 3 numbers, one for each of blue, green, red, in this order;"
        " found 2"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["equal", "", "1,,2", "1,-2,1", "0,1,1", "1,nan,1", "1,inf,1"])
def test_weights_that_are_not_understood(text, package, images, tmp_path):
    assert not is_understood(text)
    result = train(package, images, tmp_path / "run", "--class-weights", text)
    assert result.exit_code == 2
    assert f"expected none, balanced, or positive numbers such as 1,2.5,1, found {text!r}" in (
        " ".join(result.stderr.split())
    )


@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_smoothing_out_of_range_is_a_usage_error(value, package, images, tmp_path):
    assert train(package, images, tmp_path / "run", "--label-smoothing", value).exit_code == 2


def test_weights_by_number():
    assert parse_weights(" 1, 2.5,1") == (1, 2.5, 1)
    targets = training_targets("1,2.5,1", 0.1, np.array([0, 1, 1]), CLASSES)
    assert targets.total_weight(np.array([0, 1])) == 3.5
    with pytest.raises(DataError, match="one for each of blue, green, red"):
        training_targets("1,2,3,4", 0.0, np.array([0]), CLASSES)


def test_a_package_that_knows_no_weights_is_refused_and_trains_without(images, tmp_path):
    """As those of other tools may be: their graphs do not declare the inputs."""
    whole = write_tiny_package(tmp_path / "pkg.tar")
    with Bundle(whole.path) as bundle:
        manifest = bundle.manifest
        contents = {member.name: bundle.read(member.name) for member in manifest.members}
    for name in [name for name in contents if name.endswith(("forward.onnx", "backward.onnx"))]:
        contents[name] = without_targets(contents[name])
    members = tuple(describe(name, data) for name, data in contents.items())
    write_bundle(whole.path, type(manifest)(**{**vars(manifest), "members": members}), contents)
    line = refused(train(whole, images, tmp_path / "run", "--label-smoothing", 0.1), 3)
    assert (
        "its graphs know no class weights or label smoothing; rebuild the package with lance-host, or" in line
    )
    started(train(whole, images, tmp_path / "plain", "--steps", 1))


def without_targets(data):
    """The same graph with the two vectors as constants."""
    model = onnx.load_from_string(data)
    for name, value in (("target/on", 1), ("target/off", 0)):
        for found in [info for info in model.graph.input if info.name == name]:
            model.graph.input.remove(found)
            constant = onnx.numpy_helper.from_array(np.full(3, value, np.float32), name)
            model.graph.initializer.append(constant)
    return model.SerializeToString()
