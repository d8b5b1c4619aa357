"""Training through `onnxruntime.training.api` from our artifacts, beside our runtime and its own artifacts."""

import functools
import json
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.ort_network import plain_network
from lance_device.features import Batch, Unmetered
from lance_device.graphs import load_network, starting_parameters
from lance_device.optimizer import SGD
from lance_device.step import training_step
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset

METHODS = ("lance", "bp")
STEPS, LEARNING_RATE = 20, 0.02
CLIP = 0.5  # below the norm of the gradients, so that clipping is seen
DISTINCT = 3  # batches, taken in turn


@dataclass(frozen=True)
class Outcome:
    """Of a training: losses `[steps]`, weights at its end, gradients of its first step."""

    loss: np.ndarray
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def outcome_of(path):
    with np.load(path) as file:
        arrays = dict(file)

    def under(folder):
        return {name.removeprefix(folder): x for name, x in arrays.items() if name.startswith(folder)}

    return Outcome(arrays["loss"], under("weights/"), under("gradients/"))


@pytest.fixture(scope="module")
def bundle(photo_package):
    with Bundle(photo_package) as opened:
        yield opened


@pytest.fixture(scope="module")
def batches(bundle, photos):
    """Several batches of the training images, in an order of their own."""
    manifest = bundle.manifest
    part = open_dataset(photos, manifest.split, manifest.classes).train
    rows = np.random.default_rng(0).integers(0, len(part), (DISTINCT, manifest.batch_size))
    return [Batch(part, one, np.zeros(len(one), bool), manifest.preprocessing) for one in rows]


@pytest.fixture(scope="module")
def batches_file(batches, tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "batches.npz"
    every = slice(None)
    images, labels = [one.images(every) for one in batches], [one.labels(every) for one in batches]
    np.savez(path, images=np.stack(images), labels=np.stack(labels))
    return path


@pytest.fixture(scope="module")
def artifacts(photo_package, lance_host, ort_python, tmp_path_factory):
    """The four files of a method, and of an optimiser."""

    @functools.cache
    def export(method, *options):
        folder = tmp_path_factory.mktemp("artifacts") / method
        words = ("--artifact", photo_package, "--method", method, "--ort-python", ort_python, "-o", folder)
        result = lance_host("export-ort", *words, *options)
        assert result.exit_code == 0, result.output
        return folder

    return export


@pytest.fixture(scope="module")
def theirs(artifacts, drive, batches_file, tmp_path_factory):
    """What ONNX Runtime's training API makes of our artifacts."""
    results = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        drive(
            work="train",
            artifacts=artifacts(method, "--clip", CLIP),
            batches=batches_file,
            steps=STEPS,
            learning_rate=LEARNING_RATE,
            threads=1,
            evaluate=True,
            inference=folder / "inference.onnx",
            result=folder / "result.npz",
        )
        results[method] = folder
    return results


def train_here(bundle, method, batches, steps=STEPS):
    """The same in our runtime, in micro-batches of 5, with the onnxruntime of this environment."""
    variant = bundle.manifest.variant(method)
    weights = starting_parameters(bundle, variant)
    step, losses, first = training_step(bundle, variant, weights, threads=1), [], {}
    for number in range(steps):
        outcome = step.run(batches[number % len(batches)], 5, Unmetered(), lambda: None)
        first = first or {name: x.copy() for name, x in outcome.gradients.items()}
        losses.append(outcome.loss)
        SGD(momentum=0, weight_decay=0, clip=CLIP).update(weights, {}, outcome.gradients, LEARNING_RATE)
    return Outcome(np.array(losses), weights, first)


@pytest.fixture(scope="module")
def ours(bundle, batches):
    return {method: train_here(bundle, method, batches) for method in METHODS}


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_end_at_the_weights_of_our_runtime(method, theirs, ours, bundle):
    found, expected = outcome_of(theirs[method] / "result.npz"), ours[method]
    start = starting_parameters(bundle, bundle.manifest.variant(method))
    assert found.weights.keys() == expected.weights.keys() == start.keys()
    for name, weight in expected.weights.items():
        moved = weight - start[name]
        assert np.abs(moved).max() > 1e-4, f"{name} has not moved: nothing would be seen"
        # Of the way that it went, which is less than the weight itself.
        assert relative(found.weights[name] - start[name], moved) < 1e-3, name
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
    assert expected.loss[-1] < expected.loss[0]


def test_the_methods_and_the_clipping_can_be_told_apart(ours):
    """By a hundred times the tolerance of the test above."""
    for name, weight in ours["bp"].gradients.items():
        if not name.startswith("classifier."):
            assert relative(ours["lance"].gradients[name], weight) > 0.1, name
    for one in ours.values():
        assert np.sqrt(sum(np.square(x).sum() for x in one.gradients.values())) > 2 * CLIP


@pytest.fixture(scope="module")
def generated(bundle, drive, batches_file, tmp_path_factory):
    """The library's own artifacts for the same network, trained for one step."""
    folder, variant = tmp_path_factory.mktemp("generated"), bundle.manifest.variant("bp")
    onnx.save(plain_network(bundle, variant), folder / "network.onnx")
    drive(
        work="generate",
        network=folder / "network.onnx",
        trained=list(variant.parameters),
        frozen=[],
        clip=0,
        artifacts=folder / "artifacts",
    )
    drive(
        work="train",
        artifacts=folder / "artifacts",
        batches=batches_file,
        steps=1,
        learning_rate=LEARNING_RATE,
        threads=1,
        evaluate=False,
        inference=None,
        result=folder / "result.npz",
    )
    return outcome_of(folder / "result.npz")


def test_its_own_differentiation_gives_our_gradients(generated, theirs, ours):
    """`generate_artifacts` shares nothing with our backward rules; sums of float32 in another order: 1e-4."""
    exported = outcome_of(theirs["bp"] / "result.npz")
    assert generated.gradients.keys() == ours["bp"].gradients.keys()
    for name, gradient in generated.gradients.items():
        assert np.abs(gradient).max() > 1e-4, name
        assert relative(exported.gradients[name], gradient) < 1e-4, name
        assert relative(ours["bp"].gradients[name], gradient) < 1e-4, name
    assert exported.loss[0] == pytest.approx(generated.loss[0], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_and_the_exported_network_use_the_trained_weights(method, theirs, ours, bundle, batches):
    variant = bundle.manifest.variant(method)
    network = load_network(bundle, variant, outcome_of(theirs[method] / "result.npz").weights, threads=1)
    images, labels = batches[0].images(slice(0, 3)), batches[0].labels(slice(None))
    session = onnxruntime.InferenceSession(theirs[method] / "inference.onnx")
    assert [value.name for value in session.get_inputs()] == ["images"]
    (logits,) = session.run(["logits"], {"images": images})
    np.testing.assert_allclose(logits, network(images), rtol=1e-4, atol=1e-4)  # of logits of about 1
    every = network(batches[0].images(slice(None))).astype(np.float64)
    losses = np.log(np.exp(every).sum(axis=1)) - every[np.arange(len(labels)), labels]
    with np.load(theirs[method] / "result.npz") as file:
        assert float(file["eval_loss"]) == pytest.approx(losses.mean(), rel=1e-4)


def test_the_exported_network_still_says_what_it_is_for(theirs):
    model = onnx.load(theirs["bp"] / "inference.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["classes"] == ["disc", "square", "stripes"]
    assert metadata["preprocessing"]["resolution"] == 96


def test_lance_refuses_a_batch_of_another_size(artifacts, run_there, tmp_path):
    """Its subspace of the batch mode has a row for each sample."""
    code = """if True:
        import sys, numpy as np
        from onnxruntime.training.api import CheckpointState, Module
        folder = sys.argv[1]
        state = CheckpointState.load_checkpoint(folder + "/checkpoint")
        module = Module(folder + "/training_model.onnx", state)
        try:
            module(np.zeros((5, 3, 96, 96), np.float32), np.zeros(5, np.int64))
        except Exception as error:
            print("refused:", error)
    """
    said = run_there("-c", code, artifacts("lance", "--clip", CLIP))
    assert "refused:" in said
    assert "images" in said
    assert "16" in said


def test_adamw_is_the_one_of_the_library(artifacts, drive, batches, batches_file, bundle, tmp_path):
    """Its first steps, written out (without weight decay), on our runtime's gradients."""
    steps, (b1, b2, epsilon) = 3, (0.9, 0.999, 1e-6)
    drive(
        work="train",
        artifacts=artifacts("bp", "--optimizer", "adamw"),
        batches=batches_file,
        steps=steps,
        learning_rate=1e-3,
        threads=1,
        evaluate=False,
        inference=None,
        result=tmp_path / "result.npz",
    )
    variant = bundle.manifest.variant("bp")
    weights, start = starting_parameters(bundle, variant), starting_parameters(bundle, variant)
    step, first, second = training_step(bundle, variant, weights, threads=1), {}, {}
    for t in range(1, steps + 1):
        gradients = step.run(batches[t - 1], 16, Unmetered(), lambda: None).gradients
        for name, g in gradients.items():
            first[name] = b1 * first.get(name, 0) + (1 - b1) * g
            second[name] = b2 * second.get(name, 0) + (1 - b2) * g**2
            rate = 1e-3 * np.sqrt(1 - b2**t) / (1 - b1**t)
            weights[name] -= (rate * first[name] / (np.sqrt(second[name]) + epsilon)).astype(np.float32)
    found = outcome_of(tmp_path / "result.npz").weights
    for name, weight in weights.items():
        moved = weight - start[name]
        # Where a gradient is next to nothing its sign is rounding's, but it moves as far as the others: compare
        # the whole, not the worst.
        assert np.linalg.norm(found[name] - weight) < 1e-2 * np.linalg.norm(moved), name
