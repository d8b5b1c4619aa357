"""Task after task on the board alone, and what a workstation makes of the same tasks by two other ways."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from continual_tasks import BATCH, CODE, LAYERS, task_arrays, write_tasks

from lance_device import next_task as next_task_module
from lance_device.classifier import all_heads
from lance_device.features import Batch
from lance_device.graphs import starting_parameters
from lance_device.heads import find_task
from lance_device.measure import PhaseMeter
from lance_device.moments_pass import PassOptions
from lance_device.next_task import NextTaskRequest
from lance_device.probe import MemoryProbe
from lance_device.step import training_step
from lance_device.task_folder import TaskFolder
from lance_edge.accuracy_matrix import read_matrix
from lance_edge.bundle import Bundle
from lance_edge.checkpoints import read_weights
from lance_edge.datasets import open_dataset
from lance_edge.errors import NumericalError
from lance_edge.memory import drift, empty_layer, explained_share, packed_memory, read_memory
from lance_edge.names import WEIGHTS_MEMBER, projection_name
from lance_edge.statistics import read_statistics

THRESHOLD = 0.9
EPOCHS = 8


@pytest.fixture(scope="module")
def story(made_once, lance_host, lance_device) -> Path:
    """`one.tar` to `three.tar` and `run1`, `run2`; memories and packages of the other ways."""

    def accomplished(result):
        assert result.exit_code == 0, (result.output, result.exception)

    def make(folder: Path) -> None:
        one, two = write_tasks(folder)
        x, y = task_arrays(2, 5, 40)
        np.savez(folder / "three.npz", x=x, y=y)
        (folder / "net.py").write_text(CODE)
        model = ("--model", f"{folder}/net.py:grouped", "--threads", 1)
        words = ("--layers", "all", "--batch-size", BATCH, "--mode", "patch", "--any-rank", "--data", one)
        accomplished(lance_host("calibrate", *model, *words, "--energy", 0.9, "-o", folder / "one.tar"))

        def train(package, data, run, *words):
            places = ("--artifact", folder / package, "--data", data, "--out", folder / run)
            lance_device("train", *places, "--epochs", EPOCHS, "--threads", 1, *words)

        def following(package, run, data, next_data, output):
            places = ("--artifact", folder / package, "--checkpoint", folder / run / "last.npz", "--data", data)
            words = ("--next-data", next_data, "--threshold", THRESHOLD, "--threads", 1)
            lance_device("next-task", *places, *words, "-o", folder / output)

        train("one.tar", one, "run1", "--method", "bp")
        following("one.tar", "run1", one, two, "two.tar")
        train("two.tar", two, "run2")
        following("two.tar", "run2", two, folder / "three.npz", "three.tar")

        after = ("--checkpoint", folder / "run1/last.npz")
        words = ("--threshold", THRESHOLD, "-o", folder / "memory.npz")
        accomplished(lance_host("memory", *after, "--data", one, *words))
        collect = ("collect", "--artifact", folder / "one.tar", *after, "--threads", 1)
        lance_device(*collect, "--data", one, "-o", folder / "one-stats.npz")
        words = ("--threshold", THRESHOLD, "-o", folder / "private.npz")
        accomplished(lance_host("memory", *after, "--stats", folder / "one-stats.npz", *words))
        words = ("--data", two, "--memory", folder / "private.npz", "-o", folder / "two-stats.npz")
        lance_device(*collect, *words)
        words = ("--memory", folder / "private.npz", "--stats", folder / "two-stats.npz")
        accomplished(lance_host("calibrate", *model, *after, *words, "-o", folder / "private.tar"))
        words = ("--memory", folder / "memory.npz", "--data", two, "-o", folder / "host.tar")
        accomplished(lance_host("calibrate", *model, *after, *words))

    return made_once("learning-on-the-board", make)


def memory_in(path: Path):
    with Bundle(path) as bundle:
        return packed_memory(bundle)


# --- three ways to one memory --------------------------------------------------------------------------


def test_three_ways_explain_the_same_energy(story):
    """The host's images, the host's statistics, the board alone: to 1e-4 of the finished task's energy."""
    statistics = read_statistics(story / "one-stats.npz")
    ways = [read_memory(story / "memory.npz"), read_memory(story / "private.npz"), memory_in(story / "two.tar")]
    for name in LAYERS:
        moment = next(iter(statistics.layers[name].values()))
        shares = [explained_share(way.layers[name], moment) for way in ways]
        assert shares == pytest.approx([shares[0]] * 3, abs=1e-4)
        assert shares[0] >= THRESHOLD - 1e-6
        assert len({way.layers[name].ranks for way in ways}) == 1
    assert len({way.tasks[-1].checkpoint_sha256 for way in ways}) == 1


def test_three_ways_project_the_next_task_alike(story):
    """What the inputs' basis keeps of the next task's moment outside of the memory, to 1e-4."""
    statistics = read_statistics(story / "two-stats.npz")
    projections = []
    for name in ("host.tar", "private.tar", "two.tar"):
        with Bundle(story / name) as bundle:
            stored = bundle.arrays("projections.npz")
            projections.append({layer: np.array(stored[projection_name(layer, 1)]) for layer in LAYERS})
    for name in LAYERS:
        moment = statistics.layers[name][1].astype(np.float64)  # [g, D, D]
        total = np.trace(moment, axis1=1, axis2=2).sum()
        kept = []
        for one in projections:
            basis = one[name].astype(np.float64).reshape(len(moment), moment.shape[1], -1)
            kept.append(np.einsum("gdr,gde,ger->", basis, moment, basis) / total)
        assert kept == pytest.approx([kept[0]] * 3, abs=1e-4)
        assert kept[0] > 0


def test_workstation_and_board_choose_the_same_images_whatever_the_seeds(lance_host, lance_device, tmp_path):
    """Few batches, so that the choice matters; seed and split are the package's without being named."""
    one, two = write_tasks(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    model = ("--model", f"{tmp_path}/net.py:grouped", "--threads", 1)
    words = ("--layers", "all", "--batch-size", BATCH, "--mode", "patch", "--any-rank", "--data", one)
    seeds = ("--seed", 7, "--split-seed", 3, "--validation", 0.3)

    def accomplished(result):
        assert result.exit_code == 0, (result.output, result.exception)

    accomplished(lance_host("calibrate", *model, *words, *seeds, "--batches", 2, "-o", tmp_path / "one.tar"))
    places = ("--artifact", tmp_path / "one.tar", "--data", one, "--threads", 1)
    lance_device("train", *places, "--method", "bp", "--out", tmp_path / "run", "--epochs", 1)
    after = ("--checkpoint", tmp_path / "run/last.npz", "--threads", 1)
    protect = ("--data", one, "--threshold", THRESHOLD, "--batches", 1, "-o", tmp_path / "memory.npz")
    accomplished(lance_host("memory", *after, *protect))
    words = ("--memory", tmp_path / "memory.npz", "--data", two, "--batches", 1, "-o", tmp_path / "host.tar")
    accomplished(lance_host("calibrate", *model[:2], *after, *words))
    words = ("--checkpoint", tmp_path / "run/last.npz", "--next-data", two, "--threshold", THRESHOLD)
    words = (*words, "--memory-batches", 1, "--batches", 1, "-o", tmp_path / "board.tar")
    lance_device("next-task", *places, *words)

    with Bundle(tmp_path / "host.tar") as host, Bundle(tmp_path / "board.tar") as board:
        ways = [packed_memory(host), packed_memory(board)]
        plans = [bundle.manifest.variant("lance").layers for bundle in (host, board)]
        assert (host.manifest.seed, host.manifest.split) == (board.manifest.seed, board.manifest.split)
        assert (host.manifest.seed, host.manifest.split.validation_fraction) == (7, 0.3)
        assert host.manifest.mode == "patch"  # by default after a memory
        spectra = [bundle.arrays("spectra.npz") for bundle in (host, board)]
        for name in LAYERS:
            np.testing.assert_allclose(
                *(np.array(one[f"{name}/eigenvalues1"]) for one in spectra), rtol=1e-3, atol=1e-3
            )
    assert [plan.layer for plan in plans[0]] == [plan.layer for plan in plans[1]]
    for name in LAYERS:
        assert ways[0].layers[name].ranks == ways[1].layers[name].ranks
        assert ways[0].tasks[-1].explained[name] == pytest.approx(ways[1].tasks[-1].explained[name], abs=1e-4)


# --- the package of the board --------------------------------------------------------------------------


def test_bases_avoid_the_memory_and_gradients_do_not_touch_it(story):
    for package, data in (("two.tar", "two.npz"), ("three.tar", "three.npz")):
        memory = memory_in(story / package)
        with Bundle(story / package) as bundle:
            manifest, variant = bundle.manifest, bundle.manifest.variant("lance")
            stored = bundle.arrays("projections.npz")
            step = training_step(bundle, variant, starting_parameters(bundle, variant), threads=1)
            part = open_dataset(story / data, manifest.split).train
            for name in LAYERS:
                layer = memory.layers[name]
                bases = np.array(stored[projection_name(name, 1)]).reshape(layer.groups, layer.dimension, -1)
                for group in range(layer.groups):
                    assert np.abs(bases[group].T @ layer.basis(group)).max(initial=0) <= 1e-5
            rows = np.arange(BATCH)
            batch = Batch(part, rows, np.zeros(BATCH, bool), manifest.preprocessing)
            gradients = step.run(batch, 5, PhaseMeter(MemoryProbe()), lambda: None).gradients
        for layer in manifest.layers:
            assert np.abs(gradients[layer.weight]).max() > 0
            assert drift(gradients[layer.weight], memory.layers[layer.name]) <= 1e-5
        assert gradients["head.weight"].shape[0] == len(manifest.classes)


def test_the_graphs_are_those_of_the_first_package_at_other_ranks(story):
    """That such graphs compute the literal gradient is tested with im2col in `tests/host/test_any_rank.py`."""
    with Bundle(story / "one.tar") as first, Bundle(story / "two.tar") as second:
        one, two = first.manifest.variant("lance"), second.manifest.variant("lance")
        members = {member.name: member.sha256 for member in first.manifest.members}
        kept = {member.name: member.sha256 for member in second.manifest.members if "graphs/" in member.name}
    assert kept
    assert all(members[name] == digest for name, digest in kept.items())
    before, after = ({plan.layer: plan.ranks for plan in variant.layers} for variant in (one, two))
    assert before.keys() == after.keys() == set(LAYERS)
    assert sum(before[name] != after[name] for name in LAYERS) >= 3


def test_trained_weights_leave_the_memory_alone_and_learn(story):
    memory = memory_in(story / "two.tar")
    with Bundle(story / "two.tar") as bundle:
        start = bundle.arrays(WEIGHTS_MEMBER)
        trained = read_weights(story / "run2/last.npz", bundle).weights
        for layer in bundle.manifest.layers:
            change = trained[layer.weight].astype(np.float64) - np.array(start[layer.weight])
            assert np.abs(change).max() > 0
            assert drift(change, memory.layers[layer.name]) <= 1e-3


def test_all_heads_are_kept_and_all_tasks_remembered(story):
    with Bundle(story / "three.tar") as bundle:
        manifest, weights = bundle.manifest, bundle.arrays(WEIGHTS_MEMBER)
        assert [task.name for task in manifest.tasks] == ["one", "two"]
        assert [len(task.classes) for task in manifest.tasks] == [3, 4]
        assert (manifest.task, len(manifest.classes)) == ("three", 5)
        with Bundle(story / "two.tar") as second:
            trained = read_weights(story / "run2/last.npz", second).weights
        assert np.array_equal(weights["heads/two/head.weight"], trained["head.weight"])
        assert np.array_equal(weights["body.8.weight"], trained["body.8.weight"])
        assert weights["head.weight"].shape == (5, 32)
    memory = memory_in(story / "three.tar")
    assert [task.name for task in memory.tasks] == ["one", "two"]
    for name in LAYERS:
        assert all(
            a <= b for a, b in zip(memory.tasks[0].ranks[name], memory.tasks[1].ranks[name], strict=True)
        )


def test_the_first_task_answers_as_it_did(story):
    """Task one's test images by its own head, before and after task two."""

    def logits(package, run):
        with Bundle(story / package) as bundle:
            every = all_heads(bundle, story / run / "last.npz", 1)
        with np.load(story / "one.npz") as data:
            return every.of_task(find_task(every.heads, "one", package)).logits(data["x_test"])

    before, after = logits("one.tar", "run1"), logits("two.tar", "run2")
    assert np.mean(before.argmax(1) == after.argmax(1)) > 0.9


# --- refusals -------------------------------------------------------------------------------------------


def test_what_cannot_follow_is_refused(story, tmp_path):
    from click.testing import CliRunner

    from lance_device.cli import main

    def refusal(*words):
        result = CliRunner().invoke(
            main, [str(word) for word in ("next-task", *words, "-o", tmp_path / "x.tar")]
        )
        assert result.exit_code in (3, 5), (result.output, result.exception)
        assert not (tmp_path / "x.tar").exists()
        return result.stderr.splitlines()[-1]

    run1 = ("--artifact", story / "one.tar", "--checkpoint", story / "run1/last.npz")
    line = refusal(*run1, "--data", story / "two.npz", "--next-data", story / "three.npz")
    assert "give its images with --data, and the next task's with --next-data" in line
    line = refusal(*run1, "--data", story / "one.npz", "--next-data", story / "two.npz", "--task", "../x")
    assert "expected a name of letters, digits, dots and dashes, at most 64, other than one" in line
    line = refusal(*run1, "--data", story / "one.npz", "--next-data", story / "two.npz", "--task", "one")
    assert "other than one; give one with --task" in line


def test_a_package_whose_gradients_touch_the_memory_is_refused(story, tmp_path, monkeypatch):
    """Projections that were made beside an empty memory, as a fault would make them."""
    whole = next_task_module.project

    def beside_nothing(memory, *more):
        layers = {name: empty_layer(layer.groups, layer.dimension) for name, layer in memory.layers.items()}
        return whole(dataclasses.replace(memory, layers=layers), *more)

    monkeypatch.setattr(next_task_module, "project", beside_nothing)
    request = NextTaskRequest(
        *(story / name for name in ("one.tar", "run1/last.npz", "one.npz", "two.npz")),
        tmp_path / "two.tar", "two", PassOptions(threads=1, micro_batch=8), memory_batches=2, batches=2,
    )  # fmt: skip
    with pytest.raises(
        NumericalError, match="of its length inside what earlier tasks need; please report"
    ) as e:
        next_task_module.next_task(request, lambda text: None)
    assert str(e.value).startswith("body.0: a gradient of the new projections has ")
    assert list(tmp_path.iterdir()) == []


# --- a folder of tasks, and power cuts --------------------------------------------------------------------

# A signal at the n-th call into the operating system that changes a file; with 0 it only counts, below that
# it waits for the first file in the next task's folder to be durable.
KILLER = """
import atexit, os, signal, sys
import lance_device.next_task
class Killer:
    NAMES = {"write", "fsync", "replace", "rename", "unlink", "mkdir", "flush"}
    seen, begun = 0, False
    def __call__(self, frame, event, argument):
        if event == "c_call" and argument.__name__ in self.NAMES:
            self.seen += 1
            self.begun = self.begun or argument.__name__ == "mkdir"
            if self.seen == COUNT or COUNT < 0 and self.begun and argument.__name__ == "fsync":
                os.kill(os.getpid(), NUMBER)
killer = Killer()
atexit.register(lambda: print("calls", killer.seen))
sys.setprofile(killer)
from lance_device.cli import main
main()
"""


def finished_folder(story: Path, root: Path) -> TaskFolder:
    """A folder in which task one is finished."""
    folder = TaskFolder(root)
    place = folder.begin_first(story / "one.tar", story / "one.npz", "last")
    for file in (story / "run1").iterdir():
        shutil.copy(file, place.path / file.name)
    return folder


def next_task(
    root: Path, story: Path, count: int, number: signal.Signals = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    words = ("next-task", "--run", root, "--next-data", story / "two.npz", "--threads", 1)
    words = (*words, "--batches", 2, "--memory-batches", 2)
    code = KILLER.replace("COUNT", str(count)).replace("NUMBER", str(int(number)))
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def cut_and_go_on(story: Path, tmp_path: Path, cuts: int, seed: int) -> None:
    whole = finished_folder(story, tmp_path / "whole")
    result = next_task(whole.root, story, 0)
    assert result.returncode == 0, result.stderr
    calls = int(result.stdout.splitlines()[-1].removeprefix("calls "))
    expected = whole.current().package.read_bytes()
    chance = random.Random(seed)
    for number in range(cuts):
        folder = finished_folder(story, tmp_path / f"cut{number}")
        killed = next_task(folder.root, story, chance.randint(1, calls))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if len(folder.tasks()) == 1:
            again = next_task(folder.root, story, 0)
            assert again.returncode == 0, again.stderr
        assert [place.record.task for place in folder.tasks()] == ["one", "two"]
        assert folder.current().package.read_bytes() == expected
        assert not [
            path for path in folder.root.iterdir() if path.name.startswith(".1") or path.suffix == ".trial"
        ]


def test_a_power_cut_leaves_the_task_before_or_after(story, tmp_path):
    cut_and_go_on(story, tmp_path, cuts=2, seed=0)


def test_a_polite_kill_leaves_nothing_half_made(story, tmp_path):
    folder = finished_folder(story, tmp_path / "tasks")
    before = sorted(folder.root.iterdir())
    stopped = next_task(folder.root, story, -1, signal.SIGTERM)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "error: stopped on request"
    assert [path for path in sorted(folder.root.iterdir()) if path.suffix != ".csv"] == before


@pytest.mark.slow
def test_30_power_cuts(story, tmp_path):
    cut_and_go_on(story, tmp_path, cuts=30, seed=1)


def test_three_tasks_in_a_folder(story, tmp_path, lance_device):
    """The whole way by the commands that the docs show, on the folder that train --tasks makes."""
    root = tmp_path / "tasks"
    common = ("--out", root, "--epochs", 2, "--threads", 1, "--quiet")
    lance_device(
        "train",
        "--artifact",
        story / "one.tar",
        "--data",
        story / "one.npz",
        "--tasks",
        "--method",
        "bp",
        *common,
    )
    for data in ("two.npz", "three.npz"):
        batches = ("--batches", 2, "--memory-batches", 2)
        lance_device("next-task", "--run", root, "--next-data", story / data, "--threads", 1, *batches)
        lance_device("train", "--data", story / data, *common)
    matrix = read_matrix(root / "accuracy_matrix.csv")
    assert matrix.tasks == ("one", "two", "three")
    assert [len(row.accuracies) for row in matrix.rows] == [1, 2, 3]
    ranks = [sum(row.ranks.values()) for row in matrix.rows]
    assert 0 == ranks[0] < ranks[1] < ranks[2]
    assert [row.kept_bytes["heads"] for row in matrix.rows] == [0, 4 * 3 * 33, 4 * (3 + 4) * 33]
    assert matrix.rows[1].kept_bytes["memory"] < matrix.rows[2].kept_bytes["memory"]
    value = json.loads(lance_device("eval", "--run", root, "--task", "two", "--json").stdout)
    assert value["accuracy"] == pytest.approx(matrix.rows[2].accuracies[1])
    with np.load(story / "two.npz") as data:
        np.savez(tmp_path / "some.npz", x=data["x_test"][:3])
    found = json.loads(lance_device("predict", "--run", root, tmp_path / "some.npz", "--json").stdout)
    assert {entry["task"] for entry in found} <= {"one", "two", "three"}


def test_an_unfinished_task_has_no_next_one(story, tmp_path):
    folder = TaskFolder(tmp_path / "tasks")
    folder.begin_first(story / "one.tar", story / "one.npz", "last")
    result = next_task(folder.root, story, 0)
    assert result.returncode == 4
    assert "task one is not finished; train it first: lance-device train --out" in result.stderr
