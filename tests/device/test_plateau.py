"""The schedule `plateau`: the rule, against one written down literally; runs that follow it; power cuts."""

import json
import math
import random
import signal

import numpy as np
import pytest
from device_harness import (
    arrays,
    assert_same_arrays,
    into,
    lance_device,
    refused,
    spawn,
    started,
    table,
    train,
    train_words,
)
from power_cut import assert_same_run, count_calls, run_until_killed

from lance_device.keeper import is_better
from lance_device.schedule import Plateau
from lance_edge.profiles import HistoryRow

# A learning rate far too high, so that the loss stops falling soon.
FLAGS = ("--method", "bp", "--epochs", 40, "--lr", 10, "--momentum", 0.9, "--clip", 0, "--augment", "none")
FLAGS += ("--schedule", "plateau", "--patience", 2, "--min-lr", 0.5)


def literal_rates(losses, rate, patience, least):
    """The learning rate of each epoch, as GPM's training loop has it: ends with the epoch that ends the run."""
    best, left, rates = math.inf, patience, []
    for loss in losses:
        rates.append(rate)
        if loss < best:
            best, left = loss, patience
        else:
            left -= 1
            if left <= 0:
                rate /= 2
                if rate < least:
                    break
                left = patience
    return rates


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_is_the_published_one(seed):
    chance = random.Random(seed)
    losses = [chance.choice([1.0, 0.9, math.nan, math.inf, chance.random()]) for _ in range(60)]
    patience, least = chance.randint(1, 6), chance.choice([1e-5, 0.02, 0.2])
    state, rates = Plateau(), []
    for loss in losses:
        rates.append(0.1 * state.factor)
        state.observe(loss, 0.1, patience, least)
        if state.is_over:
            break
    expected = literal_rates(losses, 0.1, patience, least)
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.fixture(scope="module")
def whole(package, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("plateau") / "run"
    return out, started(train(package, images, out, *FLAGS))


def test_a_run_halves_its_rate_and_ends_itself(whole):
    out, result = whole
    history = table(out / "history.csv")
    rates = [float(row["learning_rate"]) for row in history]
    losses = [float(row["validation_loss"]) for row in history]
    assert rates == pytest.approx(literal_rates(losses, 10, 2, 0.5))
    assert len(set(rates)) > 3
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["result"]["step"] < record["total_steps"] == 90
    assert "no lower loss in 2 epochs: learning rate 2.5" in result.stderr
    assert "no lower loss in 2 epochs: the run ends here" in result.stderr


def test_best_is_the_lowest_validation_loss(whole):
    out, _ = whole
    history = table(out / "history.csv")
    lowest = min(history, key=lambda row: float(row["validation_loss"]))
    record = json.loads((out / "run.json").read_text())["result"]
    assert record["best_epoch"] == int(lowest["epoch"])
    assert record["best_chosen_by"] == "validation loss"
    with np.load(out / "best.npz") as best:
        assert json.loads(str(best["meta"]))["step"] == int(lowest["step"])


def test_a_better_loss_beats_a_better_accuracy_only_where_asked_for():
    def row(accuracy, loss):
        return HistoryRow(1, 1, 0.1, 0.5, 0.5, accuracy, loss, None, None, False, 0.0)

    from lance_device.checkpoint import Best

    best = Best(1, 1, 0.5, validation_accuracy=0.8, validation_loss=0.5, test_accuracy=None)
    assert is_better(row(0.7, 0.4), best, by_loss=True)
    assert not is_better(row(0.9, 0.6), best, by_loss=True)
    assert not is_better(row(0.7, 0.4), best)


def test_a_finished_run_stays_finished(package, images, whole, tmp_path):
    out, _ = whole
    before = arrays(out / "last.npz")
    started(train(package, images, out, "--resume"))
    after = arrays(out / "last.npz")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("epoch", [4, 7])
def test_a_stopped_run_goes_on_with_its_rate_and_patience(package, images, whole, tmp_path, epoch):
    out = tmp_path / "run"
    step = int(table(whole[0] / "history.csv")[epoch - 1]["step"]) + 1
    prelude = f"""
import os
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == {step}:
        os.kill(os.getpid(), {int(signal.SIGTERM)})
RunLog.step = step
"""
    process = spawn(*train_words(package, images, out), *FLAGS, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    started(train(package, images, out, "--resume"))
    assert_same_arrays(out / "last.npz", whole[0] / "last.npz")
    assert_same_run(out, whole[0])


def test_power_cuts_change_nothing(package, images, tmp_path):
    words = (*train_words(package, images, "OUT"), *FLAGS, "--checkpoint-every", 3, "--resume-or-start")
    started(lance_device(*into(words, tmp_path / "whole")))
    chance, calls, killed = random.Random(3), count_calls(into(words, tmp_path / "counted")), 0
    while killed < 6:
        killed += run_until_killed(into(words, tmp_path / "run"), chance, calls, 0.4)
        if json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished":
            break
    started(lance_device(*into(words, tmp_path / "run")))
    assert killed
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--patience", 3), "--patience is of --schedule plateau; give both or none"),
        (("--min-lr", 0.1), "--min-lr is of --schedule plateau"),
        (("--schedule", "plateau", "--eval-every", 2), "looks at the loss after every epoch; leave out --eval"),
        (("--schedule", "plateau", "--lr", 0.1, "--min-lr", 0.2), "--min-lr 0.2 is above --lr 0.1; lower it"),
        (("--schedule", "plateau", "--patience", 0), "'--patience': 0 is not in the range x>=1"),
        (("--schedule", "plateau", "--min-lr", 0), "'--min-lr'"),
    ],
)
def test_options_that_do_not_fit_are_refused(package, images, tmp_path, flags, message):
    result = train(package, images, tmp_path / "run", *flags)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_patience(package, images, whole):
    line = refused(train(package, images, whole[0], "--resume", "--patience", 5), 4)
    assert "this run was started with --patience 2, not --patience 5" in line
