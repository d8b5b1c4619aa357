"""Recorded latency profiles: all in the project read, and what does not fit is refused with its place."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

import lance_edge
from lance_edge.bench_rows import BenchRow, BenchSummaryRow, summarise_bench
from lance_edge.errors import DataError
from lance_edge.profiles import StepRow, SummaryRow, cells, columns, summarise
from lance_edge.recordings import read_recording

RECORDED = Path(lance_edge.__file__).parent.parent / "profiles" / "recorded"
RECORD = {
    "schema_version": 1,
    "machine": {"cpu": "A53"},
    "versions": {"onnxruntime": "1.31.1"},
    "artifact": {"identity_sha256": "0" * 64},
}


def step_row(**changes):
    values = {
        "run_id": "a",
        "method": "bp",
        "model": "tiny",
        "layers": 2,
        "energy": None,
        "batch_size": 16,
        "micro_batch": 8,
        "threads": 1,
        "epoch": 1,
        "step": 1,
        "warmup": False,
        "phase": "step",
        "latency_ms": 2.5,
        "rss_kib": 100,
        "peak_rss_kib": None,
        "loss": 0.5,
        "temperature_c": None,
        "arm_mhz": None,
        "throttled": None,
        "time_s": 1.0,
        "samples": 16,
        "cached": False,
        "activation_bytes": 64,
        "saved_bytes": 32,
    }
    return {**values, **changes}


def write_csv(path, kind, rows):
    lines = [columns(kind), *map(cells, rows)]
    path.write_text("".join(",".join(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """A recorded benchmark of two settings."""
    rows = [
        BenchRow(**step_row(method=method, latency_ms=ms), trial=1)
        for method, ms in (("bp", 5.0), ("lance", 2.5))
    ]
    write_csv(tmp_path / "steps.csv", BenchRow, rows)
    write_csv(tmp_path / "summary.csv", BenchSummaryRow, summarise_bench(rows))
    (tmp_path / "run.json").write_text(json.dumps(RECORD, indent=1))
    return tmp_path


def refusal(folder):
    with pytest.raises(DataError) as raised:
        read_recording(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "path", sorted(path for path in RECORDED.glob("*") if path.is_dir()), ids=lambda p: p.name
)
def test_every_recorded_profile_reads(path):
    recording = read_recording(path)
    assert recording.record["status"] == "finished"
    assert recording.record["machine"]["cpu"]
    settings = {(row.method, row.layers, row.micro_batch) for row in recording.steps}
    if recording.is_benchmark:
        again = summarise_again(recording.steps)
        for found, expected in zip(recording.summary, again, strict=True):
            for name, value in dataclasses.asdict(expected).items():
                is_float = isinstance(value, float)
                assert getattr(found, name) == (pytest.approx(value, rel=1e-8) if is_float else value)
        assert {(row.method, row.layers, row.micro_batch) for row in recording.summary} == settings


def summarise_again(rows):
    """The summary as it is after a round through text."""
    kinds = {field.name: field.type for field in dataclasses.fields(BenchSummaryRow)}
    return tuple(
        dataclasses.replace(
            row,
            **{
                k: float(format(v, ".9g"))
                for k, v in vars(row).items()
                if kinds[k] in (float, float | None) and v is not None
            },
        )
        for row in summarise_bench(rows)
    )


def test_a_benchmark_becomes_typed_rows(folder):
    recording = read_recording(folder)
    assert recording.is_benchmark
    assert [row.latency_ms for row in recording.steps] == [5.0, 2.5]
    assert recording.steps[0].peak_rss_kib is None
    assert [row.ratio_to_lance for row in recording.summary] == [2.0, 1.0]
    assert recording.record["machine"] == {"cpu": "A53"}


def test_a_training_run_reads_too(folder):
    rows = [StepRow(**step_row(step=step)) for step in (1, 2)]
    write_csv(folder / "steps.csv", StepRow, rows)
    write_csv(folder / "summary.csv", SummaryRow, summarise(rows))
    recording = read_recording(folder)
    assert not recording.is_benchmark
    assert recording.steps == tuple(rows)
    assert recording.summary[0].n == 2


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("latency_ms", "fast", "line 3, column 13 (latency_ms): expected a number, found 'fast'"),
        ("latency_ms", "nan", "line 3, column 13 (latency_ms): expected a number, found 'nan'"),
        ("latency_ms", "-1", "line 3, column 13 (latency_ms): expected no time below zero, found -1.0"),
        ("layers", "2.5", "line 3, column 4 (layers): expected a whole number, found '2.5'"),
        ("warmup", "yes", "line 3, column 11 (warmup): expected 0 or 1, found 'yes'"),
        ("phase", "sleep", "line 3, column 12 (phase): expected one of data, prefix, forward,"),
        ("batch_size", "0", "line 3, column 6 (batch_size): expected 1 or more, found 0"),
        ("trial", "", "line 3, column 25 (trial): expected a whole number, found ''"),
    ],
)
def test_a_cell_that_does_not_fit_is_named(folder, column, text, message):
    path = folder / "steps.csv"
    header, first, second = path.read_text().splitlines()
    values = second.split(",")
    values[header.split(",").index(column)] = text
    path.write_text("\n".join([header, first, ",".join(values)]) + "\n")
    assert f"{path} {message}" in refusal(folder)


def test_rows_and_headers_that_are_cut_off(folder):
    path = folder / "steps.csv"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert f"{path} line 3: expected 25 cells, found" in refusal(folder)
    path.write_text(whole.splitlines()[0] + "\n")
    assert f"{path} line 2, column 1: expected a row for each phase" in refusal(folder)
    path.write_text("when,what\n1,2\n")
    assert f"{path}: expected the columns run_id,method," in refusal(folder)
    path.unlink()
    assert f"{path}: cannot read (No such file" in refusal(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{\n "schema_version": 1,\n', "run.json line 3, column 1: not JSON (Expecting property name"),
        (b"[]", "run.json line 1, column 1: expected a record of schema 1, found None"),
        (b'{"schema_version": 2}', "expected a record of schema 1, found 2; read it with the version"),
        (b'{"schema_version": 1, "machine": 3}', "expected an entry 'machine' with an object"),
        (b"\xff", "run.json: cannot read ("),
    ],
)
def test_records_that_do_not_fit(folder, data, message):
    (folder / "run.json").write_bytes(data)
    assert message in refusal(folder)


# --- summaries of a benchmark, against the statistics module ---


RNG = np.random.default_rng(0)


def timed(method, latencies_ms, **changes):
    return [
        BenchRow(
            **step_row(
                method=method, step=i, warmup=i == 0, latency_ms=float(ms), peak_rss_kib=1000 - i, **changes
            ),
            trial=1,
        )
        for i, ms in enumerate(latencies_ms)
    ]


def test_a_setting_is_summarised_over_its_trials_without_warm_ups():
    bp, lance = RNG.uniform(1, 9, 8), RNG.uniform(1, 9, 8)
    first, second = summarise_bench(timed("bp", bp) + timed("lance", lance))
    assert (first.method, second.method) == ("bp", "lance")
    assert first.n == 7
    assert first.mean_ms == pytest.approx(statistics.mean(bp[1:]))
    assert first.p50_ms == pytest.approx(statistics.median(bp[1:]))
    assert first.spread == pytest.approx(statistics.stdev(bp[1:]) / statistics.mean(bp[1:]))
    assert first.ratio_to_lance == pytest.approx(statistics.median(bp[1:]) / statistics.median(lance[1:]))
    assert second.ratio_to_lance == 1
    assert first.peak_rss_kib == 999, "the highest of the measured steps"


def test_ratios_compare_the_same_setting_and_phase_only():
    found = summarise_bench(
        timed("lance", [9, 2, 2], layers=1)
        + timed("bp", [9, 6, 6], layers=1)
        + timed("bp", [9, 6, 6], layers=2)
        + timed("bp", [9, 6, 6], layers=1, micro_batch=4)
        + timed("bp", [9, 5, 5], layers=1, phase="data")
        + timed("bp", [9, 6, 6], layers=1, cached=True)
    )
    ratios = {
        (row.method, row.layers, row.micro_batch, row.phase, row.cached): row.ratio_to_lance for row in found
    }
    assert ratios.pop(("bp", 1, 8, "step", False)) == 3
    assert ratios.pop(("lance", 1, 8, "step", False)) == 1
    assert set(ratios.values()) == {None}


def test_a_phase_that_takes_no_time_has_no_ratio_and_warm_ups_alone_no_row():
    assert [row.ratio_to_lance for row in summarise_bench(timed("lance", [0, 0, 0]))] == [None]
    assert summarise_bench(timed("lance", [1])) == ()
