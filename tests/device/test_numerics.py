"""Steps whose values are no numbers: named by step and layer, never applied, and then as `--on-nan` says."""

import itertools
import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from device_harness import arrays, assert_same_arrays, refused, started, table, train
from layered_package import write_layered_package
from tiny_package import PREPROCESSING, SPLIT
from tiny_training import loss_of, trainable

from lance_device import features
from lance_device.checkpoint import Best
from lance_device.keeper import is_better
from lance_device.numerics import MOST_IN_A_ROW, check_gradients, finite_loss
from lance_device.run_log import RunLog
from lance_edge.datasets import open_dataset
from lance_edge.errors import NumericalError
from lance_edge.images import load_batch
from lance_edge.profiles import HistoryRow

STEPS, LR = 6, 0.2
PLAIN = ("--no-shuffle", "--augment", "none", "--eval-every", 0, "--cache", "off", "--micro-batch", 16)
FLAGS = (*PLAIN, "--steps", STEPS, "--lr", LR, "--method", "bp", "--clip", 0, "--schedule", "constant")


@pytest.fixture
def bad_batches(monkeypatch):
    """Makes the images of some steps (from 1) infinite, as a broken sensor would."""

    def spoil(*steps):
        loads = itertools.count()
        loads_of_a_step = 16 // features.IMAGES_AT_A_TIME  # the micro-batch of PLAIN, all of a batch

        def load(*arguments):
            images = load_batch(*arguments)
            return images + np.inf if 1 + next(loads) // loads_of_a_step in steps else images

        monkeypatch.setattr(features, "load_batch", load)

    return spoil


def _in_torch(package, images, bad, factor):
    """The same training in PyTorch, leaving the bad batches out."""
    part = open_dataset(images, SPLIT).train
    weights = trainable(package)
    sgd = torch.optim.SGD(weights.values(), lr=LR, momentum=0.9)
    for step in range(STEPS):
        if step + 1 in bad:
            sgd.param_groups[0]["lr"] *= factor
            continue
        indices = [(step * 16 + i) % len(part) for i in range(16)]
        loss = loss_of(package, weights, "bp", load_batch(part, indices, PREPROCESSING), part.labels[indices])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return {name: value.detach().numpy() for name, value in weights.items()}


@pytest.mark.parametrize(("choice", "factor"), [("skip", 1.0), ("halve-lr", 0.5)])
def test_a_bad_step_is_left_out(package, images, tmp_path, bad_batches, choice, factor):
    bad_batches(3, 5)
    out = tmp_path / "run"
    result = started(train(package, images, out, *FLAGS, "--on-nan", choice))
    expected = _in_torch(package, images, {3, 5}, factor)
    found = arrays(out / "last.npz")
    for name, value in expected.items():  # float32 sums in another order over 6 steps: 1e-6 each at most
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)
    share = {"skip": "100 %", "halve-lr": "50 %"}[choice]
    assert re.search(r"^not applied +2 steps \(--on-nan\)$", result.stdout, re.MULTILINE)
    assert json.loads((out / "run.json").read_text())["result"]["steps_not_applied"] == 2
    assert (
        "warning: step 3: the loss is nan: features, of the frozen layers, is not finite; not applied"
        f" (--on-nan {choice}), going on at {share} of the learning rate" in result.stderr
    )
    losses = [float(row["loss"]) for row in table(out / "steps.csv") if row["phase"] == "step"]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, False, True]
    with np.load(out / "last.npz") as archive:
        progress = json.loads(str(archive["meta"]))["progress"]
    assert (progress["step"], progress["skipped"], progress["skipped_in_a_row"]) == (STEPS, 2, 0)
    assert progress["rate_factor"] == factor**2
    assert math.isfinite(float(table(out / "history.csv")[0]["train_loss"]))


def test_by_default_the_run_stops_and_the_state_before_is_saved(package, images, tmp_path, bad_batches):
    bad_batches(4)
    out = tmp_path / "run"
    line = refused(train(package, images, out, *FLAGS), 7)
    assert line == (
        "error: step 4: the loss is nan: features, of the frozen layers, is not finite; the step was not"
        f" applied, the state after step 3 is in {out / 'last.npz'}; go on with --resume --on-nan halve-lr, or"
        " start again with a lower --lr (this run: 0.2) or with --clip 2"
    )
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    bad_batches()
    started(train(package, images, tmp_path / "good", *FLAGS))
    started(train(package, images, out, "--resume"))
    assert_same_arrays(out / "last.npz", tmp_path / "good" / "last.npz")


def test_a_stopped_run_may_go_on_another_way(package, images, tmp_path, bad_batches):
    bad_batches(4)
    out = tmp_path / "run"
    refused(train(package, images, out, *FLAGS), 7)
    bad_batches(1)  # step 4 again, of a new process
    started(train(package, images, out, "--resume", "--on-nan", "skip"))
    expected = _in_torch(package, images, {4}, 1.0)
    for name, value in expected.items():
        np.testing.assert_allclose(arrays(out / "last.npz")[name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def stopped_after(monkeypatch):
    """Makes a run get a SIGTERM when it has done so many steps."""

    def stop(step):
        write = RunLog.step

        def write_and_stop(log, *arguments, **named):
            write(log, *arguments, **named)
            if log._run.progress.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(RunLog, "step", write_and_stop)

    return stop


def test_a_run_that_left_a_step_out_is_taken_up_again(package, images, tmp_path, bad_batches, stopped_after):
    """Its rows hold a loss that is no number."""
    bad_batches(3)
    stopped_after(4)
    out = tmp_path / "run"
    refused(train(package, images, out, *FLAGS, "--on-nan", "skip"), 130)
    started(train(package, images, out, "--resume"))
    for name, value in _in_torch(package, images, {3}, 1.0).items():
        np.testing.assert_allclose(arrays(out / "last.npz")[name], value, rtol=1e-4, atol=1e-6)
    losses = [float(row["loss"]) for row in table(out / "steps.csv") if row["phase"] == "step"]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, True, True]


def test_a_run_whose_evaluation_is_no_number_is_taken_up_again(package, images, tmp_path):
    out = tmp_path / "run"
    line = refused(train(package, images, out, *PLAIN, "--steps", 1, "--lr", 1e30, "--clip", 0), 7)
    assert line == (
        "error: the run ended with an evaluation whose loss is no number (0 steps of 1 not applied); its"
        " weights have blown up, so --resume cannot help: start again with a lower --lr (this run: 1e+30) or"
        " with --clip 2"
    )
    [row] = table(out / "history.csv")
    assert not math.isfinite(float(row["test_loss"]))
    again = train(package, images, out, "--resume")
    assert refused(again, 7) == line
    assert "resuming after step 1 of 1" in again.stderr
    assert table(out / "history.csv") == [row]


@pytest.mark.parametrize(("validation", "train_loss"), [(0.5, 1.0), (None, math.nan)])
def test_any_evaluation_is_better_than_one_that_is_no_number(validation, train_loss):
    loss = None if validation is None else math.nan
    best = Best(1, 3, train_loss, validation, loss, None)
    row = HistoryRow(2, 6, 0.1, 1.0, 0.5, validation, validation and 2.0, None, None, False, 9.0)
    assert is_better(row, best)


def test_when_every_step_is_bad_it_stops_all_the_same(package, images, tmp_path, bad_batches):
    bad_batches(*range(3, 100))
    words = (*PLAIN, "--steps", 40, "--on-nan", "skip")
    line = refused(train(package, images, tmp_path / "run", *words), 7)
    assert f"error: step {3 + MOST_IN_A_ROW}: the loss is nan" in line
    assert line.endswith("run/last.npz; start again with a lower --lr (this run: 0.05)")
    assert len(table(tmp_path / "run" / "history.csv")) == 0


@pytest.mark.parametrize("choice", ["skip", "halve-lr"])
def test_a_run_that_ends_with_lost_weights_has_failed(package, images, tmp_path, choice):
    out = tmp_path / "run"
    flags = (*PLAIN, "--lr", 1e30, "--clip", 0, "--steps", 6, "--on-nan", choice)
    line = refused(train(package, images, out, *flags), 7)
    assert "ended with an evaluation whose loss is no number (5 steps of 6 not applied); its weights" in line
    assert "have blown up, so --resume cannot help: start again with a lower --lr" in line
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], record["result"]["steps_not_applied"]) == ("failed", 5)
    assert not (out / "features.cache").exists()


@pytest.mark.parametrize(("bad", "fails"), [((6,), False), ((5, 6), True), ((4, 5), False)])
def test_one_bad_batch_at_the_end_is_no_failure_but_two_are(package, images, tmp_path, bad_batches, bad, fails):
    bad_batches(*bad)
    result = train(package, images, tmp_path / "run", *FLAGS, "--on-nan", "skip")
    if not fails:
        started(result)
        return
    assert refused(result, 7) == (
        "error: the run ended with 2 steps in a row that were not applied (2 steps of 6 not applied); start"
        " again with a lower --lr (this run: 0.2) or with --clip 2"
    )


def test_a_run_whose_weights_overflow_names_the_largest_layer(package, images, tmp_path):
    flags = (*PLAIN, "--lr", 1e30, "--clip", 0, "--steps", 40)
    line = refused(train(package, images, tmp_path / "run", *flags), 7)
    assert re.match(
        r"error: step 2: the loss is (nan|inf): what the frozen layers give is finite, so it is the trained"
        r" ones; the largest weight is [0-9.e+]+, of layer (conv|head); the step was not applied",
        line,
    )
    assert "; its weights have blown up, so --resume cannot help: start again with a lower --lr" in line


def test_a_run_whose_update_overflows_names_its_parameter(package, images, tmp_path):
    flags = (*PLAIN, "--lr", 1e39, "--clip", 2, "--steps", 40)
    line = refused(train(package, images, tmp_path / "run", *flags), 7)
    assert re.match(
        r"error: step \d+: the update of (conv|head)\.(weight|bias) is not finite in float32;", line
    )


@pytest.mark.parametrize("method", ["asi", "hosvd"])
def test_a_method_that_goes_by_layer_names_the_layer(tmp_path, images, bad_batches, method):
    layered = write_layered_package(tmp_path / "pkg.tar")
    bad_batches(1)
    line = refused(train(layered, images, tmp_path / "run", "--method", method, "--cache", "off"), 7)
    assert re.match(
        r"error: step 1: the input of layer \w+: an activation is not finite, or too large to be squared;", line
    )


WEIGHTS = {"a.weight": np.array([1.0, -3e30], np.float32), "b.weight": np.ones(2, np.float32)}


def test_the_message_says_where_it_begins():
    values = {"loss": np.float32(np.inf), "low": np.ones(2), "high": np.array([1.0, np.nan])}
    with pytest.raises(NumericalError, match="the loss is inf: high, of the frozen layers, is not finite"):
        finite_loss(values, ("low", "high"), WEIGHTS)
    with pytest.raises(NumericalError, match=r"the largest weight is 3e\+30, of layer a"):
        finite_loss(values, ("low",), WEIGHTS)
    assert finite_loss({"loss": np.float32(0.5)}, (), WEIGHTS) == 0.5


def test_gradients_name_their_layers():
    bad = {"a.weight": np.array([np.nan]), "a.bias": np.array([np.inf]), "b.weight": np.ones(2)}
    with pytest.raises(NumericalError, match=r"^the gradient of layer a is not finite$"):
        check_gradients(bad)
    check_gradients({"b.weight": np.ones(2)})
