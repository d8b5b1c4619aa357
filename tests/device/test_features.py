import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from device_harness import arrays, assert_same_arrays, lance_device, refused, spawn, started, table, train
from device_harness import train_words as words
from onnx import TensorProto, helper, numpy_helper
from tiny_package import PREPROCESSING, SPLIT, write_images, write_tiny_package
from tiny_training import features_of

from lance_device import cache_plan
from lance_device.bench_features import open_bench_features
from lance_device.cache import Layout, RecordFile
from lance_device.cache_plan import choose, open_features, plan_cache, source_identity
from lance_device.features import Batch, CachedFeatures, ComputedFeatures, Packing, Shelf, Unmetered, widen
from lance_device.graphs import load_graph
from lance_device.options import TrainOptions
from lance_device.session import Graph
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import ArtifactError, StorageError
from lance_edge.images import load_batch
from lance_edge.manifest import TensorSpec

OPTIONS = TrainOptions(
    method="lance",
    layers=1,
    epochs=6,
    steps=None,
    lr=0.2,
    momentum=0.9,
    weight_decay=0.0,
    clip=2.0,
    schedule="cosine",
    augment="flip",
    label_smoothing=0.0,
    class_weights="none",
    seed=0,
    threads=1,
    micro_batch=8,
    shuffle=True,
    eval_every=1,
    cache="on",
    cache_size=1 << 20,
    cache_dir=None,
)
RECORD_BYTES = 2 * 6 * 6 * 6
LENGTH = ("--epochs", 6, "--lr", 0.2)


@pytest.fixture
def opened(package, images, tmp_path):
    """Open the features of the tiny package, as a run does; gives them, the data set and all notes."""
    everything = []

    def opened(options=OPTIONS, root=images):
        notes = []
        with Bundle(package.path) as bundle:
            dataset = open_dataset(root, bundle.manifest.split, bundle.manifest.classes)
            variant = bundle.manifest.variant(options.method)
            plan = plan_cache(options, 14, bundle, variant, dataset, tmp_path)
            prefix = load_graph(bundle, variant, "prefix", 1)
            features = open_features(plan, options, prefix, dataset, notes.append)
        everything.append(features)
        return features, dataset, notes

    yield opened
    for features in everything:
        features.close()


def batch_of(part, indices, flips=None):
    flips = np.zeros(len(indices), np.bool_) if flips is None else np.array(flips)
    return Batch(part, np.array(indices), flips, PREPROCESSING)


def ask(features, batch, rows=None):
    return features.boundary(batch, rows or slice(0, len(batch)), Unmetered())["features"]


def expected(package, batch):
    """Computed by PyTorch; then rounded."""
    prepared = load_batch(batch.part, batch.indices, PREPROCESSING, batch.flips)
    return features_of(package, prepared).numpy()


def assert_rounded(found, exact):
    """To float16: relative 2^-11 (half a unit in the last of 11 bits), or 2^-25 below the normal numbers.

    1e-6 on top: ONNX Runtime and PyTorch sum in another order, which may also round the other way.
    """
    np.testing.assert_allclose(found, exact, rtol=2**-11 + 1e-6, atol=2**-25 + 1e-6)
    assert (found == found.astype(np.float16)).all()


def test_widening_is_exact_for_every_finite_half():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    np.testing.assert_array_equal(widen(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_features_are_the_prefix_rounded_and_then_read_back_to_the_same_bits(package, opened):
    features, dataset, _ = opened()
    batch = batch_of(dataset.train, [4, 0, 9, 30], [True, False, True, False])
    first = ask(features, batch)
    assert_rounded(first, expected(package, batch))
    assert features.computed == 4
    again = ask(features, batch)
    np.testing.assert_array_equal(again, first)
    assert features.computed == 4


def test_each_flip_has_its_own(package, opened):
    features, dataset, _ = opened()
    plain, mirrored = (batch_of(dataset.train, [3], [flip]) for flip in (False, True))
    assert not np.array_equal(ask(features, plain), ask(features, mirrored))
    assert features.computed == 2
    for batch in (plain, mirrored):
        assert_rounded(ask(features, batch), expected(package, batch))
    assert features.computed == 2


def test_only_what_is_missing_is_computed(package, opened):
    features, dataset, _ = opened()
    ask(features, batch_of(dataset.train, [1, 2, 3]))
    mixed = batch_of(dataset.train, [2, 8, 1, 7, 7])  # 7 stands twice, as at the seam of two epochs
    assert_rounded(ask(features, mixed), expected(package, mixed))
    assert features.computed == 3 + 3
    ask(features, mixed)
    assert features.computed == 6


def test_an_image_that_stands_twice_takes_the_room_of_one(package, opened):
    features, dataset, _ = opened()
    features._shelves[dataset.train].room = 2
    ask(features, batch_of(dataset.train, [7, 7, 5]))
    assert features.computed == 3
    ask(features, batch_of(dataset.train, [5, 7]))
    assert features.computed == 3


def test_parts_do_not_mix(package, opened):
    features, dataset, _ = opened()
    for part in (dataset.train, dataset.validation, dataset.test):
        batch = batch_of(part, [0, 1])
        for _ in range(2):
            assert_rounded(ask(features, batch), expected(package, batch))
    assert features.computed == 6


def test_micro_batches_are_rows_of_the_batch(opened):
    features, dataset, _ = opened()
    batch = batch_of(dataset.train, range(12), [True, False] * 6)
    parts = [ask(features, batch, slice(start, min(start + 5, 12))) for start in range(0, 12, 5)]
    np.testing.assert_array_equal(np.concatenate(parts), ask(features, batch))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_large_micro_batch_holds_few_images_at_a_time(package, opened, monkeypatch, cache):
    loaded = []
    images = Batch.images
    monkeypatch.setattr(Batch, "images", lambda self, rows: loaded.append(len(rows)) or images(self, rows))
    features, dataset, _ = opened(replace(OPTIONS, cache=cache))
    ask(features, batch_of(dataset.train, [7]))
    loaded.clear()
    batch = batch_of(dataset.train, np.arange(20))
    found = ask(features, batch)
    assert loaded == ([8, 8, 3] if cache == "on" else [8, 8, 4])  # image 7 is there already
    exact = expected(package, batch)
    if cache == "on":
        assert_rounded(found, exact)
    np.testing.assert_allclose(found, exact, rtol=2**-11, atol=1e-6)


def test_another_process_finds_them_and_adds_to_them(package, opened):
    features, dataset, notes = opened()
    ask(features, batch_of(dataset.train, [1, 2, 3]))
    assert notes[0].endswith("features.cache: holds 0 of 96 features of 432 B each, has room for 96 more")
    features.close()
    features, dataset, notes = opened()
    assert notes[0].endswith("features.cache: holds 3 of 96 features of 432 B each, has room for 93 more")
    batch = batch_of(dataset.train, [1, 2, 3, 4])
    assert_rounded(ask(features, batch), expected(package, batch))
    assert features.computed == 1


def test_a_damaged_record_is_computed_again_and_said_once(package, opened, tmp_path):
    features, dataset, _ = opened()
    batch = batch_of(dataset.train, [1, 2, 3])
    first = ask(features, batch)
    features.close()
    path = tmp_path / "features.cache"
    data = bytearray(path.read_bytes())
    data[-2 * RECORD_BYTES - 1] ^= 0x10  # in the first record
    path.write_bytes(data)
    features, dataset, notes = opened()
    for _ in range(2):
        np.testing.assert_array_equal(ask(features, batch_of(dataset.train, [1, 2, 3])), first)
    assert features.computed == 1
    told = "features.cache: a damaged record was found; such features are computed again"
    assert [note for note in notes if "a damaged record" in note] == [f"{tmp_path}/{told}"]


def test_a_changed_image_makes_all_stale(package, opened, tmp_path):
    root = write_images(tmp_path / "own")
    features, dataset, _ = opened(root=root)
    ask(features, batch_of(dataset.train, [0, 1]))
    features.close()
    name = dataset.train.names[1]
    (root / name).write_bytes((root / dataset.train.names[30]).read_bytes())
    features, dataset, notes = opened(root=root)
    assert notes[0].endswith("features.cache: emptied, its images differ from this run's")
    batch = batch_of(dataset.train, [0, 1])
    assert_rounded(ask(features, batch), expected(package, batch))
    assert features.computed == 2


def test_a_folder_that_moved_with_its_times_is_the_same(opened, tmp_path):
    root = write_images(tmp_path / "own")
    before = source_identity(open_dataset(root, SPLIT))
    root.rename(tmp_path / "moved")
    assert source_identity(open_dataset(tmp_path / "moved", SPLIT)) == before
    file = next((tmp_path / "moved/red").iterdir())
    os.utime(file, ns=(0, 1))
    assert source_identity(open_dataset(tmp_path / "moved", SPLIT)) != before


def test_an_npz_is_told_by_its_file(tmp_path):
    path = tmp_path / "data.npz"

    def identity(seed):
        x = np.random.default_rng(seed).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(path, x=x, y=np.arange(12) % 3)
        os.utime(path, ns=(seed, seed))
        return source_identity(open_dataset(path, SPLIT))

    assert identity(1) == identity(1) != identity(2)


def test_two_runs_at_once_get_the_same_features(opened):
    first, dataset, _ = opened()
    second, same, notes = opened()
    assert notes[0].endswith("features.cache: another run is using this cache; this run computes its features")
    indices = [5, 6]
    for _ in range(2):
        np.testing.assert_array_equal(
            ask(first, batch_of(dataset.train, indices)), ask(second, batch_of(same.train, indices))
        )
    assert (first.computed, second.computed) == (2, 4)


# --- beyond float16 ---


@pytest.fixture
def scaling(images, tmp_path):
    """Features of a prefix that multiplies by a number: `[N, 3, 12, 12]`."""

    def scaling(factor):
        spec = TensorSpec("scaled", ("N", 3, 12, 12), "float32")
        shape = ["N", 3, 12, 12]
        graph = helper.make_graph(
            [helper.make_node("Mul", ["images", "factor"], ["scaled"])],
            "scaling",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        dataset, packing, notes = open_dataset(images, SPLIT), Packing((spec,)), []
        layout = Layout({}, len(dataset.train), 2 * packing.elements)
        file = RecordFile(tmp_path / "f.cache", layout, layout.nbytes(100))
        shelf = Shelf(0, 1, len(dataset.train))
        prefix = Graph(model.SerializeToString(), "scaling", 1)
        return CachedFeatures(prefix, packing, {dataset.train: shelf}, file, notes.append), dataset, notes

    return scaling


def test_an_image_beyond_float16_stays_exact_and_is_computed_every_time(images, scaling):
    values = load_batch(open_dataset(images, SPLIT).train, range(12), PREPROCESSING)
    peaks = np.abs(values).max(axis=(1, 2, 3))
    exact = values * np.float32(65504 / np.sort(peaks)[6])
    fits = np.abs(exact).max(axis=(1, 2, 3)) < 65520  # what is less is rounded to 65504 (IEEE 754, 4.3.1)
    assert 0 < fits.sum() < 12
    features, dataset, notes = scaling(65504 / np.sort(peaks)[6])
    batch = batch_of(dataset.train, range(12))
    for computed in (12, 12 + (~fits).sum()):
        found = features.boundary(batch, slice(0, 12), Unmetered())["scaled"]
        np.testing.assert_array_equal(found[~fits], exact[~fits])
        np.testing.assert_array_equal(found[fits], exact[fits].astype(np.float16).astype(np.float32))
        assert features.computed == computed
    assert notes == ["features of some images exceed float16; they are computed every time"]
    features.close()


def test_a_manifest_of_other_shapes_is_refused():
    packing = Packing((TensorSpec("a", ("N", 2, 3), "float32"),))
    with pytest.raises(ArtifactError, match=r"prefix gives a \[3, 2\] an image, the manifest says \[2, 3\]"):
        packing.pack({"a": np.zeros((5, 3, 2), np.float32)})


def test_a_record_holds_the_tensors_one_after_the_other():
    packing = Packing((TensorSpec("a", ("N", 2, 3), "float32"), TensorSpec("b", ("N", 4), "float32")))
    values = {"a": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "b": -np.ones((2, 4), np.float32)}
    halves, fits = packing.pack(values)
    assert halves.tolist() == [[0, 1, 2, 3, 4, 5, -1, -1, -1, -1], [6, 7, 8, 9, 10, 11, -1, -1, -1, -1]]
    assert fits.all()
    for name, value in packing.unpack(halves).items():
        np.testing.assert_array_equal(value, values[name])


# --- whether, where, how much ---


@pytest.fixture
def planned(package, images, tmp_path):
    """The plan of a run of the tiny package: 36 training, 9 validation, 15 test images, batches of 16."""

    def planned(total_steps=14, **changes):
        with Bundle(package.path) as bundle:
            dataset = open_dataset(images, bundle.manifest.split, bundle.manifest.classes)
            options = replace(OPTIONS, **changes)
            variant = bundle.manifest.variant(options.method)
            return plan_cache(options, total_steps, bundle, variant, dataset, tmp_path / "run")

    return planned


def test_auto_is_on_where_images_are_seen_again(planned):
    assert choose(planned(total_steps=3), "auto") == ("on", "images are seen 1.33 times")
    assert choose(planned(total_steps=2), "auto") == ("off", "every image is seen only once")
    shared = planned(total_steps=2, cache_dir="/nowhere/at/all")
    assert choose(shared, "auto") == ("on", "runs share it")
    assert choose(planned(), "off") == ("off", "as asked for")
    assert choose(planned(total_steps=2), "on") == ("on", "as asked for")


def test_packages_that_divide_the_same_prefix_otherwise_share_a_file(package, images, tmp_path):
    with Bundle(package.path) as bundle:
        dataset = open_dataset(images, bundle.manifest.split, bundle.manifest.classes)
        variant = bundle.manifest.variant(OPTIONS.method)
        members = [member.name for member in bundle.manifest.members]
        options = replace(OPTIONS, cache_dir=str(tmp_path))

        def path(prefix, digest):
            graphs = {**variant.graphs, "prefix": prefix}
            one = replace(variant, graphs=graphs, prefix_sha256=digest)
            return plan_cache(options, 3, bundle, one, dataset, tmp_path / "run").path

        assert path((members[0],), "aa") == path((members[1],), "aa")
        assert path((members[0],), "aa") != path((members[0],), "bb")
        assert path((members[0],), None) != path((members[1],), None), (
            "of packages that do not say, the members"
        )


def test_auto_is_off_where_there_is_no_room(planned, monkeypatch):
    overhead = planned().layout.nbytes(0)
    assert choose(planned(cache_size=overhead + 10 * RECORD_BYTES), "auto")[0] == "on"  # 10 of 96
    cache, reason = choose(planned(cache_size=overhead + 9 * RECORD_BYTES), "auto")
    assert cache == "off"
    assert reason.startswith("9 of 96 features would fit: --cache-size 11.8 KiB, ")
    assert reason.endswith(" free on the disk, of which 128.00 MiB stay free")
    monkeypatch.setattr(cache_plan, "_free_bytes", lambda path: cache_plan.RESERVE_BYTES + overhead)
    assert choose(planned(), "auto")[1].startswith(
        "0 of 96 features would fit: --cache-size 1.00 MiB, 128.01 MiB"
    )


def test_what_cannot_be_kept_is_off_even_if_asked_for(planned):
    plan = planned(augment="crop")
    why = "with --augment crop an image never looks the same twice"
    assert choose(plan, "on") == ("off", f"--cache on cannot be done: {why}")
    assert choose(plan, "auto") == ("off", why)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TensorSpec("a", ("N", 2), "int64"), "a is int64 ['N', 2], no float32 of a fixed size for each image"),
        (TensorSpec("a", (4, 2), "float32"), "a is float32 [4, 2], no float32 of a fixed size for each image"),
        (TensorSpec("a", ("N", "N"), "float32"), "a is float32 ['N', 'N'], no float32 of a fixed size"),
        (TensorSpec("a", ("N", 0), "float32"), "the frozen part of the network gives nothing"),
    ],
)
def test_boundaries_that_are_no_records(package, images, tmp_path, spec, reason):
    with Bundle(package.path) as bundle:
        dataset = open_dataset(images, SPLIT)
        variant = replace(bundle.manifest.variant("lance"), boundary=(spec,))
        plan = plan_cache(OPTIONS, 14, bundle, variant, dataset, tmp_path)
    assert choose(plan, "auto")[0] == "off"
    assert choose(plan, "auto")[1].startswith(reason)
    assert choose(plan, "on")[1].startswith(f"--cache on cannot be done: {reason}")
    prefix = SimpleNamespace(outputs=("a",))
    with pytest.raises(StorageError, match=f"^--cache on: {re.escape(reason)}.*; measure with --cache off$"):
        open_bench_features(prefix, variant, dataset.train, 16, tmp_path)


def rooms(plan, capacity):
    shelves = plan.shelves(None, capacity)
    return {part.name: shelves[part.part].room for part in plan.parts}


def test_room_goes_first_to_what_is_asked_for_most(planned):
    """An epoch asks for one of the two features of a training image, and for the only one of a test image."""
    assert rooms(planned(), 1000) == {"train": 72, "validation": 9, "test": 15}
    assert rooms(planned(), 30) == {"train": 6, "validation": 9, "test": 15}
    assert rooms(planned(), 12) == {"train": 0, "validation": 9, "test": 3}
    assert rooms(planned(augment="none"), 1000) == {"train": 36, "validation": 9, "test": 15}
    assert rooms(planned(eval_every=5), 30) == {"train": 30, "validation": 0, "test": 0}
    assert rooms(planned(eval_every=0), 1000) == {"train": 72, "validation": 0, "test": 0}
    assert rooms(planned(total_steps=2), 1000) == {"train": 0, "validation": 0, "test": 0}
    assert rooms(planned(total_steps=2, cache_dir="/x"), 1000) == {"train": 72, "validation": 9, "test": 15}


def test_methods_share_a_file_and_prefixes_do_not(planned, package, images, tmp_path):
    plan = planned(cache_dir="/x")
    assert plan.path == planned(cache_dir="/x", method="bp", augment="none", eval_every=0).path
    assert plan.identity == planned(cache_dir="/x", method="bp").identity
    assert plan.layout == planned(cache_dir="/x", augment="none").layout
    other = write_tiny_package(tmp_path / "other.tar", seed=1)
    with Bundle(other.path) as bundle:
        variant = bundle.manifest.variant("lance")
        options = replace(OPTIONS, cache_dir="/x")
        elsewhere = plan_cache(options, 14, bundle, variant, open_dataset(images, SPLIT), tmp_path)
    assert elsewhere.path != plan.path
    assert elsewhere.path.parent == plan.path.parent == Path("/x")


def test_without_a_cache_every_image_is_computed(opened):
    features, dataset, notes = opened(replace(OPTIONS, cache="off"))
    assert isinstance(features, ComputedFeatures)
    for computed in (2, 4):
        ask(features, batch_of(dataset.train, [1, 2]))
        assert features.computed == computed
    assert notes == []


def test_files_nobody_uses_make_room_in_a_shared_folder(opened, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    used_at = {"features-old.cache": 1, "features-new.cache": 3, "features-busy.cache": 0, "mine.bin": 0}
    for name, time in used_at.items():
        (shared / name).write_bytes(bytes(20_000))
        os.utime(shared / name, (time, time))
    code = f"""
import fcntl, sys
file = open({str(shared / "features-busy.cache")!r})
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    busy = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert busy.stdout.readline() == b"locked\n"
    # 8192 + 96 * 432 = 49,664 bytes for this one, 20,000 for the busy one, and one more of 20,000
    options = replace(OPTIONS, cache_dir=str(shared), cache_size=90_000)
    _, _, notes = opened(options)
    busy.communicate()
    left = {path.name for path in shared.iterdir()}
    assert left >= {"features-new.cache", "features-busy.cache", "mine.bin"}
    assert "features-old.cache" not in left
    assert notes[0] == f"{shared}/features-old.cache: removed, to stay within --cache-size 87.9 KiB"
    assert "has room for 96 more" in notes[1]


# --- a run ---


def step_rows(out):
    return [row for row in table(out / "steps.csv") if row["phase"] == "step"]


@pytest.fixture(scope="module")
def whole(package, images, tmp_path_factory):
    """A cached run without a break; `--cache auto`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, started(train(package, images, out, *LENGTH))


def test_a_run_says_what_it_chose_and_leaves_no_cache(whole):
    out, result = whole
    assert "feature cache on: images are seen 6.22 times\n" in result.stderr
    assert f"{out}/features.cache: holds 0 of 96 features of 432 B each, has room for 96 more" in result.stderr
    assert not (out / "features.cache").exists()
    assert json.loads((out / "run.json").read_text())["options"]["cache"] == "on"


def test_steps_say_whether_all_came_from_the_cache(package, images, tmp_path):
    """Without flips the second epoch, of 36 images, begins within step 3 of 16 images."""
    flags = ("--augment", "none", "--no-shuffle", "--steps", 7)
    started(train(package, images, tmp_path / "run", *flags))
    assert [row["cached"] for row in step_rows(tmp_path / "run")] == ["0", "0", "0", "1", "1", "1", "1"]
    rows = table(tmp_path / "run/steps.csv")
    assert [row["cached"] for row in rows if row["phase"] == "eval"] == ["0", "1", "1"]
    assert {row["cached"] for row in rows if row["phase"] == "checkpoint"} == {"0"}
    prefix_ms = [float(row["latency_ms"]) for row in rows if row["phase"] == "prefix"]
    assert len(prefix_ms) == 7  # cached steps have the row too
    assert {row["cached"] for row in rows if row["phase"] == "prefix" and row["step"] == "7"} == {"1"}


def test_off_is_the_run_without_it(package, images, tmp_path):
    result = started(train(package, images, tmp_path / "run", *LENGTH, "--cache", "off"))
    assert "feature cache off: as asked for" in result.stderr
    assert {row["cached"] for row in table(tmp_path / "run/steps.csv")} == {"0"}


def test_rounding_moves_accuracy_by_no_more_than_a_fifth_of_a_point(package, images, whole, tmp_path):
    """Of 15 and 36 images one is 7 and 3 points: not one prediction changes, and losses stay within 1e-3."""
    started(train(package, images, tmp_path / "run", *LENGTH, "--cache", "off"))
    for cached, exact in zip(table(whole[0] / "history.csv"), table(tmp_path / "run/history.csv"), strict=True):
        for column in ("train_accuracy", "validation_accuracy", "test_accuracy"):
            assert abs(float(cached[column]) - float(exact[column])) <= 0.002, column
        for column in ("train_loss", "validation_loss", "test_loss"):
            assert float(cached[column]) == pytest.approx(float(exact[column]), abs=1e-3), column


def test_results_do_not_depend_on_how_much_is_kept(package, images, whole, tmp_path):
    result = started(
        train(package, images, tmp_path / "few", *LENGTH, "--cache-size", "17000", "--cache", "on")
    )
    assert "holds 0 of 96 features of 432 B each, has room for 20 more" in result.stderr
    assert_same_arrays(tmp_path / "few/last.npz", whole[0] / "last.npz")
    result = started(train(package, images, tmp_path / "none", *LENGTH, "--cache-size", 0, "--cache", "on"))
    assert "features.cache: no room for features here; this run computes its features" in result.stderr
    assert_same_arrays(tmp_path / "none/last.npz", whole[0] / "last.npz")


def killed(package, images, out, step, flags=LENGTH):
    """A run of its own process that is killed (SIGKILL) right after a step."""
    prelude = f"""
import os
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == {step}:
        os.kill(os.getpid(), 9)
RunLog.step = step
"""
    process = spawn(*words(package, images, out), *flags, prelude=prelude)
    process.communicate(timeout=60)
    assert process.returncode == -9


def test_a_killed_run_finds_what_it_had_and_ends_with_the_same_bits(package, images, whole, tmp_path):
    out = tmp_path / "run"
    killed(package, images, out, 10, (*LENGTH, "--checkpoint-every", 4))
    assert (out / "features.cache").stat().st_size > 8192
    result = started(train(package, images, out, "--resume"))
    assert "feature cache on: as the run began" in result.stderr
    held = int(result.stderr.partition("features.cache: holds ")[2].split()[0])
    assert 36 < held <= 96
    assert_same_arrays(out / "last.npz", whole[0] / "last.npz")
    assert not (out / "features.cache").exists()


def test_a_cache_that_was_spoilt_changes_no_bit(package, images, whole, tmp_path):
    out = tmp_path / "run"
    killed(package, images, out, 10, (*LENGTH, "--checkpoint-every", 4))
    data = bytearray((out / "features.cache").read_bytes())
    for position in range(8192 + 5, len(data) - 40, 700):
        data[position] ^= 0x40
    (out / "features.cache").write_bytes(data[:-40])
    result = started(train(package, images, out, "--resume"))
    assert "a damaged record was found; such features are computed again" in result.stderr
    assert_same_arrays(out / "last.npz", whole[0] / "last.npz")


def test_a_disk_that_fills_up_does_not_end_the_run(package, images, tmp_path):
    """A limit on file size stands for a full disk; the checkpoint and four steps of rows stay below it."""
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))"
    out, flags = tmp_path / "run", ("--steps", 4, "--eval-every", 0)
    process = spawn(*words(package, images, out), *flags, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    told = f"{out}/features.cache: cannot write (No space left on device); the run goes on without a cache\n"
    assert errors.count("cannot write") == errors.count(told) == 1
    assert not (out / "features.cache").exists()
    started(train(package, images, tmp_path / "same", *flags))
    assert_same_arrays(out / "last.npz", tmp_path / "same/last.npz")


def test_runs_of_both_methods_share_a_folder(package, images, tmp_path):
    shared = ("--cache-dir", tmp_path / "shared")
    started(train(package, images, tmp_path / "lance", *LENGTH, *shared, "--epochs", 12))
    assert len(list((tmp_path / "shared").iterdir())) == 1  # it stays for other runs
    result = started(train(package, images, tmp_path / "bp", *LENGTH, *shared, "--method", "bp"))
    assert "feature cache on: runs share it" in result.stderr
    assert "holds 96 of 96 features" in result.stderr
    assert {row["cached"] for row in step_rows(tmp_path / "bp")} == {"1"}
    started(train(package, images, tmp_path / "alone", *LENGTH, "--method", "bp"))
    assert_same_arrays(tmp_path / "bp/last.npz", tmp_path / "alone/last.npz")
    assert len(list((tmp_path / "shared").iterdir())) == 1


def test_a_resumed_run_keeps_to_its_folder_unless_told_otherwise(package, images, whole, tmp_path):
    out, shared = tmp_path / "run", tmp_path / "shared"
    killed(package, images, out, 10, (*LENGTH, "--checkpoint-every", 4, "--cache-dir", shared))
    result = started(train(package, images, out, "--resume", "--cache", "auto"))
    assert f"{shared}/features-" in result.stderr
    assert not (out / "features.cache").exists()
    assert_same_arrays(out / "last.npz", whole[0] / "last.npz")

    other = tmp_path / "other"
    killed(package, images, other, 10, (*LENGTH, "--checkpoint-every", 4))
    flags = ("--cache-dir", tmp_path / "new", "--cache-size", "1MiB")
    result = started(train(package, images, other, "--resume", *flags))
    assert f"{tmp_path / 'new'}/features-" in result.stderr
    assert_same_arrays(other / "last.npz", whole[0] / "last.npz")


def test_a_resumed_run_cannot_change_its_rounding(package, images, whole):
    line = refused(train(package, images, whole[0], "--resume", "--cache", "off"), 4)
    assert "started with --cache on, not --cache off" in line


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("512MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("2GiB", 2 << 30), ("7KB", 7000)],
)
def test_sizes_on_the_command_line(package, images, tmp_path, text, count):
    started(train(package, images, tmp_path / "run", "--steps", 1, "--cache-size", text))
    assert json.loads((tmp_path / "run/run.json").read_text())["options"]["cache_size"] == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "inf", "nan", "3 apples", "1TiB"])
def test_sizes_that_are_none(package, images, tmp_path, text):
    result = train(package, images, tmp_path / "run", "--cache-size", text)
    assert result.exit_code == 2
    assert "expected bytes such as 512MiB or 2GB" in result.stderr


def test_evaluation_of_a_cached_run_agrees_with_the_eval_command(package, images, whole):
    """`eval` computes every feature anew, unrounded: no prediction differs, the loss by less than 1e-3."""
    flags = ("--artifact", package.path, "--checkpoint", whole[0] / "last.npz", "--data", images, "--json")
    found = json.loads(started(lance_device("eval", *flags)).stdout)
    last = table(whole[0] / "history.csv")[-1]
    assert found["accuracy"] == pytest.approx(float(last["test_accuracy"]), abs=0.002)
    assert found["loss"] == pytest.approx(float(last["test_loss"]), abs=1e-3)
    assert arrays(whole[0] / "last.npz")
