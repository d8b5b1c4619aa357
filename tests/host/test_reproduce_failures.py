"""What fails in a reproduction is a row that says why, and the others stand; nothing trains here."""

import csv
from dataclasses import replace

import pytest

from lance_edge.bench_rows import BenchSummaryRow
from lance_edge.errors import DataError, Interrupted, ModelError
from lance_edge.profiles import cells as texts
from lance_edge.profiles import columns
from lance_host.reproduce import fig2, fig4, fig5, table1, trained
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.claims import ReproduceError, reproduce
from lance_host.reproduce.material import Material
from lance_host.reproduce.study import Study

pytest.importorskip("matplotlib")
PHASES = ("data", "prefix", "forward", "backward", "update", "step")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Of runs that all go well: what fails, a test says."""

    def run(cells, material, plan):
        return [plan.cell.found(name, [50.0]) for name in trained.QUANTITIES[:2]]

    monkeypatch.setattr(trained, "_run_plan", run)
    monkeypatch.setattr(Cells, "package", lambda self, material, seed, **options: tmp_path / "package.tar")
    for module in (fig2, fig4, fig5):
        monkeypatch.setattr(
            module, "find_material", lambda study, model, name: Material(model, None, name, tmp_path)
        )
    return Study(out=tmp_path / "out", preset="quick", datasets=("photos",), say=lambda text: None)


def rows(study, claim):
    with (study.out / f"{claim}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def bench_row(method, layers, phase):
    names = dict.fromkeys(columns(BenchSummaryRow), 1)
    return BenchSummaryRow(**{**names, "method": method, "layers": layers, "phase": phase, "cached": True})


def test_one_benchmark_that_fails_leaves_the_others(study, tmp_path, monkeypatch):
    def bench(self, package, **words):
        if words["layers"] == 2:
            raise DataError("no luck today")
        folder = tmp_path / f"bench-{words['layers']}"
        folder.mkdir()
        found = [
            bench_row(one, words["layers"], phase) for one in words["methods"].split(",") for phase in PHASES
        ]
        with (folder / "summary.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns(BenchSummaryRow), *map(texts, found)])
        return folder

    monkeypatch.setattr(Cells, "bench", bench)
    with pytest.raises(ReproduceError, match=r"fig5.md: 4 cells failed, with a row that says why; the others"):
        reproduce("fig5", study)
    steps = [row for row in rows(study, "fig5") if row["quantity"] == "step_ms" and not row["setting"]]
    assert {row["layers"] for row in steps if row["measured"]} == {"0", "1", "4"}
    failed = {(row["method"], row["layers"], row["note"]) for row in steps if not row["measured"]}
    assert failed == {(method, "2", "failed: no luck today") for method in study.methods}


def angles_of(wrong):
    def plan_angles(cells, material, plan, seed, file):
        if file == wrong:
            raise DataError(f"{file}: torn")
        return {"mean_deg": 20.0, "worst_deg": 30.0}

    return plan_angles


def test_an_epoch_whose_angle_fails_leaves_the_others(study, monkeypatch):
    monkeypatch.setattr(fig2, "plan_angles", angles_of("epoch-0003.npz"))
    with pytest.raises(ReproduceError, match=r"fig2.md: 2 cells failed"):
        reproduce("fig2", study)
    angles = [row for row in rows(study, "fig2") if row["quantity"] == "angle_deg" and row["layers"] == "4"]
    assert [bool(row["measured"]) for row in angles] == [epoch != 3 for epoch in range(6)]
    assert angles[3]["note"] == "failed: epoch-0003.npz: torn"


def test_an_angle_that_fails_is_said_beside_the_accuracy(study, monkeypatch):
    monkeypatch.setattr(fig4, "plan_angles", angles_of("last.npz"))
    with pytest.raises(ReproduceError, match=r"fig4.md: 3 cells failed"):
        reproduce("fig4", study)
    found = {row["quantity"]: row for row in rows(study, "fig4") if row["setting"] == "ε 0.5"}
    assert (found["accuracy_percent"]["measured"], found["angle_deg"]["measured"]) == ("50", "")
    assert found["angle_deg"]["note"] == "failed: last.npz: torn"


@pytest.mark.parametrize(("claim", "module"), [("fig2", fig2), ("fig4", fig4)])
def test_no_angle_is_asked_of_a_run_that_failed(claim, module, study, monkeypatch):
    """It would train again."""

    def fail(cells, material, plan):
        raise DataError("no luck today")

    monkeypatch.setattr(trained, "_run_plan", fail)
    monkeypatch.setattr(module, "plan_angles", None)
    with pytest.raises(ReproduceError):
        reproduce(claim, study)
    assert not [row for row in rows(study, claim) if row["measured"]]


def test_pretraining_that_fails_is_a_row_of_every_cell(study, tmp_path, monkeypatch):
    def fail(job, output, say):
        raise ModelError("cannot be trained from nothing")

    monkeypatch.setattr(table1, "pretrain", fail)
    monkeypatch.setattr(table1, "class_names", lambda study, dataset: ("a", "b", "c", "d"))
    monkeypatch.setattr(table1, "sized_data", lambda study, dataset, classes, label: tmp_path)
    with pytest.raises(ReproduceError, match=r"table1.md: 9 cells failed"):
        reproduce("table1", study)
    both = replace(study, places={**(study.places or {}), table1.PAPERS: tmp_path})  # ImageNet is there, too
    with pytest.raises(ReproduceError, match=r"table1.md: 18 cells failed"):
        reproduce("table1", both)
    assert {row["note"] for row in rows(study, "table1")} == {"failed: cannot be trained from nothing"}


def test_an_interruption_is_no_row(study, monkeypatch):
    def stop(*_):
        raise Interrupted("stopped")

    monkeypatch.setattr(fig4, "plan_angles", stop)
    with pytest.raises(Interrupted):
        reproduce("fig4", study)
