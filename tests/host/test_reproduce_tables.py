"""What a reproduction asks for and writes: options, published values, rows, tables, messages."""

import csv
import dataclasses
from types import SimpleNamespace

import pytest

from lance_edge.errors import DataError, LanceError
from lance_edge.profiles import columns
from lance_host.reproduce import cells as cells_module
from lance_host.reproduce import device, fig3
from lance_host.reproduce.cells import Cells, read_seconds
from lance_host.reproduce.findings import (
    Cell,
    Finding,
    caption,
    cell_text,
    comparable,
    markdown_table,
    write_csv,
)
from lance_host.reproduce.material import Material
from lance_host.reproduce.paper import published
from lance_host.reproduce.study import Study, check, counts, named_values
from lance_host.reproduce.table2 import budget_plans
from lance_host.reproduce.trained import lance_plan, method_plans, shared_plans

# As the paper prints them, typed once more: (data set, method, layers) -> accuracy in %.
PRINTED = {
    ("cifar10", "bp", 2): 75.85,
    ("cifar10", "bp", 4): 82.91,
    ("cifar10", "hosvd", 2): 70.91,
    ("cifar10", "hosvd", 4): 75.63,
    ("cifar10", "lance", 2): 70.64,
    ("cifar10", "lance", 4): 76.23,
    ("cifar100", "bp", 2): 52.47,
    ("cifar100", "bp", 4): 58.38,
    ("cifar100", "hosvd", 2): 48.00,
    ("cifar100", "hosvd", 4): 52.34,
    ("cifar100", "lance", 2): 47.57,
    ("cifar100", "lance", 4): 52.59,
}
NO_NUMBERS = ("table1", "fig3", "fig4", "fig5", "theory")


@pytest.fixture
def study(tmp_path):
    return Study(out=tmp_path / "out", preset="quick", data_root=tmp_path / "data", say=lambda text: None)


@pytest.mark.parametrize(("key", "value"), PRINTED.items())
def test_published_accuracies(key, value):
    found = published("table2", "accuracy_percent", "mcunet", *key)
    assert (found.value, found.relation) == (value, "is")
    assert "2509.21617" in found.source


def test_published_bytes_and_bounds():
    assert published("table2", "activation_mib", "mcunet", "cifar10", "lance", 4).value == 0.09
    assert published("table2", "activation_mib", "resnet18", "any", "bp", 4).value == 61.25
    assert published("table8", "activation_mib", "mcunet", "any", "bp", 2, "batch 4").value == 0.220
    assert published("table8", "activation_mib", "mcunet", "any", "bp", 2, "batch 8") is None
    assert published("fig2", "angle_deg", "mcunet", "any", "lance", 4, "epoch 3").relation == "below"


@pytest.mark.parametrize("claim", NO_NUMBERS)
def test_a_claim_without_numbers_says_so(claim):
    found = Cell(claim, "mcunet", "cifar10", "lance", 4).found("accuracy_percent", [50.0])
    assert found.published is None
    assert caption([found]).startswith("No published number of this claim is at hand (Apolinario and Roy")


@pytest.mark.parametrize(
    ("options", "accuracy", "size", "reasons"),
    [
        ({}, 75.85, 11.72, []),
        ({"preset": "quick"}, None, 11.72, ["preset quick, not paper"]),
        ({"lr": 0.1}, None, 11.72, ["lr 0.1, not 0.05"]),
        ({"weight_decay": 5e-4}, None, 11.72, ["weight decay 0.0005, not 0.0"]),
        ({"batch_size": 16}, None, None, ["batch size 16, not 128"]),
    ],
)
def test_published_numbers_stand_beside_their_like_alone(options, accuracy, size, reasons, tmp_path):
    study = Study(out=tmp_path, **options)
    cell = Cell("table2", "mcunet", "cifar10", "bp", 2)
    findings = [cell.found("accuracy_percent", [60.0]), cell.found("activation_mib", [11.0])]
    kept, differences = comparable(findings, study)
    assert [one.published for one in kept] == [accuracy, size]
    assert differences == reasons
    assert all(reason in caption(kept, differences) for reason in reasons)
    assert ("In brackets what was published" in caption(kept, differences)) == (size is not None)
    budgets = budget_plans(Cells(study), "mcunet", "cifar10")
    assert len(budgets) == (2 if size else 0)  # LANCE within the published bytes, of batches of 128
    angle = Cell("fig2", "mcunet", "any", "lance", 2, "epoch 1").found("angle_deg", [20.0])
    (kept,), _ = comparable([angle], study)
    assert (kept.published is None) == bool({"lr", "weight_decay", "batch_size"} & options.keys())
    small = Cell("table8", "mcunet", "any", "bp", 2, "batch 4").found("activation_mib", [0.2])
    assert comparable([small], study) == ([small], [])  # which has batches of its own


def test_a_finding_is_the_mean_over_seeds_with_its_spread(tmp_path):
    found = Cell("table2", "mcunet", "cifar10", "bp", 2).found("accuracy_percent", [70.0, 72.0])
    assert (found.measured, found.seeds, found.published) == (71.0, 2, 75.85)
    assert cell_text(found) == "71.00 ± 1.41 (75.85)"
    write_csv(tmp_path / "t.csv", [found])
    with (tmp_path / "t.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == columns(Finding)
    assert (row["measured"], row["published"], row["note"]) == ("71", "75.85", "")


def test_the_table_has_a_row_a_cell_and_says_why_one_was_not_run():
    ran = Cell("fig2", "mcunet", "cifar10", "lance", 2, "epoch 1")
    absent = Cell("table2", "mcunet", "cifar100", "lance", 2)
    table = markdown_table(
        [
            ran.found("angle_deg", [12.34]),
            ran.found("worst_angle_deg", [15.0]),
            absent.found("accuracy_percent", (), "no images: data/cifar100"),
        ]
    ).splitlines()
    assert len(table) == 4
    assert table[2].split("|")[6:-1] == [" - ", " 12.3 (< 70) ", " 15.0 ", "  "]
    assert table[3].split("|")[6:-1] == [" not run (47.57) ", " - ", " - ", " no images: data/cifar100 "]
    assert table[1].count("---") == table[0].count("|") - 1


def test_head_only_stands_in_every_table():
    for methods, layers in ((("lance", "bp"), (2, 4)), (("lance",), (1,))):
        plans = method_plans("table2", "mcunet", "cifar10", methods, layers, "")
        assert (plans[0].cell.method, plans[0].layers, plans[0].method) == ("head only", 0, "bp")
        assert plans[0].package["methods"] == ("bp",)
        assert len(plans) == 1 + len(methods) * len(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("bp",)}, "--methods: expected lance and some of bp, lance, asi, hosvd, found bp;"),
        ({"methods": ("lance", "sgd")}, "found lance, sgd"),
        ({"layers": (0, 2)}, "--layers: expected counts from 1, found 0"),
        ({"models": ()}, "--models: expected names, found none"),
        ({"datasets": ()}, "--datasets: expected names, found none"),
        ({"lr": float("nan")}, "--lr: expected a number that is not below 0, found nan"),
        ({"weight_decay": -1.0}, "--weight-decay: expected a number that is not below 0, found -1"),
    ],
)
def test_what_cannot_be_asked_for(options, message, study):
    with pytest.raises(LanceError, match=message):
        check(Study(out=study.out, **options))


def test_a_file_is_no_folder_for_results(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LanceError, match="expected a folder, found a file; choose another --out"):
        check(Study(out=tmp_path / "file"))


def test_named_values_and_counts():
    assert named_values("--data", ("a=b", "c=d=e")) == {"a": "b", "c": "d=e"}
    assert counts("--seeds", "0-2") == (0, 1, 2)
    with pytest.raises(LanceError, match=r"--data: expected NAME=VALUE, found 'folder'"):
        named_values("--data", ("folder",))
    with pytest.raises(LanceError, match=r"--seeds: expected counts such as 2,4 or 0-2, found 'one'"):
        counts("--seeds", "one")


# --- cells ---


def test_a_cell_that_is_there_is_not_made_again_but_its_time_counts(study):
    cells, made = Cells(study), []

    def measure():
        made.append(1)
        return {"mean_deg": 1.5}

    assert cells.numbers("one", measure) == cells.numbers("one", measure) == {"mean_deg": 1.5}
    assert len(made) == 1
    again = Cells(study)
    again.numbers("one", measure)
    assert again.seconds == read_seconds(study.out / "cells.json")["one"]
    assert len(made) == 1


def test_damaged_times_are_named(study):
    study.out.mkdir()
    (study.out / "cells.json").write_text("[")
    with pytest.raises(DataError, match=r"cells.json: cannot read .*remove it: only durations are lost"):
        read_seconds(study.out / "cells.json")


def test_a_record_that_is_torn_is_no_finished_run(study):
    study.out.mkdir()
    assert not cells_module.is_finished(study.out)
    (study.out / "run.json").write_text('{"status": "fin')
    assert not cells_module.is_finished(study.out)
    (study.out / "run.json").write_text('{"status": "finished"}')
    assert cells_module.is_finished(study.out)


def test_another_micro_batch_is_another_cell(study, tmp_path, monkeypatch):
    """Saved bytes depend on it; on threads nothing does."""
    started = []
    monkeypatch.setattr(cells_module, "run_device", lambda words, *_: started.append(words))
    material = Material("mcunet", None, "c.10", tmp_path)
    folders = set()
    for size, threads in ((64, 1), (64, 2), (8, 2)):
        monkeypatch.setattr(cells_module, "MICRO_BATCH", size)
        cells = Cells(dataclasses.replace(study, threads=threads))
        folders.add(cells.run(material, tmp_path / "package.tar", 0, method="lance", layers=2))
    assert len(folders) == 2
    assert [(words["micro_batch"], words["threads"]) for words in started] == [(64, 1), (64, 2), (8, 2)]


def test_weight_decay_is_another_cell_and_none_is_as_before(study, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(cells_module, "run_device", lambda words, *_: started.append(words))
    material = Material("mcunet", None, "c", tmp_path)
    for decay in (0.0, 5e-4):
        cells = Cells(dataclasses.replace(study, weight_decay=decay))
        cells.run(material, tmp_path / "package.tar", 0, method="bp", layers=4)
    plain, decayed = started
    assert plain["out"] != decayed["out"]
    assert "weight_decay" not in plain  # cells of earlier versions stay what they are
    options = device.options(decayed)
    assert options[options.index("--weight-decay") + 1] == "0.0005"


def test_every_cell_has_a_log_of_its_own(study, tmp_path, monkeypatch):
    logs = []
    monkeypatch.setattr(cells_module, "run_device", lambda words, command, log, say: logs.append(log))
    material, package = Material("mcunet", None, "c1.0", tmp_path), tmp_path / "mcunet-c1.0-0-x.tar"
    for layers in (2, 4):
        Cells(study).run(material, package, 0, method="lance", layers=layers)
        Cells(study).bench(package, layers=layers)
    assert len(set(logs)) == 4


def test_options_of_the_device():
    words = {"eval_every": 5, "resume": True, "threads": None, "quiet": False, "lr": 0.05}
    assert device.options(words) == ["--eval-every", "5", "--resume", "--lr", "0.05"]


def test_a_run_that_fails_is_named_with_its_last_words(tmp_path):
    said = []
    words = {"artifact": tmp_path / "none.tar", "data": tmp_path, "out": tmp_path / "run"}
    with pytest.raises(
        device.DeviceError, match=r"lance-device train ended with code 3: .*none.tar.*all that it"
    ):
        device.run_device(words, "train", tmp_path / "run.log", said.append)
    assert "none.tar" in (tmp_path / "run.log").read_text()
    assert said[-1].startswith("  error: ")


def test_figures_take_the_lance_runs_of_table_2(study, tmp_path, monkeypatch):
    """Hours of the full preset: the same calibration, the same options, the same cell."""
    monkeypatch.setattr(cells_module, "calibrate", lambda request, feedback: None)
    monkeypatch.setattr(cells_module, "run_device", lambda *_: None)
    cells, material = Cells(study), Material("mcunet", None, "c", tmp_path)

    def place(plan):
        package = cells.package(material, 0, **plan.package)
        return cells.run(material, package, 0, method=plan.method, layers=plan.layers, **plan.words)

    own = place(shared_plans(study, "table2", "mcunet", "c", study.methods)[5])
    assert "-lance-4-" in own.name
    assert own == place(shared_plans(study, "fig2", "mcunet", "c", ("lance",))[-1])
    assert own == place(lance_plan(study, "fig4", "mcunet", "c", "ε 0.7", energy=0.7))
    assert own == place(lance_plan(study, "fig3", "mcunet", "c", "N 15", energy=0.7, batches=15))
    assert own != place(lance_plan(study, "fig3", "mcunet", "c", "N 4", energy=0.7, batches=4))


def test_calibration_batches_are_those_that_were_taken(study, tmp_path, monkeypatch):
    """Of 500 images there are 3 batches of 128, whether 4 or 15 were asked for."""

    class Package:
        def __init__(self, path):
            number = min(int(path.name), 500 // 128)
            self.manifest = SimpleNamespace(calibration_batches=number)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(fig3, "Bundle", Package)
    monkeypatch.setattr(fig3, "find_material", lambda *_: Material("mcunet", None, "c", tmp_path))
    monkeypatch.setattr(Cells, "package", lambda self, m, seed, **options: tmp_path / str(options["batches"]))
    monkeypatch.setattr(fig3, "run_plans", lambda cells, model, dataset, plans: plans)
    plans = fig3.fig3(Cells(dataclasses.replace(study, datasets=("c",))))
    over_n = [
        (plan.cell.setting, plan.package["batches"]) for plan in plans if plan.cell.setting.startswith("N")
    ]
    assert over_n == [("N 1", 1), ("N 3", 15)]
