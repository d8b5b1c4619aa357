import json
import signal
import time

import numpy as np
import pytest
from device_harness import (
    arrays,
    assert_same_arrays,
    refused,
    spawn,
    started,
    table,
    train,
    train_words,
)
from tiny_package import CLASSES, write_images, write_tiny_package

LENGTH = ("--epochs", 6, "--lr", 0.2)
TIMES = ("latency_ms", "rss_kib", "peak_rss_kib", "temperature_c", "arm_mhz", "time_s", "run_id", "warmup")
TIMES += ("cached",)  # a step that is done again finds its features


@pytest.fixture(scope="module")
def whole(package, images, tmp_path_factory):
    """A run without a break."""
    out = tmp_path_factory.mktemp("whole") / "run"
    started(train(package, images, out, *LENGTH))
    return out


def _run_until(package, images, out, step, number=signal.SIGINT, flags=LENGTH):
    """Start a run of its own process, and stop it by a real signal when it has done `step` steps.

    The signal is sent from within, at a known step: a step here takes 3 ms, too little to hit from outside.
    """
    prelude = f"""
import os
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == {step}:
        os.kill(os.getpid(), {int(number)})
RunLog.step = step
"""
    process = spawn(*train_words(package, images, out), *flags, prelude=prelude)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_resumes_to_the_same_bits(package, images, whole, tmp_path, number):
    out = tmp_path / "run"
    code, _, errors = _run_until(package, images, out, 7, number)
    assert code == 130, errors
    last_line = errors.strip().splitlines()[-1]
    assert "stopped after step 7 of 14" in last_line
    assert f"--out {out} --resume" in last_line
    assert "Traceback" not in errors
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert max(int(row["step"]) for row in table(out / "steps.csv")) == 7
    assert (out / "summary.csv").exists()

    result = started(train(package, images, out, "--resume"))
    assert "resuming after step 7 of 14" in result.stderr
    assert_same_arrays(out / "last.npz", whole / "last.npz")
    assert_same_arrays(out / "best.npz", whole / "best.npz")
    _assert_same_rows(out, whole)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert [entry["step"] for entry in record["resumed"]] == [7]


def _assert_same_rows(out, whole):
    """Every step and every evaluation once, with the same losses."""

    def rows(folder, name):
        kept = (row for row in table(folder / name) if row.get("phase") != "checkpoint")
        return [{key: value for key, value in row.items() if key not in TIMES} for row in kept]

    assert rows(out, "steps.csv") == rows(whole, "steps.csv")
    assert rows(out, "history.csv") == rows(whole, "history.csv")


@pytest.mark.parametrize("step", [3, 14])  # both end an epoch: the signal arrives before its evaluation
def test_a_stop_before_an_evaluation_does_not_lose_it(package, images, whole, tmp_path, step):
    code, _, errors = _run_until(package, images, tmp_path / "run", step)
    assert code == 130, errors
    started(train(package, images, tmp_path / "run", "--resume"))
    assert_same_arrays(tmp_path / "run/last.npz", whole / "last.npz")
    _assert_same_rows(tmp_path / "run", whole)


def test_a_killed_run_resumes_from_its_checkpoint(package, images, whole, tmp_path):
    out = tmp_path / "run"
    flags = (*LENGTH, "--checkpoint-every", 4)
    code, _, errors = _run_until(package, images, out, 10, signal.SIGKILL, flags)
    assert code == -signal.SIGKILL, errors
    with (out / "steps.csv").open("ab") as file:
        file.write(b"20250101T000000Z-abc,lance,ti")  # a row torn by the power cut
    (out / ".last.npz.abc").write_bytes(b"half a checkpoint")
    result = started(train(package, images, out, "--resume"))
    assert "resuming after step 8 of 14" in result.stderr
    assert_same_arrays(out / "last.npz", whole / "last.npz")
    assert_same_arrays(out / "best.npz", whole / "best.npz")
    _assert_same_rows(out, whole)
    assert not (out / ".last.npz.abc").exists()


def test_a_second_signal_stops_at_once(package, images, tmp_path):
    prelude = """
import time
from lance_device import features
load = features.load_batch
def slow(*arguments):
    time.sleep(20)
    return load(*arguments)
features.load_batch = slow
"""
    process = spawn(*train_words(package, images, tmp_path / "run"), "--steps", 5, prelude=prelude)
    for line in process.stderr:
        if "36 training" in line:  # "tiny, lance: ...": the handlers are set
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert "a second Ctrl-C stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT  # a shell shows it as 130
    assert (tmp_path / "run/last.npz").exists()


def test_resuming_a_finished_run_changes_nothing(package, images, whole, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, *LENGTH))
    before = arrays(out / "last.npz")
    result = started(train(package, images, out, "--resume"))
    assert "steps                14 of 14" in result.stdout
    assert all((arrays(out / "last.npz")[name] == value).all() for name, value in before.items())
    _assert_same_rows(out, whole)


def test_an_existing_run_is_not_overwritten(package, images, whole):
    before = (whole / "last.npz").read_bytes()
    line = refused(train(package, images, whole, *LENGTH), 8)
    assert "holds a run already (last.npz" in line
    assert "--resume" in line
    assert "another --out" in line
    assert (whole / "last.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", 0.1), "started with --lr 0.2, not --lr 0.1"),
        (("--method", "bp"), "started with --method lance, not --method bp"),
        (("--no-shuffle",), "started with --shuffle, not --no-shuffle"),
        (("--epochs", 9), "started with --epochs 6, not --epochs 9; the learning-rate schedule runs over"),
        (("--steps", 9), "started with no --steps, not --steps 9"),
        (("--micro-batch", 4), "started with --micro-batch 8, not --micro-batch 4"),
    ],
)
def test_other_options_are_refused_by_name(package, images, whole, flags, words):
    assert words in refused(train(package, images, whole, "--resume", *flags), 4)


def test_the_same_options_may_be_given_again(package, images, whole):
    started(train(package, images, whole, "--resume", *LENGTH, "--micro-batch", "auto"))


def test_other_images_are_refused(package, whole, tmp_path):
    other = write_images(tmp_path / "other")
    for file in list((other / "green").iterdir()):
        file.rename(file.with_name(f"other-{file.name}"))
    assert refused(train(package, other, whole, "--resume"), 4) == (
        f"error: {other}: none of the 12 training images of class 'green' is here that the run in {whole} began"
        " with; give the same --data, or start a new run with another --out"
    )


def test_other_arrays_are_refused(package, tmp_path):
    def write(count):
        images = np.zeros((count, 16, 16, 3), np.uint8)
        images[::2, :8] = 200
        np.savez(tmp_path / "data.npz", x=images, y=np.arange(count) % 3, classes=np.array(CLASSES))
        return tmp_path / "data.npz"

    out = tmp_path / "run"
    started(train(package, write(60), out, "--steps", 2))
    assert "are not those that" in refused(train(package, write(66), out, "--resume"), 4)


def test_another_package_is_refused(images, whole, tmp_path):
    other = write_tiny_package(tmp_path / "other.tar", seed=1)
    assert "belongs to another package" in refused(train(other, images, whole, "--resume"), 4)


def test_there_must_be_a_run_to_resume(package, images, tmp_path):
    assert "no run to resume" in refused(train(package, images, tmp_path / "none", "--resume"), 4)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(package, images, tmp_path):
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))"
    out = tmp_path / "run"
    process = spawn(*train_words(package, images, out), "--steps", 4, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 8
    last_line = errors.splitlines()[-1]
    assert last_line.startswith(f"error: {out / 'last.npz'}: cannot write (File too large); free some space")
    assert errors.count("error: ") == 1
    assert not out.exists()


def test_a_full_disk_leaves_the_last_checkpoint(package, images, tmp_path):
    """A limit on file size stands for a full disk: writes fail in the middle of a run."""
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    out = tmp_path / "run"
    process = spawn(*train_words(package, images, out), "--steps", 40, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 8, errors
    assert "steps.csv: cannot write" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    rows = table(out / "steps.csv")
    assert all(row["saved_bytes"] for row in rows)  # no torn row
    assert (out / "steps.csv").stat().st_size <= 9000
    assert [file.name for file in out.iterdir() if file.name.startswith(".")] == []
    assert arrays(out / "last.npz")
