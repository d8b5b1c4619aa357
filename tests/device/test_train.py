import csv
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
from device_harness import arrays, assert_same_arrays, refused, spawn, started, table, train, train_words
from tiny_package import CLASSES, RANKS, SHAPES, write_images, write_tiny_package
from tiny_training import train_in_torch

from lance_edge.bundle import Bundle, write_bundle
from lance_edge.input_spec import Split
from lance_edge.profiles import StepRow, columns

COLUMNS = [
    "run_id",
    "method",
    "model",
    "layers",
    "energy",
    "batch_size",
    "micro_batch",
    "threads",
    "epoch",
    "step",
    "warmup",
    "phase",
    "latency_ms",
    "rss_kib",
    "peak_rss_kib",
    "loss",
    "temperature_c",
    "arm_mhz",
    "throttled",
    "time_s",
    "samples",
    "cached",
    "activation_bytes",
    "saved_bytes",
]
PHASES = ["data", "prefix", "forward", "backward", "update", "step"]
PLAIN = ("--no-shuffle", "--augment", "none")


@pytest.fixture(scope="module")
def finished(package, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, started(train(package, images, out, "--epochs", 4, "--lr", 0.2))


@pytest.mark.parametrize("method", ["bp", "lance"])
@pytest.mark.parametrize(
    ("momentum", "weight_decay", "clip", "schedule"),
    [(0, 0, 0, "constant"), (0.9, 0, 2.0, "cosine"), (0.9, 0.01, 0.1, "cosine")],
)
def test_training_equals_pytorch(package, images, tmp_path, method, momentum, weight_decay, clip, schedule):
    flags = ["--momentum", momentum, "--weight-decay", weight_decay, "--clip", clip, "--schedule", schedule]
    flags += ["--method", method, "--steps", 20, "--lr", 0.2, "--micro-batch", 6, "--cache", "off"]
    started(train(package, images, tmp_path / "run", *PLAIN, *flags))
    weights, losses = train_in_torch(
        package, images, method, 20, 0.2, float(momentum), weight_decay, clip, schedule
    )
    rows = [row for row in table(tmp_path / "run/steps.csv") if row["phase"] == "step"]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], losses, rtol=1e-4)
    found = arrays(tmp_path / "run/last.npz")
    for name, expected in weights.items():
        moved = np.abs(expected - package.weights[name]).max()
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-3 * moved, err_msg=name)


def test_steps_csv_has_the_published_columns_and_a_row_per_phase(finished, package):
    out, _ = finished
    with (out / "steps.csv").open(newline="") as file:
        assert next(csv.reader(file)) == COLUMNS == list(columns(StepRow))
    rows = table(out / "steps.csv")
    steps = 9  # ceil(4 epochs * 36 images / 16)
    assert [row["phase"] for row in rows if row["phase"] in PHASES] == PHASES * steps
    assert [row["step"] for row in rows if row["phase"] == "eval"] == ["3", "5", "7", "9"]
    assert rows[-1]["phase"] == "checkpoint"
    with Bundle(package.path) as bundle:
        variant = bundle.manifest.variant("lance")
    first = rows[0]
    expected = {"method": "lance", "model": "tiny", "layers": "1", "energy": "0.7", "batch_size": "16"}
    expected |= {"micro_batch": "8", "threads": "1", "epoch": "1", "step": "1", "warmup": "1", "samples": "16"}
    expected |= {"cached": "0", "activation_bytes": str(variant.activation_bytes)}
    assert first | expected == first
    assert {row["saved_bytes"] for row in rows} == {str(variant.saved_bytes(8, 16))}
    assert {row["warmup"] for row in rows if row["step"] != "1"} == {"0"}
    assert len({row["run_id"] for row in rows}) == 1


def test_ranks_that_a_budget_chose_have_no_energy(package, images, tmp_path):
    with Bundle(package.path) as bundle:
        manifest = bundle.manifest
        contents = {member.name: bundle.read(member.name) for member in manifest.members}
    variants = tuple(replace(one, energy=None, budget_bytes=4096) for one in manifest.variants)
    write_bundle(tmp_path / "budget.tar", replace(manifest, variants=variants), contents)
    budgeted = replace(package, path=tmp_path / "budget.tar")
    started(train(budgeted, images, tmp_path / "run", "--steps", 1))
    assert {row["energy"] for row in table(tmp_path / "run/steps.csv")} == {""}


def test_step_latency_is_the_sum_of_its_phases(finished):
    rows = [row for row in table(finished[0] / "steps.csv") if row["step"] == "2"]
    latency_ms = {row["phase"]: float(row["latency_ms"]) for row in rows}
    assert latency_ms.pop("step") == pytest.approx(sum(latency_ms.values()), abs=1e-4)
    peaks = {row["phase"]: int(row["peak_rss_kib"]) for row in rows}
    assert peaks.pop("step") == max(peaks.values())


def test_summary_leaves_warmups_out(finished):
    out, _ = finished
    summary = {row["phase"]: row for row in table(out / "summary.csv")}
    assert list(summary) == [*PHASES, "eval", "checkpoint"]
    values = [float(row["latency_ms"]) for row in table(out / "steps.csv") if row["phase"] == "step"][1:]
    assert int(summary["step"]["n"]) == len(values) == 8
    assert float(summary["step"]["mean_ms"]) == pytest.approx(statistics.mean(values), rel=1e-6)
    assert float(summary["step"]["p50_ms"]) == pytest.approx(statistics.median(values), rel=1e-6)
    assert float(summary["step"]["std_ms"]) == pytest.approx(statistics.stdev(values), rel=1e-6)


def test_history_and_split(finished, images):
    out, _ = finished
    history = table(out / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2", "3", "4"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in history)
    split = table(out / "split.csv")
    counts = {part: sum(row["part"] == part for row in split) for part in ("train", "validation", "test")}
    assert counts == {"train": 36, "validation": 9, "test": 15}
    assert len({row["name"] for row in split}) == 60
    assert all((images / row["name"]).is_file() and row["name"].startswith(row["label"]) for row in split)


def test_run_json_tells_what_one_needs_to_repeat_it(finished, package):
    record = json.loads((finished[0] / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["options"]["threads"] == 1
    assert record["options"]["micro_batch"] == 8
    assert record["options"]["method"] == "lance"
    assert record["given"] == ["epochs", "lr", "threads"]
    assert record["versions"].keys() >= {"python", "onnxruntime", "numpy", "lance-edge"}
    assert record["session_options"]["enable_cpu_mem_arena"] is True
    assert record["machine"]["kernel"]
    assert record["result"]["step"] == record["total_steps"] == 9
    assert record["ended"] >= record["started"]
    with Bundle(package.path) as bundle:
        assert record["artifact"]["identity_sha256"] == bundle.sha256
        assert record["artifact"]["input_shape"] == list(bundle.manifest.preprocessing.sample_shape)


def test_checkpoints_hold_weights_momentum_and_meta(finished):
    for name in ("last.npz", "best.npz"):
        found = arrays(finished[0] / name)
        expected = {"conv.weight", "head.weight", "head.bias"}
        assert found.keys() == expected | {f"optimizer/{parameter}" for parameter in expected}
        assert all(value.shape == SHAPES[key.removeprefix("optimizer/")] for key, value in found.items())
    with np.load(finished[0] / "last.npz") as archive:
        meta = json.loads(str(archive["meta"]))
    assert meta["step"] == 9
    assert meta["epoch"] == 4
    assert meta["classes"] == list(CLASSES)
    assert meta["options"]["lr"] == 0.2


def test_the_table_at_the_end_names_every_figure(finished):
    output = finished[1].stdout
    for words in ("test accuracy", "activation bytes", "saved bytes", "median step", "peak RSS", "best epoch"):
        assert words in output
    assert "epoch 4  train loss" in finished[1].stderr
    assert len(RANKS) == 4


def test_quiet_says_nothing(package, images, tmp_path):
    result = started(train(package, images, tmp_path / "run", "--steps", 2, "--quiet"))
    assert result.output == ""


def test_the_same_seed_gives_the_same_bits_and_another_does_not(package, images, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        started(train(package, images, tmp_path / name, "--steps", 5, "--seed", seed))
    assert_same_arrays(tmp_path / "a/last.npz", tmp_path / "b/last.npz")
    with pytest.raises(AssertionError):
        assert_same_arrays(tmp_path / "a/last.npz", tmp_path / "c/last.npz")


def test_best_is_the_epoch_of_highest_validation_accuracy(package, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, "--epochs", 12, "--lr", 0.5))
    history = table(out / "history.csv")
    key = [(float(row["validation_accuracy"]), -float(row["validation_loss"])) for row in history]
    best = history[key.index(max(key))]
    with np.load(out / "best.npz") as archive:
        meta = json.loads(str(archive["meta"]))
    assert meta["step"] == int(best["step"])
    assert meta["best_accuracy"] == pytest.approx(float(best["validation_accuracy"]))
    assert [row["best"] for row in history if int(row["step"]) > meta["step"]].count("1") == 0


def test_without_validation_images_the_training_loss_decides_and_it_is_said(images, tmp_path):
    package = write_tiny_package(tmp_path / "pkg.tar", split=Split(0, 0.25, 0.0))
    result = started(train(package, images, tmp_path / "run", "--epochs", 5, "--lr", 0.2))
    assert "no validation images: best.npz will be the epoch of the lowest training loss" in result.stderr
    assert "by training loss" in result.stdout
    history = table(tmp_path / "run/history.csv")
    assert {row["validation_accuracy"] for row in history} == {""}
    lowest = min(history, key=lambda row: float(row["train_loss"]))
    with np.load(tmp_path / "run/best.npz") as archive:
        assert json.loads(str(archive["meta"]))["step"] == int(lowest["step"])


def test_eval_every_zero_evaluates_at_the_end_only(package, images, tmp_path):
    started(train(package, images, tmp_path / "run", "--epochs", 3, "--eval-every", 0))
    assert [row["step"] for row in table(tmp_path / "run/history.csv")] == ["7"]


def test_checkpoints_are_written_as_often_as_asked(package, images, tmp_path):
    started(train(package, images, tmp_path / "run", "--steps", 7, "--checkpoint-every", 3))
    rows = [row["step"] for row in table(tmp_path / "run/steps.csv") if row["phase"] == "checkpoint"]
    assert rows == ["3", "6", "7"]


def test_fewer_images_than_a_batch_names_both_numbers(package, tmp_path):
    few = write_images(tmp_path / "few", per_class=5)
    line = refused(train(package, few, tmp_path / "run"), 5)
    assert "9 training images, but the package was calibrated for batches of 16" in line
    assert "--batch-size 8" in line
    assert not (tmp_path / "run").exists()


def test_a_method_that_is_not_in_the_package(package, images, tmp_path):
    line = refused(train(package, images, tmp_path / "run", "--method", "asi"), 3)
    assert "holds the methods lance, bp, not asi" in line
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_keeps_its_last_good_state(package, images, tmp_path):
    out = tmp_path / "run"
    process = spawn(*train_words(package, images, out), "--lr", 1e30, "--clip", 0, "--momentum", 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "Warning" not in errors
    line = errors.splitlines()[-1]
    assert "step 2: " in line
    assert "the state after step 1 is in" in line
    assert "lower --lr (this run: 1e+30) or with --clip 2" in line
    assert all(np.isfinite(value).all() for value in arrays(out / "last.npz").values())
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert {row["step"] for row in table(out / "steps.csv")} == {"1"}


def test_a_class_of_unreadable_images_ends_the_run_with_its_name(package, tmp_path):
    images = write_images(tmp_path / "images")
    for file in (images / "red").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    line = refused(train(package, images, tmp_path / "run"), 5)
    assert "class 'red': none of its 12 training images can be read" in line
    assert not (tmp_path / "run").exists()


def test_damaged_or_missing_package(images, package, tmp_path):
    cut = tmp_path / "cut.tar"
    cut.write_bytes(package.path.read_bytes()[:5000])
    for path in (cut, tmp_path / "missing.tar"):
        arguments = ("--artifact", path, "--steps", 1)
        assert str(path) in refused(train(package, images, tmp_path / "run", *arguments), 3)
    assert not (tmp_path / "run").exists()
