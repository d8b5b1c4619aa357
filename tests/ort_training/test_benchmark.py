"""The benchmark beside ONNX Runtime's training API, at its smallest."""

import csv
import subprocess
import sys

import pytest

from benchmarks.ort_training import CONTENDERS, main, version_there


@pytest.mark.slow  # a minute of processes that each import that library
def test_whoever_is_measured_computes_the_same(photo_package, ort_python, tmp_path, capsys, monkeypatch):
    measured = CONTENDERS[1::3]  # some: both runtimes, both methods
    monkeypatch.setattr("benchmarks.ort_training.CONTENDERS", measured)
    words = (
        "--artifact",
        photo_package,
        "--ort-python",
        ort_python,
        "--layers",
        4,
        "--rounds",
        1,
        "--steps",
        1,
    )
    assert main([str(word) for word in (*words, "--micro-batch", 5, "--threads", 1, "--out", tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "its times mean nothing" not in text
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(measured)  # a warm-up and a step
    for row in rows:
        assert row["contender"] in text
        assert float(row["latency_ms"]) > 0
        # The process imports first: its peak is higher than that of the imports alone.
        assert int(row["peak_rss_kib"]) > int(row["imports_rss_kib"]) > 0
    losses = {float(row["loss"]) for row in rows if row["step"] == "1"}
    assert max(losses) - min(losses) < 1e-4 * max(losses)  # of one batch, of the same weights
    assert (tmp_path / "report.md").read_text().strip() == text.strip()


def test_the_version_measured_is_that_of_the_interpreter(ort_python):
    ask = "import onnxruntime.training.api, onnxruntime; print(onnxruntime.__version__)"
    loaded = subprocess.run([ort_python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    assert version_there(str(ort_python)) == loaded


@pytest.mark.parametrize(
    ("python", "reason"),
    [(sys.executable, "has no onnxruntime-training"), ("/nonexistent/python", "cannot run")],
)
def test_an_interpreter_that_cannot_be_measured_is_named_before_the_work(python, reason, tmp_path, capsys):
    assert main(["--ort-python", python, "--out", str(tmp_path / "out")]) == 9
    assert f"error: --ort-python {python}: {reason}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
