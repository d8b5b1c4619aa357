"""Memory that runs out while a run goes on: wherever it does, the state on disk is one that was."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from device_harness import into, lance_device, refused, started, train_words
from power_cut import assert_same_run

from lance_device import keeper
from lance_device.keeper import Keeper
from lance_device.optimizer import SGD
from lance_device.run_log import RunLog
from lance_device.step import StreamedStep

LENGTH = ("--epochs", 3, "--lr", 0.2, "--checkpoint-every", 2)  # 7 steps, 3 evaluations
HERE = Path(keeper.__file__).parent
MODULES = ("train", "keeper", "optimizer", "run_log", "progress", "measure", "numerics")
PLACES = 40


@pytest.fixture(scope="module")
def words(package, images):
    return (*train_words(package, images, "OUT"), *LENGTH, "--resume-or-start")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    started(lance_device(*into(words, out)))
    return out


class _Lack:
    """Memory runs out at the n-th line of these modules that is run while a run trains."""

    def __init__(self, line=None):
        self.line, self.seen, self.files = line, 0, {str(HERE / f"{name}.py") for name in MODULES}

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                raise MemoryError
        return self

    def run(self, words):
        sys.settrace(self)
        try:
            return lance_device(*words)
        finally:
            sys.settrace(None)


def test_memory_that_runs_out_anywhere_leaves_a_state_that_was(words, whole, tmp_path):
    counter = _Lack()
    started(counter.run(into(words, tmp_path / "counted")))
    chance = random.Random(1)
    for number in range(PLACES):
        out, line = tmp_path / f"run{number}", chance.randrange(1, counter.seen)
        message = refused(_Lack(line).run(into(words, out)), 9)
        assert "not enough memory" in message
        started(lance_device(*into(words, out)))
        assert_same_run(out, whole)


def _once(monkeypatch, kind, name, number):
    """The n-th call of a method runs out of memory, after it has done its work."""
    method, calls = getattr(kind, name), iter(range(1, 1000))

    def call(*words, **options):
        result = method(*words, **options)
        if next(calls) == number:
            raise MemoryError
        return result

    monkeypatch.setattr(kind, name, call)


@pytest.mark.parametrize(
    ("kind", "name"), [(SGD, "apply"), (RunLog, "step"), (RunLog, "evaluation"), (Keeper, "remember_best")]
)
def test_what_broke_off_halfway_is_not_saved_and_said(words, whole, tmp_path, monkeypatch, kind, name):
    """The third step ends the first epoch: its evaluation follows."""
    out = tmp_path / "run"
    with monkeypatch.context() as patches:
        _once(patches, kind, name, 1 if name in ("evaluation", "remember_best") else 3)
        line = refused(lance_device(*into(words, out)), 9)
    is_torn = name != "remember_best"
    assert line.endswith("; what came after step 2, the last that was saved, is lost") == is_torn
    resumed = started(lance_device(*into(words, out)))
    assert f"resuming after step {2 if is_torn else 3} of 7" in resumed.stderr
    assert_same_run(out, whole)


@pytest.mark.parametrize(("kind", "name"), [(SGD, "prepare"), (StreamedStep, "run"), (StreamedStep, "state")])
def test_what_breaks_off_before_anything_changed_is_saved(words, whole, tmp_path, monkeypatch, kind, name):
    out = tmp_path / "run"
    with monkeypatch.context() as patches:
        _once(patches, kind, name, 4 + (name == "state"))  # it is asked for once before the first step
        assert refused(lance_device(*into(words, out)), 9).endswith("or --memory-limit")
    assert "resuming after step 3 of 7" in started(lance_device(*into(words, out))).stderr
    assert_same_run(out, whole)


def test_an_update_takes_its_memory_before_it_changes_anything(monkeypatch):
    shapes = {"a": (2,), "b": (3, 4)}
    parameters, gradients = ({name: np.ones(shape, np.float32) for name, shape in shapes.items()} for _ in "pg")
    velocity = {}

    def refuse(*words):
        raise MemoryError

    with monkeypatch.context() as patches:
        patches.setattr(np, "empty", refuse)
        with pytest.raises(MemoryError):
            SGD(0.9, 0, 0).apply(parameters, velocity, gradients, 0.5)
    assert velocity == {}
    assert all((value == 1).all() for value in parameters.values())
