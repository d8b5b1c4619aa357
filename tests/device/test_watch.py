"""`lance-device watch`: before, during and after a run, and what it must not touch."""

import json
import os
import signal
import time

import pytest
from device_harness import lance_device, refused, spawn, started, train, train_words
from report_rows import RECORD, step_rows, write_rows, write_run

from lance_device import following
from lance_device.following import Follower, is_held
from lance_device.live import Silent
from lance_device.run_folder import RunFolder
from lance_device.watch import ending, standing, watch
from lance_edge.errors import Interrupted
from lance_edge.profiles import StepRow


class Told(Silent):
    """Remembers what it was told."""

    def __init__(self):
        self.texts, self.views, self.evaluations = [], [], []

    def status(self, text, always=False):
        self.texts.append(text)

    def show(self, view, losses):
        self.views.append((view, losses))

    def epoch(self, row):
        self.evaluations.append(row.step)


def record_of(run, **changes):
    (run / "run.json").write_text(json.dumps({**RECORD, **changes}))


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_finished_run_is_told_at_once(package, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, "--steps", 5))
    before = snapshot(out)
    result = lance_device("watch", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: finished after 5 of 5 steps in ")
    assert "test accuracy" in result.stdout
    assert "step 5/5  loss " in result.stderr
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"status": "interrupted"}, 10, "interrupted after 20 of 20 steps in 40 s, test accuracy 75.0 %; take"),
        ({"status": "failed", "message": "disk full"}, 11, "in 40 s, test accuracy 75.0 %: disk full"),
    ],
)  # fmt: skip
def test_exit_codes_say_how_a_run_ended(tmp_path, changes, code, text):
    run = write_run(tmp_path / "run", record={**RECORD, **changes})
    result = lance_device("watch", run)
    assert result.exit_code == code
    assert text in result.stdout


def test_it_may_be_started_before_the_run_and_sees_it_through(tmp_path):
    """Each wait of the loop is a moment in which the run goes on."""
    run, told = tmp_path / "run", Told()

    def begin():
        run.mkdir()

    def describe():
        record_of(run, status="running")

    def first_steps():
        write_run(run, steps=3, accuracies=(), record=None)

    def more():
        write_rows(run / "steps.csv", StepRow, step_rows(step=4), mode="a")

    def evaluate():
        write_run(run, steps=20, record=None)

    def end():
        record_of(run, status="finished")

    moments = iter((begin, describe, first_steps, more, evaluate, end))
    follower = Follower(run)
    assert watch(follower, told, 1.0, wait=lambda seconds: next(moments)()) == "finished"
    assert told.texts == [
        f"waiting for a run in {run}, a folder that is not there yet",
        f"waiting for a run in {run}",
        f"{run}: a run has begun, and made no step yet",
    ]
    assert [view.step for view, _ in told.views] == [3, 4, 20, 20]
    assert told.evaluations == [20]
    last, losses = told.views[-1]
    assert last.loss == losses[-1] == pytest.approx(0.1)
    assert (last.total_steps, last.epochs, last.seconds_left) == (20, 2, 0.0)
    assert last.phases_ms["step"] == pytest.approx(10.5)
    assert last.temperature_c == 70.0
    assert ending(follower, "finished") == f"{run}: finished after 20 of 20 steps in 40 s, test accuracy 75.0 %"


def test_time_left_is_foretold_from_the_time_taken(tmp_path):
    run = write_run(tmp_path / "run", steps=5, record={**RECORD, "status": "running"})
    follower = Follower(run)
    follower.look()
    assert standing(follower.view).seconds_left == pytest.approx(30.0)  # five steps in 10 s, 15 to go


def test_a_process_that_is_gone_is_noticed(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=5, record={**RECORD, "status": "running"})
    monkeypatch.setattr(following, "PATIENCE_S", 0.0)
    with RunFolder(run).held(create=False):
        assert is_held(run)
        assert Follower(run).look().state == "running"
    assert is_held(run) is False
    result = lance_device("watch", run)
    assert result.exit_code == 12
    assert "lost after 5 of 20 steps" in result.stdout
    assert "no process on this machine is training into it; take it up with --resume" in result.stdout
    follower = Follower(run)
    assert follower.look().state == "lost"
    record_of(run, status="finished")  # taken up and ended between two looks
    assert follower.look().state == follower.view.status == "finished"
    record_of(run, status="running")
    monkeypatch.setattr(following, "LOCKS", tmp_path / "absent")
    assert is_held(run) is None
    assert Follower(run).look().state == "running"  # nobody can tell


def test_looking_takes_no_lock(tmp_path):
    """A run that begins while somebody looks must find its folder free."""
    run = write_run(tmp_path / "run", record={**RECORD, "status": "running"})
    follower = Follower(run)
    follower.look()
    assert not is_held(run)
    with RunFolder(run).held(create=False):
        follower.look()


def test_what_cannot_be_read_is_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text("{")
    assert "run.json line 1, column 2: not JSON" in refused(lance_device("watch", run), 5)


def test_ctrl_c_ends_the_watching(tmp_path):
    run = tmp_path / "run"
    process = spawn("watch", run)
    line = process.stderr.readline()
    assert f"waiting for a run in {run}" in line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"error: no longer watching {run}"  # nothing goes on: there is no run


def stop(seconds):
    raise KeyboardInterrupt


def test_ctrl_c_says_that_the_run_goes_on_where_it_does(tmp_path):
    run = write_run(tmp_path / "run", steps=5, record={**RECORD, "status": "running"})
    with RunFolder(run).held(create=False), pytest.raises(Interrupted) as going:
        watch(Follower(run), Told(), 1.0, wait=stop)
    assert str(going.value) == f"no longer watching {run}; the run goes on"
    with pytest.raises(Interrupted) as gone:  # killed a moment ago, not lost yet
        watch(Follower(run), Told(), 1.0, wait=stop)
    assert str(gone.value) == f"no longer watching {run}"


def test_a_file_is_no_folder_of_a_run(tmp_path):
    file = tmp_path / "pkg.tar"
    file.write_bytes(b"")
    expected = f"error: {file}: expected a run's folder, found a file; name the --out of train"
    assert refused(lance_device("watch", file), 5) == expected
    assert refused(lance_device("watch", file, "--serve", 0), 5) == expected


def test_a_run_of_another_process_is_followed_to_its_end(package, images, tmp_path):
    out = tmp_path / "run"
    watcher = spawn("watch", out, "--every", 0.1)
    trainer = spawn(*train_words(package, images, out), "--epochs", 3)
    _, errors = trainer.communicate(timeout=120)
    assert trainer.returncode == 0, errors
    output, errors = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, errors
    assert f"{out}: finished after " in output
    assert "epoch 3  train loss" in errors


def test_a_run_that_is_killed_is_followed_through_its_resumption(package, images, tmp_path):
    """Rows after the last checkpoint are taken back by `--resume`; the follower must not mind."""
    out = tmp_path / "run"
    words = (*train_words(package, images, out), "--epochs", 40, "--checkpoint-every", 5)
    trainer = spawn(*words)
    follower = Follower(out)
    deadline = time.monotonic() + 60
    while follower.look().state == "waiting" or follower.view.steps < 12:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.communicate()
    follower.look()
    again = spawn(*words, "--resume")
    while not (sight := follower.look()).has_ended:
        assert time.monotonic() < deadline + 60
        time.sleep(0.02)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert sight.state == "finished"
    fresh = Follower(out)
    fresh.look()
    assert follower.view.loss.points() == fresh.view.loss.points()
    assert follower.view.steps == fresh.view.steps == fresh.view.total_steps
