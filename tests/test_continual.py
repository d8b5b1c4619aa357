"""Two tasks through the whole path, workstation and board: what is protected, and what that is worth.

Patch mode with a depthwise and a grouped convolution (a basis for each group), and channel mode without.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from continual_tasks import BATCH, CODE, LAYERS, write_tasks
from torch import nn

from lance_device.features import Batch
from lance_device.graphs import starting_parameters
from lance_device.measure import PhaseMeter
from lance_device.probe import MemoryProbe
from lance_device.step import training_step
from lance_edge.bundle import Bundle
from lance_edge.checkpoints import read_weights
from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch
from lance_edge.manifest import WEIGHTS_MEMBER, Layer, Manifest
from lance_edge.memory import Memory, drift, read_memory

MODES = ("patch", "channel")
FACTORIES = {"patch": "grouped", "channel": "plain"}
EPOCHS = 20


@dataclass(frozen=True)
class Story:
    """What the two tasks left behind; `one.tar`, `run1/`, `memory.npz`, `two.tar`, `run2/` and so on."""

    folder: Path
    mode: str

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @functools.cached_property
    def memory(self) -> Memory:
        return read_memory(self / "memory.npz")

    @functools.cached_property
    def manifest(self) -> Manifest:
        with Bundle(self / "two.tar") as bundle:
            return bundle.manifest

    @property
    def layers(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.manifest.layers}

    def weights(self, package: str, run: str | None = None) -> dict[str, np.ndarray]:
        """Those of a package, with what a run made of them."""
        with Bundle(self / f"{package}.tar") as bundle:
            weights = {name: np.array(array) for name, array in bundle.arrays(WEIGHTS_MEMBER).items()}
            return weights | (read_weights(self / run / "last.npz", bundle).weights if run else {})


def accomplished(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module", params=MODES)
def story(request, made_once, lance_host, lance_device):
    mode = request.param

    def make(folder):
        one, two = write_tasks(folder)
        (folder / "net.py").write_text(CODE)
        model = ("--model", f"{folder}/net.py:{FACTORIES[mode]}", "--threads", 1)

        def train(package, data, run, epochs, *words):
            words = ("--out", folder / run, "--epochs", epochs, "--threads", 1, *words)
            lance_device("train", "--artifact", folder / package, "--data", data, *words)

        first = ("--layers", "all", "--methods", "bp", "--batch-size", BATCH, "--data", one)
        accomplished(lance_host("calibrate", *model, *first, "-o", folder / "one.tar"))
        train("one.tar", one, "run1", 12)
        after = ("--checkpoint", folder / "run1/last.npz")
        words = ("--data", one, "--mode", mode, "--threshold", 0.9, "-o", folder / "memory.npz")
        said = accomplished(lance_host("memory", *after, *words))
        (folder / "memory.txt").write_text(said)
        words = ("--memory", folder / "memory.npz", "--mode", mode, "--data", two, "-o", folder / "two.tar")
        said = accomplished(lance_host("calibrate", *model, *after, *words))
        (folder / "two.txt").write_text(said)
        train("two.tar", two, "run2", EPOCHS, "--clip", 1, "--momentum", 0.9)
        words = ("--methods", "bp", "--mode", mode, "--data", two, "-o", folder / "forget.tar")
        accomplished(lance_host("calibrate", *model, *after, *words))
        train("forget.tar", two, "forgetful", EPOCHS, "--clip", 1, "--momentum", 0.9)

    return Story(made_once(f"continual-{mode}", make), mode)


def history(run: Path) -> list[float]:
    """Test accuracies of a run, an entry for each epoch."""
    import csv

    with (run / "history.csv").open(newline="") as file:
        return [float(row["test_accuracy"]) for row in csv.DictReader(file)]


# --- the subspaces ------------------------------------------------------------------------------------


def test_the_memory_is_orthonormal_and_the_next_tasks_bases_avoid_it(story):
    with Bundle(story / "two.tar") as bundle:
        projections = {name: np.array(array) for name, array in bundle.arrays("projections.npz").items()}
        assert bundle.read("memory.npz") == (story / "memory.npz").read_bytes()
    for name, layer in story.layers.items():
        memory = story.memory.layers[name]
        assert memory.groups == (layer.groups if not layer.is_linear and story.mode == "patch" else 1)
        bases = projections[f"{name}/U1"].astype(np.float64)
        bases = bases.reshape(memory.groups, memory.dimension, -1)
        for group in range(memory.groups):
            m = memory.basis(group).astype(np.float64)
            assert 0 < m.shape[1] < memory.dimension
            assert np.abs(m.T @ m - np.eye(m.shape[1])).max() <= 1e-5
            assert np.abs(bases[group].T @ m).max() <= 1e-5
            used = bases[group][:, np.abs(bases[group]).max(0) > 0]  # a group may need fewer than others
            assert np.abs(used.T @ used - np.eye(used.shape[1])).max() <= 1e-5


def test_grouped_convolutions_have_a_basis_for_each_group(story):
    groups = {name: story.memory.layers[name].groups for name in LAYERS}
    grouped = {"body.3": 12, "body.5": 2} if story.mode == "patch" else {}
    assert groups == dict.fromkeys(LAYERS, 1) | grouped
    if grouped:
        bases = story.memory.layers["body.5"]
        assert not np.allclose(bases.basis(0)[:, :3], bases.basis(1)[:, :3], atol=0.1)


def test_gradients_have_no_part_in_the_memory(story):
    """Of one batch, as the device computes them: `||dW M|| / ||dW||` at most 1e-5 in every layer."""
    with Bundle(story / "two.tar") as bundle:
        variant = bundle.manifest.variant()
        step = training_step(bundle, variant, starting_parameters(bundle, variant), threads=1)
        part = open_dataset(story / "two.npz", bundle.manifest.split).train
    rows = np.arange(story.manifest.batch_size)
    batch = Batch(part, rows, np.zeros(len(rows), bool), story.manifest.preprocessing)
    gradients = step.run(batch, 5, PhaseMeter(MemoryProbe()), lambda: None).gradients
    assert variant.method == "lance"
    for name, layer in story.layers.items():
        assert np.abs(gradients[layer.weight]).max() > 0
        assert drift(gradients[layer.weight], story.memory.layers[name]) <= 1e-5


# --- after training -----------------------------------------------------------------------------------


def test_trained_weights_changed_outside_of_the_memory_alone(story):
    """Momentum and clipping included: `||dW M|| / ||dW||` at most 1e-3 (rounding of the weights)."""
    before, after = story.weights("two"), story.weights("two", "run2")
    for name, layer in story.layers.items():
        change = after[layer.weight] - before[layer.weight]
        assert np.linalg.norm(change) > 0.01 * np.linalg.norm(before[layer.weight])
        assert drift(change, story.memory.layers[name]) <= 1e-3
    accuracies = history(story / "run2")
    assert max(accuracies[-3:]) > 0.5  # of four classes
    assert accuracies[-1] > accuracies[0] - 0.05


def test_without_a_memory_weights_change_inside_too(story):
    """So that the measure above is known to see what it is there for."""
    before, after = story.weights("forget"), story.weights("forget", "forgetful")
    drifts = [
        drift(after[layer.weight] - before[layer.weight], story.memory.layers[name])
        for name, layer in story.layers.items()
    ]
    assert min(drifts) > 0.1


def chain(mode: str, weights: dict[str, np.ndarray], head: dict[str, np.ndarray]) -> nn.Module:
    """The network with task 1's head, from nothing but arrays."""
    scope: dict = {}
    exec(CODE, scope)
    network = scope[FACTORIES[mode]](3).double().eval()
    state = {name: torch.from_numpy(array) for name, array in (weights | head).items()}
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network


def first_task(story: Story, run: str | None, package: str = "two") -> nn.Module:
    heads = {name: story.weights("two")[f"heads/one/{name}"] for name in ("head.weight", "head.bias")}
    return chain(story.mode, story.weights(package, run), heads)


def calibration_images(story: Story) -> torch.Tensor:
    """The images of task 1 that the memory was made of: all full batches of the training part."""
    with Bundle(story / "one.tar") as bundle:
        split, preprocessing = bundle.manifest.split, bundle.manifest.preprocessing
    part = open_dataset(story / "one.npz", split).train
    order = np.random.default_rng(0).permutation(len(part))[: len(part) // BATCH * BATCH]
    return torch.from_numpy(load_batch(part, order, preprocessing)).double()


def test_the_old_head_is_kept_and_serves(story):
    task = story.manifest.tasks[0]
    assert (task.name, len(task.classes), story.manifest.task) == ("one", 3, "two")
    trained = story.weights("one", "run1")
    images = calibration_images(story)
    with torch.no_grad():
        expected = chain(story.mode, trained, {})(images)
        torch.testing.assert_close(first_task(story, None)(images), expected, rtol=0, atol=0)


def bound_of_logits(story: Story, images: torch.Tensor, package: str, run: str) -> float:
    """How far the energy outside of M lets task 1's logits move, in the Frobenius norm over all images.

    With P the patches (rows of inputs) of the calibration images as they were, and e the change of a layer's
    input, a layer that goes from W to W + dW changes its output by

        ||(W + dW) * e + dW P|| <= ||W + dW||_2 c ||e|| + ||dW||_2 ||(I - M M^T) P|| + ||dW M||_2 ||M^T P||

    for a convolution's c: no input value stands in more than c² patches, so ||im2col(e)|| <= c ||e||.  The
    second term is the energy outside of M, `(1 - explained) ||P||²`, the third is what rounding leaves.  A
    frozen norm multiplies each channel by at most max |gamma / sigma|; ReLU lengthens nothing, and a mean over
    S positions shortens by sqrt(S); biases cancel.  Layer after layer gives the logits.
    """
    old, new = first_task(story, None), first_task(story, run, package)
    inputs: dict[str, torch.Tensor] = {}
    for name in LAYERS:
        old.get_submodule(name).register_forward_hook(
            lambda _, arguments, output, name=name: inputs.update({name: arguments[0], name + "/y": output})
        )
    with torch.no_grad():
        old(images)
    error = 0.0
    for name in LAYERS:
        layer, memory = story.layers[name], story.memory.layers[name]
        was, now = (network.get_submodule(name).weight.detach() for network in (old, new))
        change = rows_of(story.mode, layer, now - was)  # [g, O/g, D], what meets M
        patches = patches_of(story.mode, layer, inputs[name])  # [g, D, n]
        total = patches.square().sum().item()
        explained = story.memory.tasks[0].explained[name]
        inside = change @ torch.from_numpy(memory.bases).double()
        taps = (
            1
            if layer.is_linear
            else math.prod(
                math.ceil(size / step) for size, step in zip(layer.weight_shape[2:], layer.stride, strict=True)
            )
        )
        # in channel mode a filter is k_h k_w rows of D = C, and each meets the input once: their sum
        spread = 1 if layer.is_linear or story.mode == "patch" else math.prod(layer.weight_shape[2:])
        outside = math.sqrt((1 - explained) * total * spread)
        filters = now.reshape(layer.groups, now.shape[0] // layer.groups, -1)
        error = (
            norm(filters) * math.sqrt(taps) * error
            + norm(change) * outside
            + norm(inside) * math.sqrt(total * spread)
        )
        following = {"body.0": "body.1", "body.5": "body.6"}.get(name)
        if following:
            batch_norm = old.get_submodule(following)
            scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()
            error *= scale.abs().max().item()
        if name == "body.8":
            error /= math.sqrt(math.prod(inputs["body.8/y"].shape[2:]))
    return norm(old.head.weight.detach()[None]) * error


def norm(matrices: torch.Tensor) -> float:
    """The largest spectral norm of `[g, rows, columns]`."""
    return torch.linalg.matrix_norm(matrices, 2).max().item()


def rows_of(mode: str, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    if mode == "channel" and not layer.is_linear:
        return weight.movedim(1, -1).reshape(1, -1, weight.shape[1])
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)


def patches_of(mode: str, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """`[g, D, n]`: what M is of."""
    if layer.is_linear:
        return x.T[None]
    if mode == "channel":
        return x.movedim(1, 0).reshape(1, x.shape[1], -1)
    top, left, bottom, right = layer.padding
    padded = nn.functional.pad(x, (left, right, top, bottom))
    columns = nn.functional.unfold(padded, layer.weight_shape[2:], 1, 0, layer.stride)  # [B, g D, L]
    return columns.reshape(len(x), layer.groups, -1, columns.shape[-1]).permute(1, 2, 0, 3).flatten(2)


def moved(story: Story, images: torch.Tensor, package: str, run: str) -> float:
    """How far task 1's logits moved, Frobenius norm over all images."""
    with torch.no_grad():
        was, now = first_task(story, None)(images), first_task(story, run, package)(images)
    return (now - was).norm().item()


def test_task_1_changes_by_no_more_than_the_energy_outside_of_its_memory(story):
    images = calibration_images(story)
    assert 0 < moved(story, images, "two", "run2") <= bound_of_logits(story, images, "two", "run2")


def test_the_first_layer_moves_by_the_energy_outside_alone(story):
    """Nothing before it changed, so the bound is tight there, and training without a memory breaks it."""
    images, layer = calibration_images(story), story.layers["body.0"]
    patches = patches_of(story.mode, layer, images)
    explained = story.memory.tasks[0].explained["body.0"]
    spread = math.prod(layer.weight_shape[2:]) if story.mode == "channel" else 1
    outside = math.sqrt((1 - explained) * patches.square().sum().item() * spread)

    def ratio(package: str, run: str) -> float:
        was, now = (network.body[0].weight.detach() for network in
                    (first_task(story, None), first_task(story, run, package)))  # fmt: skip
        with torch.no_grad():
            change = nn.functional.conv2d(images, now - was, None, 2, 1).norm().item()
        return change / (norm(rows_of(story.mode, layer, now - was)) * outside)

    assert ratio("two", "run2") <= 1.001  # rounding of the weights
    assert ratio("forget", "forgetful") > 1.001


def test_what_is_forgotten_without_a_memory_is_kept_with_it(story):
    images = calibration_images(story)
    assert moved(story, images, "two", "run2") < 0.5 * moved(story, images, "forget", "forgetful")
