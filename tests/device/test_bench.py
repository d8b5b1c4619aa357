"""`lance-device bench`: what is measured, in which order, and what is made of it."""

import csv
import json
import os
import signal
import statistics
import time

import numpy as np
import pytest
from device_harness import lance_device, refused, spawn, started, table
from tiny_package import PREPROCESSING, write_images

from lance_device import bench as bench_module
from lance_device.bench_features import open_bench_features
from lance_device.bench_images import generated_part
from lance_device.bench_job import Job, open_batch
from lance_device.features import Batch, Unmetered
from lance_device.graphs import load_graph
from lance_edge.bench_rows import BenchRow
from lance_edge.bundle import Bundle
from lance_edge.errors import PlatformError, StorageError
from lance_edge.images import load_batch
from lance_edge.profiles import STEP_PHASES
from lance_edge.recordings import read_recording

SIZES, TRIALS, STEPS = (4, 16), 2, 2


@pytest.fixture(scope="module")
def measured(package, tmp_path_factory):
    """A benchmark of two methods at two micro-batches, and what it said."""
    out = tmp_path_factory.mktemp("bench") / "out"
    words = ("--micro-batch", "4,16", "--steps", STEPS, "--trials", TRIALS, "--threads", 1)
    return out, started(lance_device("bench", "--artifact", package.path, "--out", out, *words))


@pytest.fixture
def words(package, tmp_path):
    """The smallest benchmark; options given later win."""
    options = ("--methods", "bp", "--steps", 1, "--trials", 1, "--threads", 1)
    return ("bench", "--artifact", package.path, "--out", tmp_path / "out", *options)


def rows_of(folder):
    return read_recording(folder).steps


# --- what is measured ---


def test_every_setting_has_all_steps_of_all_trials_and_a_flagged_warm_up(measured):
    rows = [row for row in rows_of(measured[0]) if row.phase == "step"]
    found = {}
    for row in rows:
        assert isinstance(row, BenchRow)
        found.setdefault((row.method, row.micro_batch, row.trial), []).append((row.step, row.warmup))
    steps = [(1, True), (2, False), (3, False)]
    expected = {(method, size, trial) for method in ("lance", "bp") for size in SIZES for trial in (1, 2)}
    assert found == dict.fromkeys(expected, steps)
    assert {(row.layers, row.threads, row.batch_size, row.samples) for row in rows} == {(1, 1, 16, 16)}
    assert len({row.run_id for row in rows}) == 1


def test_methods_take_turns_and_another_one_begins_each_trial(measured):
    order = []
    for row in rows_of(measured[0]):
        job = (row.trial, row.micro_batch, row.method)
        if not order or order[-1] != job:
            order.append(job)
    assert order == [
        *((1, 4, "lance"), (1, 4, "bp"), (1, 16, "lance"), (1, 16, "bp")),
        *((2, 4, "bp"), (2, 4, "lance"), (2, 16, "bp"), (2, 16, "lance")),
    ]


def test_a_step_has_the_phases_of_training_and_trains(measured, package):
    rows = [row for row in rows_of(measured[0]) if (row.method, row.micro_batch, row.trial) == ("bp", 4, 1)]
    assert [row.phase for row in rows] == [*STEP_PHASES, "step"] * 3
    losses = [row.loss for row in rows if row.phase == "step"]
    assert losses == sorted(losses, reverse=True), "the same batch again and again, at a low rate"
    assert losses[0] > losses[-1]
    for start in range(0, len(rows), 6):
        *phases, step = rows[start : start + 6]
        assert step.latency_ms == pytest.approx(sum(row.latency_ms for row in phases), abs=1e-4)


def test_bytes_are_those_of_package_and_step(measured, package):
    with Bundle(package.path) as bundle:
        variants = {variant.method: variant for variant in bundle.manifest.variants}
    rows = rows_of(measured[0])
    for method, variant in variants.items():
        assert {row.activation_bytes for row in rows if row.method == method} == {variant.activation_bytes}
    saved = {(row.method, row.micro_batch): row.saved_bytes for row in rows}
    assert saved["bp", 16] > saved["bp", 4]
    assert {row.energy for row in rows if row.method == "bp"} == {None}
    assert {row.energy for row in rows if row.method == "lance"} == {0.7}


def test_the_summary_is_that_of_the_rows_with_ratios_to_lance(measured):
    latencies = {}
    for row in table(measured[0] / "steps.csv"):
        if row["warmup"] == "0":
            key = row["method"], row["micro_batch"], row["phase"]
            latencies.setdefault(key, []).append(float(row["latency_ms"]))
    summary = table(measured[0] / "summary.csv")
    assert len(summary) == len(latencies) == 2 * 2 * 6
    for row in summary:
        own = latencies[row["method"], row["micro_batch"], row["phase"]]
        lance = latencies["lance", row["micro_batch"], row["phase"]]
        assert int(row["n"]) == len(own) == STEPS * TRIALS
        assert float(row["p50_ms"]) == pytest.approx(statistics.median(own), rel=1e-6)
        ratio = statistics.median(own) / statistics.median(lance)
        assert float(row["ratio_to_lance"]) == pytest.approx(ratio, rel=1e-6)


def test_the_record_says_where_and_how(measured, package):
    record = json.loads((measured[0] / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["kind"] == "benchmark"
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["threads"] == 1
    assert record["options"]["micro_batches"] == list(SIZES)
    assert record["artifact"]["path"] == str(package.path)
    assert record["failures"] == []


def test_the_table_has_a_line_for_each_setting(measured):
    lines = measured[1].stdout.splitlines()
    assert lines[0].split()[:2] == ["micro-batch", "method"], "the number of layers is always the same"
    body = [line.split() for line in lines[2:] if line.split()[:1] and line.split()[0] in ("4", "16")]
    assert [cells[:2] for cells in body] == [["4", "lance"], ["4", "bp"], ["16", "lance"], ["16", "bp"]]
    assert all(cells[-1].endswith("x") for cells in body)
    assert body[0][-1] == "1.00x"
    assert f"wrote {measured[0]}/steps.csv, summary.csv, run.json" in lines
    assert "1/8  trial 1 of 2  lance, 1 layer, micro-batch 4" in measured[1].stderr


def test_each_setting_has_a_peak_of_its_own(words, tmp_path):
    """Nothing of what the measuring process was started from counts, nor of the setting before."""
    ballast = np.ones(40_000_000)  # 312,500 KiB, all of it touched
    started(lance_device(*words, "--methods", "lance,bp"))
    peaks = [row.peak_rss_kib for row in rows_of(tmp_path / "out") if row.phase == "step"]
    assert all(20_000 < peak < ballast.nbytes / 1024 for peak in peaks)


def test_with_a_cache_only_warm_ups_compute_features(words, tmp_path):
    started(
        lance_device(*words, "--cache", "on", "--steps", 2, "--methods", "lance,bp", "--micro-batch", "4,16")
    )
    result = read_recording(tmp_path / "out")
    assert {(row.warmup, row.cached) for row in result.steps} == {(True, False), (False, True)}
    assert {row.cached for row in result.summary} == {True}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "run.json",
        "steps.csv",
        "summary.csv",
    ]


def test_a_cache_changes_nothing_but_the_rounding_of_features(words, tmp_path):
    losses = {}
    for cache in ("on", "off"):
        started(lance_device(*words, "--cache", cache, "--steps", 3, "--out", tmp_path / cache))
        losses[cache] = [row.loss for row in rows_of(tmp_path / cache) if row.phase == "step"]
    # Features have 11 bits in float16: 5e-4 relative, on losses of about 1; they are not the same bits.
    np.testing.assert_allclose(losses["on"], losses["off"], rtol=1e-3)
    assert losses["on"] != losses["off"]


def test_a_cache_without_a_step_to_fill_it(words, tmp_path):
    line = refused(lance_device(*words, "--cache", "on", "--warmups", 0), 2)
    assert "--cache on: the first step fills the cache; expected --warmups 1 or more, found 0" in line
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_used_is_no_silent_fallback(package, tmp_path):
    with Bundle(package.path) as bundle:
        variant = bundle.manifest.variant("bp")
        prefix = load_graph(bundle, variant, "prefix", 1)
    part = generated_part(PREPROCESSING, 3, 16)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"^--cache on: .*file"):
        open_bench_features(prefix, variant, part, 16, tmp_path / "file")
    huge = lambda values: {name: value * 1e9 for name, value in prefix_run(values).items()}  # noqa: E731
    prefix_run = prefix.run
    prefix.run = huge  # beyond float16
    features = open_bench_features(prefix, variant, part, 16, tmp_path)
    batch = Batch(part, np.arange(16), np.zeros(16, np.bool_), PREPROCESSING)
    with pytest.raises(
        StorageError, match=r"^--cache on: features of some images exceed float16.*--cache off$"
    ):
        features.boundary(batch, slice(0, 4), Unmetered())


# --- images ---


def test_generated_images_differ_and_are_always_the_same():
    part, again = (generated_part(PREPROCESSING, 3, 200) for _ in range(2))
    pixels = [np.asarray(part.image(i)) for i in range(len(part))]
    assert all(image.shape == (PREPROCESSING.resize, PREPROCESSING.resize, 3) for image in pixels)
    assert len({image.tobytes() for image in pixels}) == 200
    assert np.array_equal(pixels[7], np.asarray(again.image(7)))
    assert part.labels.tolist()[:5] == [0, 1, 2, 0, 1]
    batch = load_batch(part, range(16), PREPROCESSING)
    assert batch.shape == (16, 3, 12, 12)
    assert 0.2 < batch.std() < 1, "as bright and dark as photographs"


def job(package, **changes):
    values = {"method": "bp", "layers": 1, "micro_batch": 4, "threads": 1, "trial": 1, "warmups": 0, "steps": 1}
    return Job(**{"run_id": "r", "artifact": str(package.path), "data": None, **values, **changes})


def test_with_data_the_batch_is_one_of_training_images(package, images, words, tmp_path):
    with Bundle(package.path) as bundle:
        batch = open_batch(job(package, data=str(images)), bundle.manifest)
    assert len(batch) == package.batch_size
    assert len(set(batch.indices.tolist())) == package.batch_size
    assert not batch.flips.any()
    started(lance_device(*words, "--data", images))
    assert json.loads((tmp_path / "out/run.json").read_text())["data"] == str(images)


def test_too_few_images_for_a_batch(words, tmp_path):
    few = write_images(tmp_path / "few", per_class=4)
    line = refused(lance_device(*words, "--data", few), 5)
    assert "training images, but the package was calibrated for batches of 16; add images, or measure" in line
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_there_are_no_benchmark(words, tmp_path):
    line = refused(lance_device(*words, "--data", tmp_path / "nope"), 5)
    assert "nope: no such folder; give a folder of class folders, or an .npz file" in line
    assert not (tmp_path / "out").exists()


def test_all_methods_are_those_of_the_package(words, tmp_path):
    started(lance_device(*words, "--methods", "all"))
    assert {row.method for row in rows_of(tmp_path / "out")} == {"lance", "bp"}
    assert "not all" in refused(lance_device(*words, "--methods", "all,bp", "--out", tmp_path / "other"), 3)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--methods", "asi"], 3, "this package holds the methods lance, bp, not asi; choose one of them"),
        (["--layers", "2"], 3, "this package holds method lance with --layers 1, not 2; choose one of these"),
        (["--layers", "1-3"], 3, "with --layers 1, not 2"),
        (["--batch-size", "8"], 2, "was calibrated for batches of 16, and its ranks and bytes"),
        (["--micro-batch", "8,32"], 2, "--micro-batch 32: expected at most the batch size, 16"),
        (["--board", "rpi9"], 9, "--board rpi9: expected auto or one of"),
        (["--artifact", "no.tar"], 3, "no.tar: cannot open the package"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    words, tmp_path, options, exit_code, message
):
    assert message in refused(lance_device(*words, *options), exit_code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "few"], "expected counts such as 4, 1-10 or 1,2,4,8, found 'few'"),
        (["--micro-batch", "0,1"], "expected whole numbers from 1, found 0"),
        (["--threads", "0"], "expected auto or a whole number from 1"),
        (["--steps", "0"], "0 is not in the range"),
    ],
)
def test_usage_errors(words, options, message):
    result = lance_device(*words, *options)
    assert result.exit_code == 2
    assert message in result.output


def test_measurements_are_not_overwritten(words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/steps.csv").touch()
    assert "out: holds measurements already (steps.csv); choose another --out" in refused(
        lance_device(*words), 8
    )


def test_a_folder_that_cannot_be_made(words, tmp_path):
    (tmp_path / "out").touch()
    assert "cannot make this folder" in refused(lance_device(*words), 8)


def test_the_worker_is_no_command_for_people():
    assert "bench-worker" not in lance_device("--help").output
    assert "bench " in lance_device("--help").output


# --- what goes wrong ---


def test_a_setting_that_lacks_memory_is_left_out_and_the_others_go_on(words, tmp_path, monkeypatch):
    real, tried = bench_module.run_in_process, []

    def scarce(one, place, stop):
        tried.append(one.method)
        if one.method == "bp":
            raise PlatformError("not enough memory")
        return real(one, place, stop)

    monkeypatch.setattr(bench_module, "run_in_process", scarce)
    result = started(lance_device(*words, "--methods", "bp,lance", "--trials", 2))
    assert tried == ["bp", "lance", "lance"], "it is not tried again"
    assert "warning: not measured: bp, 1 layer, micro-batch 8: not enough memory" in result.stderr
    assert {row.method for row in rows_of(tmp_path / "out")} == {"lance"}
    assert json.loads((tmp_path / "out/run.json").read_text())["failures"] == [
        "bp, 1 layer, micro-batch 8: not enough memory"
    ]


def test_nothing_measured_is_an_error(words, tmp_path, monkeypatch):
    def scarce(one, place, stop):
        raise PlatformError("not enough memory")

    monkeypatch.setattr(bench_module, "run_in_process", scarce)
    assert refused(lance_device(*words), 9).endswith("bp, 1 layer, micro-batch 8: not enough memory")
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("code", "errors", "kind", "message"),
    [
        (-9, "", PlatformError, "the kernel ended the process, for want of memory most likely"),
        (9, "noise\nerror: not enough memory; close\n", PlatformError, "not enough memory; close"),
        (5, "error: a.jpg: cannot read\n", bench_module.WorkerError, "a.jpg: cannot read"),
        (-11, "Fatal\n", bench_module.WorkerError, "the measuring process ended with code -11: Fatal"),
    ],
)
def test_how_a_process_ended_is_told(code, errors, kind, message):
    error = bench_module._worker_error(code, errors)
    assert type(error) is kind
    assert str(error) == message
    assert error.exit_code == (code if code > 0 else {PlatformError: 9}.get(kind, 1))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stop_keeps_what_was_measured(words, tmp_path, number):
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = spawn(*words, "--methods", "lance,bp", "--trials", 50, prelude=start)
    steps = tmp_path / "out/steps.csv"
    deadline = time.monotonic() + 60
    while not (steps.exists() and steps.read_text().count("\n") > 12) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    assert last.startswith("error: stopped after ")
    assert f" of 100 measurements; these are in {tmp_path / 'out'}" in last
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["status"] == "interrupted"
    rows = rows_of(tmp_path / "out")
    assert len(rows) % 12 == 0, "whole jobs only: two steps of six phases"
    with (tmp_path / "out/summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) in (6, 12)
