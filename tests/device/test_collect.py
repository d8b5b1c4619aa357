"""`collect` against second moments written down literally; its bound on memory; what it refuses."""

import dataclasses

import numpy as np
import pytest
from device_harness import lance_device, refused, started, train
from PIL import Image
from test_protect import memory_of, random_memory
from tiny_package import CLASSES, FEATURES, SIDE, SPLIT, write_images, write_tiny_package
from tiny_training import features_of

from lance_device.moments_pass import moment_bytes, plan_passes
from lance_edge.bundle import Bundle, write_bundle
from lance_edge.calibration_order import calibration_batches
from lance_edge.datasets import open_dataset
from lance_edge.files import file_digest
from lance_edge.images import load_batch
from lance_edge.manifest import Layer
from lance_edge.memory import memory_digest, write_memory
from lance_edge.statistics import read_statistics


@pytest.fixture(scope="module")
def run(package, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("collect") / "run"
    started(train(package, images, out, "--steps", 6, "--lr", 0.2))
    return out


@pytest.fixture
def words(package, images, run):
    return (
        "collect",
        "--artifact",
        package.path,
        "--checkpoint",
        run / "last.npz",
        "--data",
        images,
        "--mode",
        "channel",
    )


def literal_features(package, images):
    """The layer's input of every calibration batch: `[N, B, C, H, W]`; the prefix never trains."""
    with Bundle(package.path) as bundle:
        manifest = bundle.manifest
    part = open_dataset(images, manifest.split).train
    order = calibration_batches(len(part), 16, 100, manifest.seed)
    return np.stack(
        [features_of(package, load_batch(part, rows, manifest.preprocessing)).numpy() for rows in order]
    ).astype(np.float64)


def test_it_writes_the_second_moments_of_the_protected_mode_alone(package, images, run, words, tmp_path):
    output = tmp_path / "stats.npz"
    said = started(lance_device(*words, "-o", output, "--task", "colours", "--micro-batch", 5)).stdout
    assert "second moments of 1 layer from 2 batches of 16 images" in said
    found = read_statistics(output)
    x = literal_features(package, images)
    expected = np.einsum("nbchw,nbdhw->cd", x, x) / len(x)
    assert found.layers.keys() == {"conv"}
    assert found.layers["conv"].keys() == {1}
    # float32 activations of another convolution, float32 in the file: 1e-5 of the largest entry
    np.testing.assert_allclose(found.layers["conv"][1][0], expected, rtol=0, atol=1e-5 * expected.max())
    with Bundle(package.path) as bundle:
        assert found.artifact_sha256 == bundle.sha256
    assert found.checkpoint_sha256 == file_digest(run / "last.npz").hexdigest()
    assert (found.task, found.classes, found.mode) == ("colours", CLASSES, "channel")
    assert (found.memory_sha256, found.batches, found.images) == ("", 2, 32)


def test_with_a_memory_the_other_modes_are_of_what_it_leaves(package, images, words, tmp_path):
    memory = memory_of({"conv": random_memory(1, FEATURES, [2])}, mode="channel")
    write_memory(tmp_path / "memory.npz", memory)
    output = tmp_path / "stats.npz"
    started(lance_device(*words, "-o", output, "--memory", tmp_path / "memory.npz"))
    found = read_statistics(output)
    assert found.memory_sha256 == memory_digest(memory)
    basis = memory.layers["conv"].basis(0).astype(np.float64)
    x = literal_features(package, images)
    left = x - np.einsum("cm,dm,nbdhw->nbchw", basis, basis, x)
    expected = {
        0: np.einsum("nbchw,nachw->ba", left, left) / len(x),
        1: (np.einsum("nbchw,nbdhw->cd", x, x) / len(x))[None],
        2: np.einsum("nbchw,nbcgw->hg", left, left) / len(x),
        3: np.einsum("nbchw,nbchv->wv", left, left) / len(x),
    }
    assert found.layers["conv"].keys() == expected.keys()
    for mode, moment in expected.items():
        np.testing.assert_allclose(found.layers["conv"][mode], moment, rtol=0, atol=1e-5 * moment.max())


def test_a_small_bound_costs_passes_and_changes_nothing(words, tmp_path):
    started(lance_device(*words, "-o", tmp_path / "a.npz"))
    started(lance_device(*words, "-o", tmp_path / "b.npz", "--pass-memory", "1B"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_file_holds_no_more_than_second_moments(words, tmp_path):
    started(lance_device(*words, "-o", tmp_path / "stats.npz"))
    with np.load(tmp_path / "stats.npz") as archive:
        assert set(archive.files) == {"meta", "conv/C1", "sha256"}
        assert archive["conv/C1"].shape == (1, FEATURES, FEATURES)


# Layers of 8, 32 and 72 inputs; with groups one moment each.
LAYERS = tuple(
    Layer(f"l{number}", f"l{number}.weight", (8, channels, side, side), (channels * groups, SIDE, SIDE),
          (8, SIDE, SIDE), (1, 1), (side // 2,) * 4, (1, 1), groups)
    for number, (channels, side, groups) in enumerate([(8, 1, 1), (32, 1, 1), (8, 3, 4)])
)  # fmt: skip


def test_what_measuring_keeps_is_counted_and_bounds_a_pass():
    batch, positions = 16, SIDE * SIDE
    expected = [
        8 * (groups * d * d + batch * batch + positions * positions) + 4 * batch * channels * positions
        for groups, d, channels in [(1, 8, 8), (1, 32, 32), (4, 72, 32)]
    ]
    assert [moment_bytes(layer, "patch", batch, False) for layer in LAYERS] == expected
    only = [8 * g * d * d + 4 * batch * c * positions for g, d, c in [(1, 8, 8), (1, 32, 32), (4, 72, 32)]]
    assert [moment_bytes(layer, "patch", batch, True) for layer in LAYERS] == only

    def names(limit):
        return [[layer.name for layer in one] for one in plan_passes(LAYERS, "patch", batch, False, limit)]

    assert names(sum(expected)) == [["l0", "l1", "l2"]]
    assert names(expected[0] + expected[1]) == [["l0", "l1"], ["l2"]]
    assert names(1) == [["l0"], ["l1"], ["l2"]]
    assert plan_passes((), "patch", batch, False, 1) == ()


# --- refusals ---


def test_a_package_without_the_graph_is_refused(package, images, tmp_path):
    with Bundle(package.path) as bundle:
        manifest = bundle.manifest
        contents = {member.name: bundle.read(member.name) for member in manifest.members}
    variants = tuple(
        dataclasses.replace(v, graphs={role: names for role, names in v.graphs.items() if role != "inputs"})
        for v in manifest.variants
    )
    write_bundle(tmp_path / "old.tar", dataclasses.replace(manifest, variants=variants), contents)
    old = dataclasses.replace(package, path=tmp_path / "old.tar")
    started(train(old, images, tmp_path / "run", "--steps", 1))
    words = ("--artifact", old.path, "--checkpoint", tmp_path / "run/last.npz", "--data", images)
    line = refused(lance_device("collect", *words, "-o", tmp_path / "stats.npz"), 3)
    assert "has no graph to the inputs of its layers, so nothing can be protected; calibrate it again" in line
    assert not (tmp_path / "stats.npz").exists()


def test_a_memory_of_another_mode_is_refused(words, tmp_path):
    write_memory(tmp_path / "memory.npz", memory_of({"conv": random_memory(1, FEATURES, [2])}))
    line = refused(lance_device(*words, "-o", tmp_path / "s.npz", "--memory", tmp_path / "memory.npz"), 3)
    assert "a memory in patch mode; use --mode patch, not channel" in line


def test_too_few_images_and_bad_ones(words, tmp_path):
    few = write_images(tmp_path / "few", per_class=4)
    line = refused(lance_device(*words, "--data", few, "-o", tmp_path / "s.npz"), 5)
    assert "expected a batch size from 1 to the" in line
    many = write_images(tmp_path / "many", per_class=30)
    bad = open_dataset(many, SPLIT).train.names[7]
    (many / bad).write_bytes(b"no image")
    strict = lance_device(*words, "--data", many, "-o", tmp_path / "s.npz", "--strict")
    assert bad in refused(strict, 5)
    result = started(lance_device(*words, "--data", many, "-o", tmp_path / "s.npz"))
    assert f"warning: {bad} is left out" in result.stderr


def test_images_of_other_classes_are_welcome(words, tmp_path):
    other = tmp_path / "other"
    for number in range(40):
        folder = other / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 100, 6 * number)).save(folder / f"{number}.png")
    started(lance_device(*words, "--data", other, "-o", tmp_path / "s.npz"))
    assert read_statistics(tmp_path / "s.npz").classes == ("cat", "dog")
    assert read_statistics(tmp_path / "s.npz").task == "other"


def test_another_package_is_refused(words, tmp_path):
    other = write_tiny_package(tmp_path / "other.tar", seed=5)
    line = refused(lance_device(*words, "--artifact", other.path, "-o", tmp_path / "s.npz"), 4)
    assert "belongs to another package" in line
