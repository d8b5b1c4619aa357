"""Heads of several tasks in one package; the folder of tasks, and what is measured in it."""

import csv
import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from device_harness import arrays, lance_device, refused, started, train
from test_protect import memory_of, random_memory
from tiny_package import CHANNELS, CLASSES, FEATURES, write_images, write_tiny_package
from tiny_training import features_of
from torch.nn import functional

from lance_device.classifier import all_heads
from lance_device.remeasure import kept_bytes, remeasure
from lance_device.stop import ended_by_signals
from lance_device.task_folder import TaskFolder, TaskRecord
from lance_edge.accuracy_matrix import read_matrix
from lance_edge.bundle import Bundle, describe, npz_bytes, write_bundle
from lance_edge.errors import CheckpointError, DataError, StorageError
from lance_edge.manifest import Task, TensorSpec
from lance_edge.memory import memory_bytes
from lance_edge.names import MEMORY_MEMBER, WEIGHTS_MEMBER

HEAD = (TensorSpec("head.weight", (3, CHANNELS), "float32"), TensorSpec("head.bias", (3,), "float32"))
ONE = ("ant", "bee", "cow")


def followed(source, target, head):
    """A package of task `two` after task `one`, whose head is given."""
    with Bundle(source) as bundle:
        manifest = bundle.manifest
        contents = {member.name: bundle.read(member.name) for member in manifest.members}
        stored = bundle.arrays(WEIGHTS_MEMBER)
        weights = {name: np.array(stored[name]) for name in stored}
    weights |= {f"heads/one/{name}": value for name, value in head.items()}
    contents[WEIGHTS_MEMBER] = npz_bytes(weights)
    contents[MEMORY_MEMBER] = memory_bytes(memory_of({"conv": random_memory(1, FEATURES, [2])}, "channel"))
    changed = dataclasses.replace(
        manifest,
        task="two",
        tasks=(Task("one", ONE, HEAD),),
        protected=("conv",),
        members=tuple(describe(name, data) for name, data in contents.items()),
    )
    write_bundle(target, changed, contents)
    return target


@pytest.fixture(scope="module")
def trained(package, images, tmp_path_factory):
    """A run that classifies well; its head, moved on by one class and less sure, stands for another task's."""
    folder = tmp_path_factory.mktemp("heads")
    started(train(package, images, folder / "first", "--epochs", 60, "--lr", 1.0, "--method", "bp"))
    found = arrays(folder / "first/last.npz")
    head = {name: np.roll(0.4 * found[name], 1, axis=0) for name in ("head.weight", "head.bias")}
    two = dataclasses.replace(package, path=followed(package.path, folder / "two.tar", head))
    started(train(two, images, folder / "run", "--epochs", 60, "--lr", 1.0, "--method", "bp"))
    return two, folder / "run"


@pytest.fixture
def words(trained):
    two, run = trained
    return ("--artifact", two.path, "--checkpoint", run / "last.npz", "--threads", 1)


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """The same images with the classes of task one: each a class further on, as its head is."""
    images = write_images(tmp_path_factory.mktemp("renamed") / "images")
    for number, name in enumerate(CLASSES):
        (images / name).rename(images / ONE[(number + 1) % 3])
    return images


def test_an_earlier_task_is_evaluated_by_its_own_head(words, renamed, images):
    by_name = json.loads(
        started(lance_device("eval", *words, "--data", renamed, "--task", "one", "--json")).stdout
    )
    by_number = json.loads(
        started(lance_device("eval", *words, "--data", renamed, "--task", 1, "--json")).stdout
    )
    assert by_name == by_number
    assert set(by_name["classes"]) == set(ONE)
    own = json.loads(started(lance_device("eval", *words, "--data", images, "--json")).stdout)
    last = json.loads(started(lance_device("eval", *words, "--data", images, "--task", "two", "--json")).stdout)
    assert own == last
    assert set(own["classes"]) == set(CLASSES)
    assert own["accuracy"] > 0.8


def test_an_earlier_heads_logits_are_those_of_a_network_with_its_weights(trained, tmp_path):
    """Against the same graphs with the earlier head put in by hand, and by numpy from the pooled features."""
    two, run = trained
    with Bundle(two.path) as bundle:
        every = all_heads(bundle, run / "last.npz", 1)
    x = np.random.default_rng(0).standard_normal((5, 3, 12, 12)).astype(np.float32)
    found = {head.task: logits for head, logits in every.logits(x)}
    assert list(found) == ["one", "two"]
    weight = torch.from_numpy(arrays(run / "last.npz")["conv.weight"])
    pooled = functional.relu(functional.conv2d(features_of(two, x), weight)).mean((2, 3)).numpy()
    for head in every.heads:
        expected = pooled @ head.parameters["head.weight"].T + head.parameters["head.bias"]
        np.testing.assert_allclose(found[head.task], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found["one"] - found["two"]).max() > 0.1


def test_a_task_that_is_not_there(words, images):
    line = refused(lance_device("eval", *words, "--data", images, "--task", "three"), 5)
    assert "no task 'three' here; expected one of 1 (one), 2 (two)" in line


def test_images_of_another_task_say_which(words, images, renamed, tmp_path):
    line = refused(lance_device("eval", *words, "--data", renamed), 5)
    assert line.endswith(f"{renamed}: expected other classes, found those of task one; give --task one")
    line = refused(lance_device("eval", *words, "--data", images, "--task", "one"), 5)
    assert line.endswith(f"{images}: expected other classes, found those of task two; give --task two")
    others = write_images(tmp_path / "others")
    (others / "red").rename(others / "pink")
    line = refused(lance_device("eval", *words, "--data", others), 5)
    assert "the classes differ: missing 'red'; unexpected 'pink'" in line


def test_prediction_with_and_without_a_task(words, images):
    files = sorted((images / "red").iterdir())[:4]
    named = json.loads(started(lance_device("predict", *words, "--task", "one", "--json", *files)).stdout)
    assert all("task" not in entry and entry["predictions"][0]["class"] in ONE for entry in named)
    own = json.loads(started(lance_device("predict", *words, "--task", "two", "--json", *files)).stdout)
    free = json.loads(started(lance_device("predict", *words, "--json", "--micro-batch", 3, *files)).stdout)
    for one, two, found in zip(named, own, free, strict=True):
        surest = max((one, "one"), (two, "two"), key=lambda pair: pair[0]["predictions"][0]["probability"])
        assert found["task"] == surest[1]
        ranking = [(entry["class"], pytest.approx(entry["probability"])) for entry in surest[0]["predictions"]]
        assert [(entry["class"], entry["probability"]) for entry in found["predictions"]] == ranking
    text = started(lance_device("predict", *words, files[0])).stdout
    assert text.startswith(f"{files[0]}  {free[0]['task']}: ")


def test_a_model_has_no_tasks(tmp_path):
    result = lance_device("predict", "--model", tmp_path / "m.onnx", "--task", "one", "a.jpg")
    assert result.exit_code == 2
    assert "--task is of a package; an exported model has one head" in result.stderr


# --- the folder ---


def test_a_first_task_is_a_run_in_a_folder_of_its_own(package, images, tmp_path):
    root = tmp_path / "tasks"
    result = started(train(package, images, root, "--tasks", "--epochs", 3, "--lr", 0.2))
    assert "after task-1: task-1 " in result.stdout
    assert ", BWT -, forgetting -, learning accuracy " in result.stdout
    (place,) = TaskFolder(root).tasks()
    assert place.path == root / "1-task-1"
    assert place.package.read_bytes() == package.path.read_bytes()
    assert place.record == TaskRecord("task-1", str(images), "last")
    assert place.is_finished
    matrix = read_matrix(root / "accuracy_matrix.csv")
    history = list(csv.DictReader((place.path / "history.csv").open()))[-1]
    assert matrix.rows[0].accuracies == (pytest.approx(float(history["test_accuracy"])),)
    assert matrix.rows[0].ranks == {"conv": 0}
    sizes = sum(value.nbytes for value in package.weights.values())
    assert matrix.rows[0].kept_bytes == {"memory": 0, "heads": 0, "weights": sizes}
    value = json.loads(started(lance_device("eval", "--run", root, "--json")).stdout)
    assert value["accuracy"] == pytest.approx(matrix.acc)
    files = sorted((images / "red").iterdir())[:2]
    assert len(started(lance_device("predict", "--run", root, *files)).stdout.splitlines()) == 2


def test_kept_bytes_are_columns_heads_and_weights(trained):
    two, _ = trained
    with Bundle(two.path) as bundle:
        kept = kept_bytes(bundle)
    assert kept == {
        "memory": 4 * 2 * FEATURES,
        "heads": 4 * (3 * CHANNELS + 3),
        "weights": sum(value.nbytes for value in two.weights.values()),
    }


def test_a_stopped_task_is_gone_on_with(package, images, tmp_path):
    root, whole = tmp_path / "tasks", tmp_path / "whole"
    flags = ("--epochs", 3, "--lr", 0.2, "--threads", 1)
    started(lance_device("train", "--artifact", package.path, "--data", images, "--out", whole, *flags))
    started(train(package, images, root, "--tasks", *flags[:4]))
    place = TaskFolder(root).current()
    (place.path / "previous.npz").replace(place.path / "last.npz")
    (root / "accuracy_matrix.csv").unlink()
    started(lance_device("train", "--data", images, "--out", root, "--resume"))
    assert (root / "accuracy_matrix.csv").exists()
    found, expected = arrays(place.path / "last.npz"), arrays(whole / "last.npz")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_what_is_missing_or_too_much_is_said(package, images, tmp_path):
    root = tmp_path / "tasks"
    result = lance_device("train", "--data", images, "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert "--artifact is missing" in result.stderr
    line = refused(lance_device("train", "--tasks", "--data", images, "--out", root), 5)
    assert "no task here yet; give the first one's package with --artifact" in line
    started(train(package, images, root, "--tasks", "--steps", 1))
    line = refused(train(package, images, root, "--resume"), 4)
    assert "task task-1 has its own package" in line
    assert "leave --artifact out" in line
    line = refused(lance_device("eval", "--run", tmp_path / "none"), 4)
    assert "no finished task here; give a folder that lance-device train --tasks made" in line
    result = lance_device("eval", "--run", root, "--artifact", package.path)
    assert result.exit_code == 2
    assert "--run says --artifact and --checkpoint; leave them out" in result.stderr
    line = refused(lance_device("eval", "--run", root, "--task", "x"), 5)
    assert "no task 'x' here; expected one of 1 (task-1)" in line


def test_another_tasks_images_need_the_next_package_first(package, images, tmp_path):
    root, others = tmp_path / "tasks", write_images(tmp_path / "others")
    started(train(package, images, root, "--tasks", "--steps", 1))
    line = refused(lance_device("train", "--data", others, "--out", root), 4)
    assert f"task task-1 is finished, and its images were {images}; for a next task, make its package" in line
    assert line.endswith(f"first: lance-device next-task --run {root} --next-data {others}")
    line = refused(lance_device("train", "--data", images, "--out", root), 8)
    assert "holds a run already" in line


def test_images_that_are_gone_leave_the_row_for_later(package, tmp_path):
    images = write_images(tmp_path / "images")
    root = tmp_path / "tasks"
    started(train(package, images, root, "--tasks", "--steps", 1))
    (root / "accuracy_matrix.csv").unlink()
    images.rename(tmp_path / "away")
    said = []
    assert remeasure(TaskFolder(root), said.append).rows == ()
    assert "nothing is known after task-1 yet" in said[0]
    (tmp_path / "away").rename(images)
    assert len(remeasure(TaskFolder(root), said.append).rows) == 1
    (root / "accuracy_matrix.csv").write_text("torn")
    assert len(remeasure(TaskFolder(root), said.append).rows) == 1
    assert "all tasks are measured again" in said[1]


# --- a task begins at once, or not at all ---


RECORD = TaskRecord("plants", "/data", "last")


def test_a_task_whose_package_fails_never_was(tmp_path):
    folder = TaskFolder(tmp_path / "tasks")

    def fail(path):
        path.write_bytes(b"half a package")
        raise DataError("no")

    with pytest.raises(DataError):
        folder.begin(RECORD, fail)
    assert not folder.has_tasks
    assert list(folder.root.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_task_that_is_stopped_while_it_is_made_never_was(number, tmp_path):
    folder = TaskFolder(tmp_path / "tasks")

    def be_stopped(path):
        path.write_bytes(b"half a package")
        os.kill(os.getpid(), number)
        signal.pause()

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        folder.begin(RECORD, be_stopped)
    assert list(folder.root.iterdir()) == []
    assert signal.getsignal(number) == before


def test_a_task_that_begins_is_left_alone_by_another_command(tmp_path):
    folder = TaskFolder(tmp_path / "tasks")

    def slow(path):
        path.write_bytes(b"one")
        with pytest.raises(StorageError) as raised:
            TaskFolder(folder.root).begin(
                TaskRecord("other", "/data", "last"), lambda path: path.write_bytes(b"")
            )
        assert str(raised.value) == (
            f"{folder.root}: another process begins a task in this folder; wait for it"
        )
        assert path.read_bytes() == b"one"

    place = folder.begin(RECORD, slow)
    assert folder.tasks() == (place,)
    folder.begin(TaskRecord("other", "/data", "last"), lambda path: path.write_bytes(b"two"))
    assert [place.record.task for place in folder.tasks()] == ["plants", "other"]


def test_what_goes_wrong_with_a_package_is_not_the_folders_fault(tmp_path):
    def fail(path):
        raise ConnectionResetError("the camera is gone")

    with pytest.raises(ConnectionResetError):
        TaskFolder(tmp_path / "tasks").begin(RECORD, fail)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/tasks: cannot make this folder .*; check the disk"):
        TaskFolder(tmp_path / "file/tasks").begin(RECORD, fail)


def test_what_a_power_cut_left_of_a_task_is_no_task(tmp_path):
    folder = TaskFolder(tmp_path / "tasks")
    left = folder.root / ".1-plants.abcd"
    left.mkdir(parents=True)
    (left / "pkg.tar").write_bytes(b"half")
    assert not folder.has_tasks
    place = folder.begin(RECORD, lambda path: path.write_bytes(b"whole"))
    assert [path.name for path in folder.root.iterdir()] == ["1-plants"]
    assert place.package.read_bytes() == b"whole"
    assert folder.tasks() == (place,)


def test_names_and_records_are_checked(tmp_path):
    folder = TaskFolder(tmp_path / "tasks")
    place = folder.begin(RECORD, lambda path: path.write_bytes(b""))
    for name in ("plants", "../x", "", "a/b"):
        with pytest.raises(DataError, match="expected a name of letters, digits, dots and dashes"):
            folder.begin(TaskRecord(name, "/data", "last"), lambda path: path.write_bytes(b""))
    with pytest.raises(CheckpointError, match="no task here; begin with lance-device train"):
        TaskFolder(tmp_path / "empty").current()
    second = folder.begin(TaskRecord("animals", "/data", "best"), lambda path: path.write_bytes(b""))
    assert second.checkpoint.name == "best.npz"
    text = (place.path / "task.json").read_text()
    (place.path / "task.json").write_text(text.replace("/data", "/else"))
    with pytest.raises(CheckpointError, match="not the record of a task"):
        folder.tasks()
    (place.path / "task.json").write_text(text)
    place.path.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="task 1 is missing; bring its folder back"):
        folder.tasks()


def test_a_result_that_is_neither_is_damage(tmp_path):
    folder = TaskFolder(tmp_path / "tasks")
    folder.begin(TaskRecord("plants", "/data", "first"), lambda path: path.write_bytes(b""))
    with pytest.raises(CheckpointError, match="result is 'first', expected last or best"):
        folder.tasks()


def test_another_package_with_heads_of_another_shape_is_refused(package, images, tmp_path):
    bad = {"head.weight": np.zeros((4, CHANNELS), np.float32), "head.bias": np.zeros(4, np.float32)}
    two = dataclasses.replace(package, path=followed(package.path, tmp_path / "two.tar", bad))
    started(train(two, images, tmp_path / "run", "--steps", 1))
    words = ("--artifact", two.path, "--checkpoint", tmp_path / "run/last.npz", "--data", images)
    line = refused(lance_device("eval", *words, "--task", "one"), 3)
    assert "array heads/one/head.weight is float32 [4, 8], expected float32 [3, 8]; rebuild the package" in line


def test_a_package_of_one_task_is_as_it_was(tmp_path, images):
    other = write_tiny_package(tmp_path / "pkg.tar", seed=3)
    started(train(other, images, tmp_path / "run", "--steps", 1))
    words = ("--artifact", other.path, "--checkpoint", tmp_path / "run/last.npz")
    (entry,) = json.loads(
        started(lance_device("predict", *words, "--json", next((images / "red").iterdir()))).stdout
    )
    assert "task" not in entry
