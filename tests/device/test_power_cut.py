"""A run that is cut off at any moment ends as if nothing had happened; damage is found and said."""

import errno
import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from device_harness import into, lance_device, spawn, started, table, train_words
from power_cut import ForgetfulDisk, assert_same_run, count_calls, run_until_killed, same_weights

from lance_device import keeper
from lance_device.train import Training
from lance_edge.checkpoints import Archive
from lance_edge.errors import Interrupted, StorageError

LENGTH = ("--epochs", 6, "--lr", 0.2, "--checkpoint-every", 2)  # 14 steps, 6 evaluations, 7 checkpoints
SECONDS = 0.4
FILES = (
    *("last.npz", "previous.npz", "best.npz", "features.cache"),
    *("steps.csv", "history.csv", "split.csv", "skipped.csv", "summary.csv", "run.json"),
)


@pytest.fixture(scope="module")
def words(package, images):
    return (*train_words(package, images, "OUT"), *LENGTH, "--resume-or-start")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run without a break."""
    out = tmp_path_factory.mktemp("whole") / "run"
    started(lance_device(*into(words, out)))
    return out


def _kill_and_compare(words, whole, folder, kills, seed):
    """Kill runs until there were so many kills; every run that comes to its end is as the whole one."""
    chance, killed, number, ended = random.Random(seed), 0, 0, 0
    calls = count_calls(into(words, folder / "counted"))
    while killed < kills:
        out = folder / f"run{number}"
        if run_until_killed(into(words, out), chance, calls, SECONDS):
            killed += 1
            continue
        assert_same_run(out, whole)
        number, ended = number + 1, ended + 1
    out = folder / f"run{number}"
    started(lance_device(*into(words, out)))
    assert_same_run(out, whole)
    return ended + 1


def test_runs_killed_at_random_moments_end_with_the_same_bits(words, whole, tmp_path):
    _kill_and_compare(words, whole, tmp_path, kills=20, seed=1)


@pytest.mark.slow
def test_200_kills(words, whole, tmp_path):
    ended = _kill_and_compare(words, whole, tmp_path, kills=200, seed=2)
    assert ended > 5


def _crashes(words, whole, tmp_path, monkeypatch, count, seed):
    """Power cuts at random operations of a whole run, on a disk that may lose whatever was not synced."""
    chance, out = random.Random(seed), tmp_path / "recorded"
    out.mkdir()
    with monkeypatch.context() as patches:
        disk = ForgetfulDisk(out, patches)
        started(lance_device(*into(words, out)))
    assert {"write", "sync", "sync folder", "replace", "hardlink_to"} <= {kind for kind, *_ in disk.operations}
    for number in range(count):
        moment, left = chance.randrange(len(disk.operations) + 1), tmp_path / f"left{number}"
        disk.crash(moment, chance, left)
        result = started(lance_device(*into(words, left)))
        resumed = re.search(r"resuming after step (\d+)", result.stderr)
        assert (int(resumed[1]) if resumed else 0) >= disk.promised_step(moment)
        assert_same_run(left, whole)


def test_what_a_power_cut_leaves_on_the_disk_is_enough(words, whole, tmp_path, monkeypatch):
    _crashes(words, whole, tmp_path, monkeypatch, count=15, seed=3)


@pytest.mark.slow
def test_1000_power_cuts(words, whole, tmp_path, monkeypatch):
    _crashes(words, whole, tmp_path, monkeypatch, count=1000, seed=4)


@pytest.mark.parametrize("number", range(3))
def test_a_power_cut_while_a_run_is_taken_up_again(words, whole, tmp_path, monkeypatch, stopped, number):
    """The same of a run that begins with a damaged last checkpoint, so that it recovers first."""
    chance, out = random.Random(number), tmp_path / "recorded"
    shutil.copytree(stopped, out)
    _flip(out / "last.npz", 0.5)
    with monkeypatch.context() as patches:
        disk = ForgetfulDisk(out, patches)
        started(lance_device(*into(words, out)))
    assert_same_run(out, whole)
    for attempt in range(4):
        left = tmp_path / f"left{attempt}"
        disk.crash(chance.randrange(min(40, len(disk.operations))), chance, left)
        started(lance_device(*into(words, left)))
        assert_same_run(left, whole)


def test_the_disk_of_these_tests_does_forget(tmp_path, monkeypatch):
    """A run whose checkpoints are renamed without a sync does not survive its power cuts."""
    out = tmp_path / "run"
    out.mkdir()
    disk = ForgetfulDisk(out, monkeypatch)
    for content in (b"old" * 10, b"new" * 10):
        with (out / ".half").open("xb") as file:
            file.write(content)
        (out / ".half").replace(out / "file")
    left = set()
    for number in range(40):
        disk.crash(len(disk.operations), random.Random(number), tmp_path / f"left{number}")
        file = tmp_path / f"left{number}" / "file"
        left.add(file.read_bytes() if file.exists() else None)
    assert {None, b"", b"old" * 10, b"new" * 10} <= left
    assert any(data and data not in (b"old" * 10, b"new" * 10) for data in left)  # torn


# --- damage at rest ---


@pytest.fixture(scope="module")
def stopped(words, tmp_path_factory):
    """A run that was stopped in its middle: every file is there, `previous.npz` is a step behind."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    prelude = """
import os, signal
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 9:
        os.kill(os.getpid(), signal.SIGTERM)
RunLog.step = step
"""
    process = spawn(*into(words, out), prelude=prelude)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert {file.name for file in out.iterdir()} == set(FILES)
    return out


def _flip(path, place, bit=3):
    data = bytearray(path.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


def _cut(path, place):
    with path.open("r+b") as file:
        file.truncate(int(place * path.stat().st_size))


def _warnings(result, out):
    """What was said, which is what is on record."""
    said = [line.removeprefix("warning: ") for line in result.stderr.splitlines() if "warning: " in line]
    recorded = json.loads((out / "run.json").read_text())["resumed"][-1]["recovered"]
    assert recorded == said
    return said


PLACES = (0.0, 0.02, 0.5, 0.95)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_flip, _cut])
def test_a_damaged_file_is_found_and_the_last_good_state_taken(words, whole, stopped, tmp_path, name, damage):
    for number, place in enumerate(PLACES):
        out = tmp_path / f"run{number}"
        shutil.copytree(stopped, out)
        damage(out / name, place)
        result = started(lance_device(*into(words, out)))
        said = _warnings(result, out)
        assert same_weights(out / "last.npz", whole / "last.npz")
        try:
            assert_same_run(out, whole)
        except AssertionError:  # what cannot be brought back is named
            assert any(line.startswith(f"{name} is damaged") for line in said), (place, said)
            assert name in ("steps.csv", "history.csv", "best.npz")


def test_a_damaged_last_checkpoint_says_from_where_it_goes_on(words, whole, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    _flip(out / "last.npz", 0.5)
    damaged = (out / "last.npz").read_bytes()
    said = _warnings(started(lance_device(*into(words, out))), out)
    assert said[0].startswith("last.npz is damaged (Bad CRC-32 for file")
    assert said[1:] == ["going on from previous.npz, step 8; last.npz is kept as last.npz.damaged"]
    assert (out / "last.npz.damaged").read_bytes() == damaged
    assert_same_run(out, whole)


def test_too_little_memory_to_read_a_checkpoint_is_no_damage(words, whole, stopped, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def refuse(*words):
        raise MemoryError

    with monkeypatch.context() as patches:
        patches.setattr(Archive, "tensor", refuse)
        result = lance_device(*into(words, out))
    assert (result.exit_code, result.stderr.count("error: not enough memory")) == (9, 1)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert _warnings(started(lance_device(*into(words, out))), out) == []
    assert_same_run(out, whole)


def test_a_checkpoint_that_cannot_be_set_aside_is_left(words, stopped, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    _flip(out / "last.npz", 0.5)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def refuse(path, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    result = lance_device(*into(words, out))
    assert result.exit_code == 8
    assert (
        "last.npz: cannot rename it to last.npz.damaged (Read-only file system); check the card"
        in result.stderr
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_table_that_is_gone_is_said(words, whole, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "history.csv").unlink()
    said = _warnings(started(lance_device(*into(words, out))), out)
    assert said[-1] == "history.csv is missing: its rows up to step 9 are lost"
    assert same_weights(out / "last.npz", whole / "last.npz")


def test_rows_that_were_changed_are_set_aside(words, whole, stopped, tmp_path):
    """A digit of the first step: no checkpoint vouches for any row; the weights are kept all the same."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    _flip(out / "steps.csv", 0.2, bit=0)
    damaged = (out / "steps.csv").read_bytes()
    said = _warnings(started(lance_device(*into(words, out))), out)
    assert said == ["steps.csv is damaged: its rows up to step 9 are lost (see steps.csv.damaged)"]
    assert (out / "steps.csv.damaged").read_bytes() == damaged
    assert [row["step"] for row in table(out / "steps.csv") if row["phase"] == "step"] == [
        *map(str, range(10, 15))
    ]
    assert same_weights(out / "last.npz", whole / "last.npz")
    assert same_weights(out / "best.npz", whole / "best.npz")


def test_rows_that_an_older_checkpoint_vouches_for_stay(words, whole, stopped, tmp_path):
    """Damage near the end: only the rows since the checkpoint before are lost, and no weights."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    _flip(out / "steps.csv", 0.97)
    damaged = (out / "steps.csv").read_bytes()
    result = started(lance_device(*into(words, out)))
    said = _warnings(result, out)
    assert said == ["steps.csv is damaged: its rows after step 8 are lost (see steps.csv.damaged)"]
    assert "resuming after step 9 of 14" in result.stderr
    assert not (out / "last.npz.damaged").exists()
    assert (out / "steps.csv.damaged").read_bytes() == damaged
    steps = [int(row["step"]) for row in table(out / "steps.csv") if row["phase"] == "step"]
    assert steps == [*range(1, 9), *range(10, 15)]
    for name in ("last.npz", "best.npz"):
        assert same_weights(out / name, whole / name)


def _lose(path):
    path.unlink()


def _change_a_word(path):
    word = {"steps.csv": "backward", "history.csv": "epoch"}[path.name]
    path.write_text(path.read_text().replace(word, word.upper(), 1))


def _halve(path):
    _cut(path, 0.5)


@pytest.mark.parametrize("damage", [_lose, _change_a_word, _halve])
@pytest.mark.parametrize("name", ["steps.csv", "history.csv"])
def test_damaged_rows_of_a_finished_run_cost_no_weights(package, images, tmp_path, name, damage):
    """`previous.npz` is the state before the first step: it declares no rows, and is not what to go on from."""
    out = tmp_path / "run"
    started(lance_device(*train_words(package, images, out), "--steps", 4, "--eval-every", 1))
    before = tmp_path / "before"
    shutil.copytree(out, before)
    damage(out / name)
    result = started(lance_device(*train_words(package, images, out), "--resume"))
    assert "resuming after step 4 of 4" in result.stderr
    [said] = _warnings(result, out)
    assert said.startswith(f"{name} is {'missing' if damage is _lose else 'damaged'}: its rows ")
    assert not (out / "last.npz.damaged").exists()
    for checkpoint in ("last.npz", "best.npz"):
        assert same_weights(out / checkpoint, before / checkpoint)


def test_a_power_cut_while_damaged_rows_are_given_up(words, whole, stopped, tmp_path, monkeypatch):
    """The damaged file stays aside, and the weights are those of the newest checkpoint, whenever it happens."""
    out = tmp_path / "recorded"
    shutil.copytree(stopped, out)
    _flip(out / "steps.csv", 0.97)
    damaged = (out / "steps.csv").read_bytes()
    chance = random.Random(7)
    with monkeypatch.context() as patches:
        disk = ForgetfulDisk(out, patches)
        started(lance_device(*into(words, out)))
    for attempt in range(6):
        left = tmp_path / f"left{attempt}"
        disk.crash(chance.randrange(min(30, len(disk.operations))), chance, left)
        result = started(lance_device(*into(words, left)))
        assert int(re.search(r"resuming after step (\d+)", result.stderr)[1]) >= 9
        assert same_weights(left / "last.npz", whole / "last.npz")
        assert (left / "steps.csv.damaged").read_bytes() == damaged


def test_rows_that_cannot_be_written_are_found_before_anything_is_renamed(words, stopped, tmp_path):
    """A folder in place of the file: root may write whatever its permissions say."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "steps.csv").unlink()
    (out / "steps.csv").mkdir()
    _flip(out / "last.npz", 0.5)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    result = lance_device(*into(words, out))
    assert result.exit_code == 8
    assert "steps.csv: cannot write (Is a directory), so the run cannot go on; check its perm" in result.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_a_best_that_is_later_than_the_previous_is_gone_on_with(package, images, whole, tmp_path):
    out = tmp_path / "run"
    started(lance_device(*train_words(package, images, out), "--steps", 3))
    _flip(out / "last.npz", 0.5)
    result = started(lance_device(*train_words(package, images, out), "--resume"))
    assert _warnings(result, out)[1] == "going on from best.npz, step 3; last.npz is kept as last.npz.damaged"


def test_best_stands_in_for_the_others(words, whole, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for name in ("last.npz", "previous.npz"):
        _cut(out / name, 0.5)
    said = _warnings(started(lance_device(*into(words, out))), out)
    assert said[2].startswith("going on from best.npz, step ")
    assert_same_run(out, whole)


def test_a_lost_best_is_said(words, whole, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "best.npz").unlink()
    said = _warnings(started(lance_device(*into(words, out))), out)
    assert said[0] == "best.npz is missing or of another run"
    assert "the best so far, are lost; the best is chosen anew" in said[1]
    assert same_weights(out / "last.npz", whole / "last.npz")


def test_nothing_whole_is_left(words, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    for name in ("last.npz", "previous.npz", "best.npz"):
        _cut(out / name, 0.5)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    result = lance_device(*into(words, out))
    assert result.exit_code == 4
    assert "no checkpoint here is whole (last.npz is damaged (" in result.stderr
    assert "start a new run with another --out" in result.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_evaluation_that_no_checkpoint_knows_comes_again(words, whole, stopped, tmp_path, monkeypatch):
    """The disk is full when the last evaluation is to be saved: `run.json` still fits, `last.npz` does not."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)

    def refuse(path, *words):
        raise StorageError(f"{path}: cannot write (No space left on device)")

    def stop_before(training, stop):
        raise Interrupted("stopped")

    with monkeypatch.context() as patches:
        evaluate = Training._evaluate
        is_end = lambda training: training._run.progress.step == training._run.total_steps  # noqa: E731
        patches.setattr(
            Training, "_evaluate", lambda *both: (stop_before if is_end(both[0]) else evaluate)(*both)
        )
        assert lance_device(*into(words, out)).exit_code == 130
    with monkeypatch.context() as patches:
        patches.setattr(keeper, "write_checkpoint", refuse)
        assert lance_device(*into(words, out)).exit_code == 8
    started(lance_device(*into(words, out)))
    assert_same_run(out, whole)


def test_two_processes_do_not_train_into_one_folder(words, tmp_path):
    out = tmp_path / "run"
    process = spawn(*into(words, out), "--steps", 100_000)
    assert any("36 training" in line for line in process.stderr)
    result = lance_device(*into(words, out))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert result.exit_code == 8
    assert "another process is training into this folder; wait for it, or choose another --out" in result.stderr
