"""The benchmark as a whole on tiny data and a tiny network: methods, resuming, tables, figures, messages."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_sets import write_npz
from click.testing import CliRunner

from lance_edge.accuracy_matrix import read_matrix
from lance_edge.bundle import Bundle
from lance_edge.errors import LanceError, NumericalError
from lance_edge.memory import read_memory
from lance_edge.names import WEIGHTS_MEMBER
from lance_host.cli import cli
from lance_host.continual_benchmark import run as runner
from lance_host.continual_benchmark.figures import CURVES, HEATMAP, can_draw, mean_rows, write_figures
from lance_host.continual_benchmark.in_engine import train_command
from lance_host.continual_benchmark.job import Job, Learnt
from lance_host.continual_benchmark.literature import PUBLISHED
from lance_host.continual_benchmark.methods import METHODS, Method, choose_methods
from lance_host.continual_benchmark.protected import memory_batches
from lance_host.continual_benchmark.protocol import PAPER, PRESETS, QUICK, as_batch_norm, choose_preset
from lance_host.continual_benchmark.records import Settings, TaskRecord, read_records
from lance_host.continual_benchmark.report import spread, summarise, summary_table
from lance_host.continual_benchmark.run import BenchmarkRequest, Voice, run_benchmark
from lance_host.continual_benchmark.state import NetworkState, read_state
from lance_host.continual_benchmark.tasks import Task

NETWORK = '''
from torch import nn

class Net(nn.Module):
    """A convolution and a linear layer with batch-norm, and a head without bias."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 4, 4, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(96, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5),
        )
        self.head = nn.Linear(24, classes, bias=False)

    def forward(self, x):
        return self.head(self.body(x))

def make(num_classes=2):
    return Net(num_classes)
'''
TINY = replace(
    QUICK,
    recipe=replace(QUICK.recipe, lr=0.1, epochs=3, batch_size=16),
    gpm_lr=0.1,
    per_class=None,
    dropout=True,
    replay=20,
    fisher_samples=5,
)
SILENT = Voice(lambda text: None, lambda done, most: None)
TABLES = ("results.csv", "summary.csv", "table.md")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Ten classes of 32 + 10 images, and a network."""
    folder = tmp_path_factory.mktemp("material")
    write_npz(folder / "cifar10.npz", train=32, test=10)
    (folder / "net.py").write_text(NETWORK)
    return folder, f"{folder / 'net.py'}:make"


def request_of(material: tuple[Path, str], out: Path, *methods: str, **more: object) -> BenchmarkRequest:
    data, network = material
    request = BenchmarkRequest("split-cifar10", methods, data, out, TINY, 1, network, threads=1)
    return replace(request, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def learnt(material: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods, one seed."""
    folder, settings = run_benchmark(request_of(material, tmp_path_factory.mktemp("out"), *METHODS), SILENT)
    if can_draw():
        write_figures(folder, settings)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- all methods ---


def test_every_method_fills_its_matrix(learnt: Path) -> None:
    rows = rows_of(learnt / "results.csv")
    for method in METHODS:
        found = [(row["after"], row["task"]) for row in rows if row["method"] == method]
        names = [f"cifar10-{n}-{n + 1}" for n in range(0, 10, 2)]
        triangle = [(names[i], names[j]) for i in range(5) for j in range(i + 1)]
        assert found == (triangle[-5:] if METHODS[method].is_joint else triangle)
    for method in METHODS:
        if not METHODS[method].is_joint:
            matrix = read_matrix(learnt / method / "seed-0" / "accuracy_matrix.csv")
            summary = next(row for row in rows_of(learnt / "summary.csv") if row["method"] == method)
            assert matrix.acc is not None
            assert matrix.bwt is not None
            assert float(summary["acc_mean"]) == pytest.approx(100 * matrix.acc, abs=1e-3)
            assert float(summary["bwt_mean"]) == pytest.approx(100 * matrix.bwt, abs=1e-3)


def test_the_first_task_is_the_same_for_all(learnt: Path) -> None:
    rows = rows_of(learnt / "results.csv")
    first = {row["accuracy"] for row in rows if row["after"] == row["task"] == "cifar10-0-1"}
    assert len(first) == 1


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].is_joint])
def test_replay_trains_the_heads_of_earlier_tasks_too(learnt: Path, method: str) -> None:
    (first,) = (learnt / "first-task").glob("*/state.safetensors")
    head = read_state(first).heads["cifar10-0-1"]
    later = read_state(learnt / method / "seed-0" / "task-5" / "state.safetensors").heads["cifar10-0-1"]
    assert torch.equal(head, later) == (method not in ("er", "agem"))


def test_gpm_and_lance_keep_a_memory_that_grows(learnt: Path) -> None:
    records = read_records(learnt)
    for method in ("gpm", "lance"):
        ranks = [record.ranks for record in records[method]]
        assert set(ranks[0]) == {"body.0", "body.5"}
        for layer, most in (("body.0", 48), ("body.5", 96)):
            used = [one[layer] for one in ranks]
            assert used == sorted(used)
            assert 0 < used[-1] <= most
        assert records[method][-1].kept_bytes["memory"] > 0
    assert not records["finetune"][-1].ranks
    lance, bp = (records[name][-1].activation_bytes for name in ("lance", "finetune"))
    assert bp == 4 * 16 * (3 * 32 * 32 + 96)
    assert 0 < lance < bp


@pytest.mark.parametrize("method", ["finetune", "gpm", "lance"])
def test_bytes_are_counted_as_a_board_counts_them(learnt: Path, method: str) -> None:
    """Earlier heads, and the weights with the newest one: as they are in the package of the last task."""
    record = read_records(learnt)[method][-1]
    with Bundle(learnt / method / "seed-0" / "task-5" / "pkg.tar") as bundle:
        sizes = {name: array.nbytes for name, array in bundle.arrays(WEIGHTS_MEMBER).items()}
    heads = sum(size for name, size in sizes.items() if name.startswith("heads/"))
    expected = {"heads": heads or 4 * 4 * 2 * 24, "weights": sum(sizes.values()) - heads}
    assert {kind: record.kept_bytes[kind] for kind in expected} == expected
    dimensions = {"body.0": 48, "body.5": 96}
    memory = sum(4 * dimensions[name] * rank for name, rank in record.ranks.items())
    assert record.kept_bytes.get("memory", 0) == memory
    assert record.bytes_beside == memory + expected["heads"]


def test_what_a_board_needs_for_more_tasks_is_all_that_stays(learnt: Path) -> None:
    for method in METHODS:
        *earlier, last = sorted((learnt / method / "seed-0").glob("task-*"))
        for folder in earlier:
            assert [path.name for path in folder.iterdir()] == ["record.json"]
        assert (last / "state.safetensors").exists()


def test_the_table_shows_every_method(learnt: Path) -> None:
    lines = (learnt / "table.md").read_text().splitlines()
    assert {line.split("|")[1].strip() for line in lines[2:]} == set(METHODS)


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib, which the host extra brings")
def test_figures_are_drawn(learnt: Path) -> None:
    for name in (HEATMAP, CURVES):
        assert (learnt / name).read_bytes().startswith(b"\x89PNG")


# --- what the runtime is asked for ---


def job_of(folder: Path, method: str = "finetune", **more: object) -> Job:
    """The second of two tasks, in folders that nobody made."""
    tasks = tuple(Task(n, f"t{n}", ("a", "b"), folder / f"t{n}.npz") for n in range(2))
    job = Job(
        network="alexnet",
        preset=TINY,
        method=method,
        batch_norm="running",
        tasks=tasks,
        number=1,
        seed=0,
        folder=folder / "own",
        before=folder / "before",
        first=folder / "first",
        relax=0.0,
        threads=None,
        say=SILENT.say,
        progress=SILENT.progress,
    )
    return replace(job, **more)  # type: ignore[arg-type]


def test_threads_change_nothing_else_of_a_training(tmp_path: Path) -> None:
    plain, threaded = (train_command(job_of(tmp_path, threads=n), tmp_path / "run") for n in (None, 3))
    assert threaded == [*plain, "--threads", "3"]
    assert plain[plain.index("--cache") + 1] == "off"
    assert "--quiet" in plain


# --- going on ---


class Killed(Exception):  # noqa: N818 - what happens, not what is wrong
    """A stop in the middle."""


@pytest.mark.parametrize("method", ["er", pytest.param("lance", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_with_the_same_tables(
    material: tuple[Path, str], learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Killed once while a task is learnt, once between its training and its record."""
    request = request_of(material, tmp_path, method)
    real, evaluate = METHODS[method], runner.accuracies

    def killed_before(job: Job) -> Learnt:
        if job.number == 2:
            raise Killed
        return real.learn(job)

    monkeypatch.setattr(runner, "METHODS", {method: replace(real, learn=killed_before)})
    with pytest.raises(Killed):
        run_benchmark(request, SILENT)
    monkeypatch.setattr(runner, "METHODS", METHODS)

    def killed_after(job: Job, learnt: Learnt) -> tuple[float, ...]:
        if job.number == 3:
            raise Killed
        return evaluate(job, learnt)

    monkeypatch.setattr(runner, "accuracies", killed_after)
    with pytest.raises(Killed):
        run_benchmark(request, SILENT)
    monkeypatch.setattr(runner, "accuracies", evaluate)
    said: list[str] = []
    folder, _ = run_benchmark(request, Voice(said.append, lambda done, most: None))
    assert next(text for text in said if "seed 0, task" in text).startswith(f"{method}, seed 0, task 4 of 5")
    expected = [row for row in rows_of(learnt / "results.csv") if row["method"] == method]
    assert rows_of(folder / "results.csv") == expected


def killed_from(number: int, method: Method) -> dict[str, Method]:
    """A table of methods in which no task is learnt from this one on."""

    def learn(job: Job) -> Learnt:
        if job.number >= number:
            raise Killed
        return method.learn(job)

    return {name: replace(method, learn=learn) for name in METHODS}


def test_a_kill_before_the_record_loses_no_best_epoch(
    material: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where patience ends the run, the best epoch is neither of the two that a finished run holds besides."""
    recipe = replace(TINY.recipe, lr=0.5, epochs=60, patience=3, least_lr=0.4)
    request = request_of(material, tmp_path, "finetune", preset=replace(TINY, recipe=recipe))
    found: list[NetworkState] = []

    def killed_after(job: Job, learnt: Learnt) -> tuple[float, ...]:
        if job.number == 1:
            assert learnt.epochs < recipe.epochs
            found.append(learnt.state)
            raise Killed
        return evaluate(job, learnt)

    evaluate = runner.accuracies
    monkeypatch.setattr(runner, "METHODS", killed_from(2, METHODS["finetune"]))
    for accuracies in (killed_after, evaluate):
        monkeypatch.setattr(runner, "accuracies", accuracies)
        with pytest.raises(Killed):
            run_benchmark(request, SILENT)
    (state,) = tmp_path.glob("*/finetune/seed-0/task-2/state.safetensors")
    for name, tensor in read_state(state).body.items():
        assert torch.equal(tensor, found[0].body[name])


def test_a_kill_while_a_task_is_tidied_up(
    material: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is there, its run is left over: once in the middle, once at the end."""
    real = METHODS["er"]

    def with_a_run(job: Job) -> Learnt:
        (job.folder / "run-0.1").mkdir(exist_ok=True)
        (job.folder / "run-0.1" / "last.npz").touch()
        return real.learn(job)

    def killed(path: Path) -> None:
        if path.parent.name in still_to_kill:
            still_to_kill.remove(path.parent.name)
            raise Killed
        remove(path)

    remove, still_to_kill = runner.shutil.rmtree, ["task-2", "task-5"]
    monkeypatch.setattr(runner, "METHODS", {"er": replace(real, learn=with_a_run)})
    monkeypatch.setattr(runner.shutil, "rmtree", killed)
    request = request_of(material, tmp_path, "er")
    for _ in range(2):
        with pytest.raises(Killed):
            run_benchmark(request, SILENT)
    folder, _ = run_benchmark(request, SILENT)
    *earlier, last = sorted((folder / "er" / "seed-0").glob("task-*"))
    for own in earlier:
        assert [path.name for path in own.iterdir()] == ["record.json"]
    assert not [path for path in last.iterdir() if path.is_dir()]


def test_what_was_learnt_is_not_learnt_again(
    material: tuple[Path, str], learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (learnt / name).read_bytes() for name in TABLES}
    monkeypatch.setattr(runner, "_learn", lambda job, label: pytest.fail("nothing is left to learn"))
    run_benchmark(request_of(material, learnt.parent, *METHODS), SILENT)
    assert before == {name: (learnt / name).read_bytes() for name in TABLES}


def test_other_options_need_another_folder(material: tuple[Path, str], learnt: Path) -> None:
    other = replace(TINY, recipe=replace(TINY.recipe, epochs=9))
    with pytest.raises(
        LanceError, match=r"made with epochs 3, not 9; give the same options to go on, or another"
    ):
        run_benchmark(request_of(material, learnt.parent, "er", preset=other), SILENT)


def test_a_damaged_record_is_named(learnt: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(learnt, copy)
    record = copy / "er" / "seed-0" / "task-2" / "record.json"
    record.write_text(json.dumps({"method": "er"}))
    with pytest.raises(LanceError, match=r"record\.json: damaged .* its task is learnt again"):
        read_records(copy)
    record.write_text("{")
    with pytest.raises(LanceError, match=r"record\.json: not readable"):
        read_records(copy)


@pytest.mark.slow
def test_a_task_whose_numbers_run_away_begins_again_at_half_the_rate(
    material: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = METHODS["finetune"]

    def running_away(job: Job) -> Learnt:
        if job.number == 1 and job.preset.recipe.lr > 0.03:
            job = replace(job, preset=replace(job.preset, recipe=replace(job.preset.recipe, lr=1e20)))
        return real.learn(job)

    monkeypatch.setattr(runner, "METHODS", {"finetune": replace(real, learn=running_away)})
    said: list[str] = []
    folder, _ = run_benchmark(
        request_of(material, tmp_path, "finetune"), Voice(said.append, lambda done, most: None)
    )
    assert [text.strip() for text in said if "ran away" in text] == [
        "the numbers ran away at a learning rate of 0.1: again at 0.05",
        "the numbers ran away at a learning rate of 0.05: again at 0.025",
    ]
    rates = {row["after"]: row["lr"] for row in rows_of(folder / "results.csv")}
    assert list(rates.values()) == ["0.1", "0.025", "0.1", "0.1", "0.1"]


def test_a_task_that_never_holds_is_said(material: tuple[Path, str], tmp_path: Path) -> None:
    steep = replace(TINY, recipe=replace(TINY.recipe, lr=1e30))
    with pytest.raises(NumericalError, match=r"learning rate of 3\.125e\+28 is too large: lower --lr"):
        run_benchmark(request_of(material, tmp_path, "er", preset=steep), SILENT)


# --- options ---


@pytest.mark.parametrize("method", [pytest.param("gpm", marks=pytest.mark.slow), "lance"])
def test_relaxed_protection_has_records_of_its_own(
    material: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The second task trains beside less memory; afterwards all of it is there again."""
    monkeypatch.setattr(runner, "METHODS", killed_from(2, METHODS[method]))
    with pytest.raises(Killed):
        run_benchmark(request_of(material, tmp_path, method, relax=0.3), SILENT)
    (folder,) = tmp_path.glob("split-*")
    ((label, (first, second)),) = read_records(folder).items()
    assert label == second.method == f"{method}-relax-0.3"
    assert second.kept_bytes["moments"] == 4 * (48**2 + 96**2)
    own = folder / label / "seed-0" / "task-2"
    strict, left = first.ranks, read_memory(own / "protected-by.npz").layers
    assert all(sum(left[name].ranks) <= strict[name] <= second.ranks[name] for name in strict)
    assert any(sum(left[name].ranks) < strict[name] for name in strict)
    rows = rows_of(folder / "results.csv")
    assert [row["after"] for row in rows] == ["cifar10-0-1", "cifar10-2-3", "cifar10-2-3"]


def test_batches_of_the_memory() -> None:
    """GPM's 125 samples are 2 batches of 64, LANCE measures 11."""
    for preset in PRESETS.values():
        assert memory_batches("gpm", preset) == 2
        assert memory_batches("lance", preset) == 11
    assert memory_batches("gpm", replace(QUICK, gpm_samples=128)) == 2
    assert memory_batches("gpm", replace(QUICK, gpm_samples=129)) == 3


# --- what is refused ---


def test_names_that_are_none() -> None:
    with pytest.raises(LanceError, match=r"--method: expected some of finetune, .*, or all, found 'gem'"):
        choose_methods("lance,gem")
    with pytest.raises(LanceError, match="--preset: expected one of quick, paper, found 'fast'"):
        choose_preset("fast")
    with pytest.raises(LanceError, match="--batch-norm: expected one of running, batch, found 'none'"):
        as_batch_norm("none")
    assert choose_methods("all") == tuple(METHODS)


def test_a_benchmark_that_is_none(material: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(
        LanceError, match=r"--benchmark: expected one of split-cifar100, .* found 'split-mnist'"
    ):
        run_benchmark(request_of(material, tmp_path, "er", benchmark="split-mnist"), SILENT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "--lr: expected a rate above 0, found 0"),
        ({"lr": -1.0}, "--lr: expected a rate above 0, found -1"),
        ({"lr": float("nan")}, "--lr: expected a number, found nan"),
        ({"relax": float("inf")}, "--relax: expected a number, found inf"),
        ({"relax": float("nan")}, "--relax: expected a number, found nan"),
        ({"energy": float("nan")}, "--energy: expected a number, found nan"),
    ],
)
def test_numbers_of_no_use(
    material: tuple[Path, str], tmp_path: Path, values: dict[str, float], message: str
) -> None:
    others = {name: value for name, value in values.items() if name != "lr"}
    lr = values.get("lr", 0.1)
    preset = replace(TINY, recipe=replace(TINY.recipe, lr=lr), gpm_lr=lr)
    with pytest.raises(LanceError, match=message):
        run_benchmark(request_of(material, tmp_path, "lance", preset=preset, **others), SILENT)


@pytest.mark.parametrize(
    "words", [("--lr", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--threads", "-3"), ("--epochs", "0")]
)
def test_the_command_refuses_them_before_anything_is_learnt(
    material: tuple[Path, str], tmp_path: Path, words: tuple[str, str]
) -> None:
    data, network = material
    line = ("continual", "--benchmark", "split-cifar10", "--network", network, "--method", "er")
    result = CliRunner().invoke(cli, [*line, "--data", str(data), "--out", str(tmp_path), *words])
    assert result.exit_code != 0
    assert words[0] in result.output
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize("network", ["mcunet", "resnet18"])
def test_a_network_without_such_a_head(material: tuple[Path, str], tmp_path: Path, network: str) -> None:
    with pytest.raises(
        LanceError, match=f"--network {network}: expected a linear layer without bias as .* head"
    ):
        run_benchmark(request_of(material, tmp_path, "er", network=network), SILENT)


def test_data_with_nothing_to_validate_on(material: tuple[Path, str], tmp_path: Path) -> None:
    """Of three training images of a class none can be spared."""
    write_npz(tmp_path / "cifar10.npz", train=3, test=1)
    with pytest.raises(LanceError, match=r"task cifar10-0-1: no images to validate or test on; .* 4 training"):
        run_benchmark(request_of((tmp_path, material[1]), tmp_path / "out", "er"), SILENT)


def test_other_data_need_another_folder(
    material: tuple[Path, str], learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_learn", lambda job, label: pytest.fail("nothing is left to learn"))
    moved = tmp_path / "moved"
    shutil.copytree(material[0], moved)
    run_benchmark(request_of((moved, material[1]), learnt.parent, "er"), SILENT)
    write_npz(moved / "cifar10.npz", train=33, test=10)
    with pytest.raises(
        LanceError, match=r"made with other images than those below --data now .* another --out"
    ):
        run_benchmark(request_of((moved, material[1]), learnt.parent, "er"), SILENT)


def test_batch_statistics_are_for_methods_in_pytorch(material: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(LanceError, match="--batch-norm batch: gpm, lance train in the engine"):
        run_benchmark(request_of(material, tmp_path, "er", "gpm", "lance", batch_norm="batch"), SILENT)
    folder, _ = run_benchmark(request_of(material, tmp_path, "er", batch_norm="batch"), SILENT)
    assert folder.name.endswith("-batch-statistics")


def test_only_protection_can_be_relaxed(material: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(LanceError, match="--relax: er protects no directions"):
        run_benchmark(request_of(material, tmp_path, "er", "lance", relax=0.1), SILENT)


@pytest.mark.slow
def test_energy_is_for_what_compresses_and_saves_bytes(
    material: tuple[Path, str], learnt: Path, tmp_path: Path
) -> None:
    with pytest.raises(LanceError, match="--energy: gpm keeps whole activations; it is for --method lance"):
        run_benchmark(request_of(material, tmp_path, "gpm", "lance", energy=0.5), SILENT)
    folder, _ = run_benchmark(request_of(material, tmp_path, "lance", energy=0.5), SILENT)
    (half,) = read_records(folder).values()
    assert half[-1].method == "lance-energy-0.5"
    assert half[-1].activation_bytes < read_records(learnt)["lance"][-1].activation_bytes


# --- figures of speech ---


def record(method: str, seed: int, after: int, *accuracies: float) -> TaskRecord:
    return TaskRecord(method, seed, after, f"t{after}", accuracies, 1, 0.1, 2**20, 1.0, {}, {"heads": 2**19})


def test_mean_and_deviation_are_over_complete_seeds() -> None:
    records = [record("lance", 0, 0, 0.9), record("lance", 0, 1, 0.7, 0.8)]
    records += [record("lance", 1, 0, 0.8), record("lance", 1, 1, 0.8, 1.0), record("lance", 2, 0, 0.1)]
    (found,) = summarise({"lance": records}, tasks=2)
    assert found.seeds == 2
    assert (found.acc.mean, found.acc.std) == pytest.approx((82.5, np.std([75, 90], ddof=1)))
    assert found.bwt is not None
    assert (found.bwt.mean, found.bwt.std) == pytest.approx((-10, np.std([-20, 0], ddof=1)))
    assert mean_rows(records) == [pytest.approx([60.0]), pytest.approx([75.0, 90.0])]
    assert str(found.acc) == "82.5 ± 10.6"
    assert str(spread([0.5])) == "50.0"


def test_published_values_stand_beside_ours_where_it_is_the_same_benchmark() -> None:
    settings = Settings("split-cifar100", "alexnet", "paper", 200, 0.1, 0.01, (), "running", True, ("a", "b"))
    summaries = summarise({"lance": [record("lance", 0, 1, 0.5, 0.6)]}, tasks=2)
    table = summary_table(summaries, settings)
    assert "| lance | 1 | 55.0 |  |  | 1.00 MiB | 0.50 MiB | 71.5 |" in table
    assert "arXiv 2103.09762" in table
    assert "code-cl 77.2" in table
    assert "71.5" not in summary_table(summaries, replace(settings, benchmark="split-cifar10"))


def test_the_published_values_are_those_of_the_papers() -> None:
    values = {name: value.acc for name, value in PUBLISHED["split-cifar100", "alexnet"].items()}
    assert values == {
        **{"multitask": 79.6, "ewc": 68.8, "agem": 64.0, "er": 71.7, "gpm": 72.5},
        **{"lance": 71.5, "code-cl": 77.2},
    }


def test_the_paper_preset_is_the_published_protocol() -> None:
    assert PRESETS["paper"] is PAPER
    recipe = PAPER.recipe_of("lance")
    assert (recipe.lr, recipe.epochs, recipe.batch_size, recipe.patience) == (0.1, 200, 64, 6)
    assert (recipe.factor, recipe.least_lr, PAPER.energy, PAPER.memory_batches) == (2, 1e-5, 0.98, 11)
    assert (PAPER.recipe_of("gpm").lr, PAPER.gpm_samples, PAPER.per_class) == (0.01, 125, None)
