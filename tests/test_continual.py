"""Two tasks through the whole path, workstation and board: what is protected, and what that is worth.

Patch mode with a depthwise and a grouped convolution (a basis for each group), and channel mode without.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from continual_story import FACTORIES, MODES, Story, story_of
from continual_tasks import BATCH, CODE, LAYERS
from torch import nn

from lance_device.features import Batch
from lance_device.graphs import starting_parameters
from lance_device.measure import PhaseMeter
from lance_device.probe import MemoryProbe
from lance_device.step import training_step
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch
from lance_edge.manifest import Layer
from lance_edge.memory import drift


@pytest.fixture(scope="module", params=MODES)
def story(request, made_once, lance_host, lance_device):
    return story_of(request.param, made_once, lance_host, lance_device)


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
    for name, layer in story.trained.items():
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


def test_a_layer_without_null_space_is_frozen_and_reported(story):
    """In channel mode the three channels of the images are needed, all of them."""
    frozen = {one.layer: one.reason for one in story.manifest.frozen}
    said = (story / "two.txt").read_text()
    assert set(frozen) == ({"body.0"} if story.mode == "channel" else set())
    assert set(frozen) | set(story.trained) == set(LAYERS)
    assert story.manifest.protected == tuple(story.trained)
    for name, reason in frozen.items():
        assert reason == (
            "its null space is used up (3 of 3 dimensions are protected, and this task has nothing outside of"
            " them)"
        )
        assert f"{name} stays frozen: {reason}" in said
        before, after = story.weights("one", "run1"), story.weights("two", "run2")
        np.testing.assert_array_equal(after[f"{name}.weight"], before[f"{name}.weight"])


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
    for name, layer in story.trained.items():
        assert np.abs(gradients[layer.weight]).max() > 0
        assert drift(gradients[layer.weight], story.memory.layers[name]) <= 1e-5


# --- after training -----------------------------------------------------------------------------------


def test_trained_weights_changed_outside_of_the_memory_alone(story):
    """Momentum and clipping included: `||dW M|| / ||dW||` at most 1e-3 (rounding of the weights)."""
    before, after = story.weights("two"), story.weights("two", "run2")
    for name, layer in story.trained.items():
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
        for name, layer in story.trained.items()
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

    With P the patches (rows of inputs) of the calibration images as they were, and e how far a layer's input
    moved, a layer that goes from W to W + dW moves its output by

        ||(W + dW) * e + dW P|| <= a ||e|| + ||dW||_2 ||(I - M M^T) P||,    a = ||(W + dW) * e|| / ||e||,

    because dW M = 0.  The second term is the energy outside of M, `(1 - explained) ||P||²` by the memory's own
    account.  What lies between two layers (norm, ReLU, mean) takes a movement d of its input to g ||d||.  The
    gains a and g are taken from the two networks as they are: with them a bound on e gives one on the next e,
    and the logits' follows layer after layer from nothing but dW and the energies.
    """
    old, new = first_task(story, None), first_task(story, run, package)
    (was, were), (now, are) = (traced(network, images) for network in (old, new))
    bound = 0.0
    for name, following in zip(LAYERS, (*LAYERS[1:], "head"), strict=True):
        layer = story.layers[name]
        change = new.get_submodule(name).weight.detach() - old.get_submodule(name).weight.detach()
        energy = patches_of(story.mode, layer, was[name]).square().sum().item()
        # In channel mode each input meets k_h k_w rows of dW, whose sum an output is: Cauchy and Schwarz.
        spread = 1 if layer.is_linear or story.mode == "patch" else math.prod(layer.weight_shape[2:])
        outside = math.sqrt((1 - story.memory.tasks[0].explained[name]) * energy * spread)
        bound = gain(new.get_submodule(name), now[name], was[name]) * bound
        bound += norm(rows_of(story.mode, layer, change)) * outside
        step = (are[name] - were[name]).norm().item()
        bound *= (now[following] - was[following]).norm().item() / step if step else 0.0
    return gain(old.head, now["head"], was["head"]) * bound


def gain(module: nn.Module, now: torch.Tensor, was: torch.Tensor) -> float:
    """How much longer the difference of two inputs is behind a linear map."""
    with torch.no_grad():
        length = (now - was).norm().item()
        return (module(now) - module(was)).norm().item() / length if length else 0.0


def traced(network: nn.Module, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and outputs of the layers and the head."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = arguments[0], output

        return hook

    for name in (*LAYERS, "head"):
        network.get_submodule(name).register_forward_hook(note(name))
    with torch.no_grad():
        network(images)
    return inputs, outputs


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
    """Through five layers the bound is wide: that training without a memory breaks it shows at the first."""
    images = calibration_images(story)
    found, bound = moved(story, images, "two", "run2"), bound_of_logits(story, images, "two", "run2")
    assert 0 < found <= bound


def test_norms_are_as_the_first_task_left_them(story):
    """Statistics, scale and shift: they change what earlier tasks see, whatever the memory protects."""
    before, after = story.weights("one", "run1"), story.weights("two", "run2")
    norms = {f"body.{number}.{name}" for number in (1, 6) for name in ("running_mean", "running_var")}
    norms |= {f"body.{number}.{name}" for number in (1, 6) for name in ("weight", "bias")}
    assert norms <= before.keys()
    for name in norms:
        np.testing.assert_array_equal(after[name], before[name])


def test_the_first_trained_layer_moves_by_the_energy_outside_alone(story):
    """Nothing before it changed, so the bound is tight there, and training without a memory breaks it."""
    name = next(name for name in LAYERS if name in story.trained)
    layer, module = story.layers[name], first_task(story, None).get_submodule(name)
    x = traced(first_task(story, None), calibration_images(story))[0][name]
    explained = story.memory.tasks[0].explained[name]
    spread = math.prod(layer.weight_shape[2:]) if story.mode == "channel" else 1
    energy = patches_of(story.mode, layer, x).square().sum().item()

    def ratio(package: str, run: str) -> float:
        now = first_task(story, run, package).get_submodule(name).weight.detach()
        change = now - module.weight.detach()
        with torch.no_grad():
            moved = nn.functional.conv2d(x, change, None, module.stride, module.padding, 1, module.groups)
        bound = norm(rows_of(story.mode, layer, change)) * math.sqrt((1 - explained) * energy * spread)
        return moved.norm().item() / bound

    assert 0.1 < ratio("two", "run2") <= 1.001  # 0.001: rounding of the weights
    if story.mode == "patch":  # channels are few: the bound is not as tight
        assert ratio("forget", "forgetful") > 1.001


def test_what_is_forgotten_without_a_memory_is_kept_with_it(story):
    images = calibration_images(story)
    assert moved(story, images, "two", "run2") < 0.5 * moved(story, images, "forget", "forgetful")
