"""Gradient projection against PyTorch; what protection forbids; resuming."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from device_harness import arrays, assert_same_arrays, refused, started, train
from power_cut import assert_same_run
from tiny_package import CHANNELS, FEATURES, PREPROCESSING, SPLIT, tiny_manifest
from tiny_training import loss_of, trainable

from lance_device.protect import Protection, protection
from lance_edge.bundle import Bundle, write_bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import ArtifactError
from lance_edge.images import load_batch
from lance_edge.manifest import Layer, LayerPlan, Task, TensorSpec, Variant
from lance_edge.memory import LayerMemory, LearnedTask, Memory, drift, memory_bytes, pack, write_memory
from lance_edge.names import MEMORY_MEMBER

PLAIN = ("--no-shuffle", "--augment", "none", "--method", "bp", "--micro-batch", 6, "--cache", "off")
FLAGS = (*PLAIN, "--steps", 20, "--lr", 0.2, "--momentum", 0.9, "--clip", 0.5, "--schedule", "constant")


def memory_of(layers, mode="patch", model="tiny"):
    ranks = {name: layer.ranks for name, layer in layers.items()}
    learned = LearnedTask("one", 0.97, ranks, dict.fromkeys(layers, 0.97))
    return Memory(mode, model, (learned,), layers)


def random_memory(groups, dimension, ranks, seed=0):
    rng = np.random.default_rng(seed)
    return pack([np.linalg.qr(rng.standard_normal((dimension, rank)))[0] for rank in ranks])


@pytest.fixture(scope="module")
def memory():
    return memory_of({"conv": random_memory(1, FEATURES, [3])})


@pytest.fixture(scope="module")
def file(memory, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.npz"
    write_memory(path, memory)
    return path


def gpm_in_torch(package, images, basis, steps, lr, momentum, clip):
    """GPM as published: autograd's gradient, projected, then PyTorch's clipping and SGD."""
    part = open_dataset(images, SPLIT).train
    weights = trainable(package)
    sgd = torch.optim.SGD(weights.values(), lr=lr, momentum=momentum)
    for step in range(steps):
        rows = [(step * package.batch_size + i) % len(part) for i in range(package.batch_size)]
        loss = loss_of(package, weights, "bp", load_batch(part, rows, PREPROCESSING), part.labels[rows])
        sgd.zero_grad()
        loss.backward()
        gradient = weights["conv.weight"].grad
        flat = gradient.reshape(CHANNELS, FEATURES)
        gradient.copy_((flat - flat @ basis @ basis.T).reshape(gradient.shape))
        torch.nn.utils.clip_grad_norm_(weights.values(), clip)
        sgd.step()
    return {name: value.detach().numpy() for name, value in weights.items()}


def test_training_with_a_memory_equals_gpm_in_pytorch(package, images, memory, file, tmp_path):
    started(train(package, images, tmp_path / "run", *FLAGS, "--protect", file))
    basis = torch.from_numpy(memory.layers["conv"].basis(0).copy())
    expected = gpm_in_torch(package, images, basis, 20, 0.2, 0.9, 0.5)
    found = arrays(tmp_path / "run/last.npz")
    for name, value in expected.items():
        moved = np.abs(value - package.weights[name]).max()  # float32 over 20 steps, as in test_train
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-3 * moved, err_msg=name)
    change = found["conv.weight"] - package.weights["conv.weight"]
    assert np.abs(change).max() > 1e-2
    assert drift(change, memory.layers["conv"]) < 1e-5  # one layer, 20 steps: far below the 1e-3 of a task


def test_without_it_training_leaves_the_null_space(package, images, memory, tmp_path):
    started(train(package, images, tmp_path / "run", *FLAGS))
    change = arrays(tmp_path / "run/last.npz")["conv.weight"] - package.weights["conv.weight"]
    assert drift(change, memory.layers["conv"]) > 0.3


GROUPED = Layer("g", "g.weight", (8, 2, 3, 3), (8, 6, 6), (8, 6, 6), (1, 1), (1, 1, 1, 1), (1, 1), 4)
LINEAR = Layer("f", "f.weight", (5, 7), (7,), (5,), (), (), (), 1)
WIDE = dataclasses.replace(GROUPED, name="w", weight="w.weight", weight_shape=(8, 8, 3, 3), groups=1)


def bp_of(layers, parameters=None):
    plans = tuple(LayerPlan(layer.name, (), (), 0, 0, 0) for layer in layers)
    names = parameters or tuple(layer.weight for layer in layers)
    variant = Variant("bp", None, "one pass", {}, names, plans, (), (), (), (), (), (), {})
    specs = tuple(TensorSpec(name, (1,), "float32") for name in names)
    manifest = tiny_manifest(
        {}, batch_size=4, split=SPLIT, preprocessing=PREPROCESSING, parameters=specs, layers=tuple(layers),
        variants=(variant,),
    )  # fmt: skip
    return manifest, variant


def test_each_group_is_projected_by_its_own_basis_and_almost_all_of_it_too():
    """Literally filter by filter; the second gradient lies in M but for a thousandth."""
    layer = random_memory(4, 18, [3, 0, 17, 18])
    chosen = protection(memory_of({"g": layer, "f": random_memory(1, 7, [2], 1)}), *bp_of([GROUPED, LINEAR]))
    rng = np.random.default_rng(3)
    plain = rng.standard_normal((8, 2, 3, 3)).astype(np.float32)
    rows = plain.reshape(4, 2, 18)
    inside = rows @ layer.bases @ layer.bases.transpose(0, 2, 1)
    for weight in (plain, (inside + 1e-3 * (rows - inside)).reshape(plain.shape)):
        gradients = {"g.weight": weight.copy(), "f.weight": rng.standard_normal((5, 7)).astype(np.float32)}
        chosen.project(gradients)
        for filter_number in range(8):
            basis = layer.basis(filter_number // 2).astype(np.float64)
            row = weight[filter_number].reshape(18).astype(np.float64)
            expected = row - basis @ (basis.T @ row)
            found = gradients["g.weight"][filter_number].reshape(18)
            np.testing.assert_allclose(found, expected, atol=1e-6 * max(np.linalg.norm(row), 1e-9))
        assert drift(gradients["g.weight"][:6], LayerMemory(layer.bases[:3], layer.ranks[:3])) <= 1e-5


def test_a_group_inside_the_memory_is_projected_again_whatever_the_others_do():
    """Of group 0 float32 leaves nothing but rounding, which one projection turns towards M again."""
    layer = random_memory(4, 18, [9, 9, 9, 9])
    chosen = protection(memory_of({"g": layer}), *bp_of([GROUPED]))
    rows = np.random.default_rng(3).standard_normal((4, 2, 18)).astype(np.float32)
    inside = rows[0] @ layer.bases[0] @ layer.bases[0].T
    rows[0] = inside + 1e-5 * (rows[0] - inside)
    gradients = {"g.weight": rows.reshape(8, 2, 3, 3).copy()}
    chosen.project(gradients)
    left = gradients["g.weight"].reshape(4, 2, 18)
    assert np.linalg.norm(left[1]) > 1
    for group in range(4):
        alone = LayerMemory(layer.bases[group : group + 1], layer.ranks[group : group + 1])
        assert drift(left[group].reshape(2, 2, 3, 3), alone) <= 1e-5


def test_in_channel_mode_the_channels_are_projected():
    layer = random_memory(1, 8, [3])
    chosen = protection(memory_of({"w": layer}, "channel"), *bp_of([WIDE]))
    weight = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
    gradients = {"w.weight": weight.copy()}
    chosen.project(gradients)
    basis = layer.basis(0)
    expected = weight - np.einsum("oikl,im,cm->ockl", weight, basis, basis)
    np.testing.assert_allclose(gradients["w.weight"], expected, atol=1e-5)


def test_a_memory_that_does_not_fit_is_refused():
    def refusal(memory, layers, parameters=None):
        with pytest.raises(ArtifactError) as caught:
            protection(memory, *bp_of(layers, parameters))
        return str(caught.value)

    linear = memory_of({"f": random_memory(1, 7, [2])})
    message = refusal(linear, [LINEAR, GROUPED])
    assert "trains g, which the memory does not protect; it knows f: train fewer --layers" in message
    message = refusal(memory_of({"f": random_memory(1, 6, [2])}), [LINEAR])
    assert "f has 1 groups of 6 dimensions, in the package 1 of 7 (patch mode); give the memory of" in message
    message = refusal(linear, [LINEAR], ("f.weight", "head.weight", "bn.bias"))
    assert (
        "trains bn.bias, which no memory protects; calibrate without --train-bias and --train-norm" in message
    )


def test_protection_is_a_table_of_weights(memory):
    chosen = Protection({"conv.weight": memory.layers["conv"].bases}, "patch", "digest")
    gradients = {"conv.weight": np.ones((2, FEATURES, 1, 1), np.float32), "head.bias": np.ones(3, np.float32)}
    chosen.project(gradients)
    assert (gradients["head.bias"] == 1).all()


# --- runs ---


def test_weight_decay_is_refused(package, images, file, tmp_path):
    line = refused(train(package, images, tmp_path / "run", "--protect", file, "--weight-decay", 0.1), 1)
    assert "--weight-decay 0.1: it would change conv" in line
    assert "leave it out after the first task" in line


def test_a_resumed_run_keeps_its_memory(package, images, file, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    started(train(package, images, whole, *FLAGS, "--protect", file))
    flags = [*FLAGS, "--checkpoint-every", 5]
    prelude_free = train(package, images, cut, *flags, "--protect", file)  # to the end, then back to step 15
    started(prelude_free)
    (cut / "previous.npz").replace(cut / "last.npz")
    started(train(package, images, cut, "--resume"))
    assert_same_arrays(cut / "last.npz", whole / "last.npz")
    started(train(package, images, cut, "--resume", "--protect", file))
    assert json.loads((cut / "run.json").read_text())["options"]["protect"]


def test_another_memory_is_refused_when_a_run_goes_on(package, images, file, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other.npz"
    started(train(package, images, out, *FLAGS, "--protect", file))
    write_memory(other, memory_of({"conv": random_memory(1, FEATURES, [3], seed=9)}))
    line = refused(train(package, images, out, "--resume", "--protect", other), 4)
    assert "started with another memory; a resumed run keeps its options" in line
    (out / "protect.npz").write_bytes(other.read_bytes())
    line = refused(train(package, images, out, "--resume"), 4)
    assert "protect.npz: not the memory that the run was started with; bring back the file" in line
    plain = tmp_path / "plain"
    started(train(package, images, plain, *FLAGS))
    line = refused(train(package, images, plain, "--resume", "--protect", file), 4)
    assert "started with no --protect" in line


def test_a_run_that_was_cut_off_before_its_first_checkpoint_begins_anew(package, images, file, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "protect.npz").write_bytes(b"of a run that never got a checkpoint")
    started(train(package, images, out, *FLAGS, "--protect", file, "--resume-or-start"))
    whole = tmp_path / "whole"
    started(train(package, images, whole, *FLAGS, "--protect", file))
    assert_same_run(out, whole)


def test_the_memory_of_the_package(package, images, memory, file, tmp_path):
    line = refused(train(package, images, tmp_path / "run", *FLAGS, "--protect", "package"), 3)
    assert "holds no memory of earlier tasks; give --protect the memory.npz of lance-host memory" in line
    with Bundle(package.path) as bundle:
        manifest = bundle.manifest
        contents = {member.name: bundle.read(member.name) for member in manifest.members}
    contents[MEMORY_MEMBER] = memory_bytes(memory)
    head = (TensorSpec("head.weight", (3, CHANNELS), "float32"), TensorSpec("head.bias", (3,), "float32"))
    tasks = (Task("one", manifest.classes, head),)
    changed = tiny_manifest(
        contents, batch_size=16, split=manifest.split, preprocessing=manifest.preprocessing,
        parameters=manifest.parameters, layers=manifest.layers, variants=manifest.variants, task="two",
        tasks=tasks, protected=("conv",),
    )  # fmt: skip
    write_bundle(tmp_path / "next.tar", changed, contents)
    second = dataclasses.replace(package, path=tmp_path / "next.tar")
    started(train(second, images, tmp_path / "a", *FLAGS, "--protect", "package"))
    started(train(package, images, tmp_path / "b", *FLAGS, "--protect", file))
    assert_same_arrays(tmp_path / "a/last.npz", tmp_path / "b/last.npz")
    result = started(train(second, images, tmp_path / "d", *FLAGS))
    assert "warning: plain bp forgets one; --protect package leaves alone what is needed of it" in result.stderr
    line = refused(train(second, images, tmp_path / "c", "--weight-decay", 0.1), 1)
    assert "--weight-decay 0.1: it would change conv" in line
