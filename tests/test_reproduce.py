"""`lance-host reproduce` from end to end on generated photographs: cells, resuming, what is written."""

import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from literal_method import compress_layers
from torch.nn.functional import cross_entropy

from lance_edge.bundle import Bundle
from lance_edge.calibration_order import calibration_batches
from lance_edge.datasets import open_dataset
from lance_edge.errors import DataError, Interrupted
from lance_edge.images import load_batch
from lance_edge.names import PROJECTIONS_MEMBER
from lance_edge.profiles import STEP_PHASES
from lance_host.merge import merged_state
from lance_host.network import NetworkRequest, load_network
from lance_host.reproduce import cells as cells_module
from lance_host.reproduce import theory
from lance_host.reproduce.cells import EVALUATIONS, Cells
from lance_host.reproduce.claims import CLAIMS, ReproduceError, reproduce
from lance_host.reproduce.gradients import OTHER_ORDER
from lance_host.reproduce.material import find_material
from lance_host.reproduce.study import PRESETS, Study
from lance_host.reproduce.table8 import BATCH_SIZES
from lance_host.reproduce.trained import method_plans, shared_plans

pytest.importorskip("matplotlib")

TINY = dataclasses.replace(
    PRESETS["quick"],
    train_images=24,
    test_images=12,
    epochs=2,
    small_batch_epochs=1,
    batches=1,
    gradient_batches=1,
    energies=(0.5, 0.9),
    calibrations=(1,),
    bench_layers="1,2",
    bench_steps=1,
    pretrain_epochs=1,
)


@pytest.fixture(scope="module")
def study(photos, start_weights, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "quick", TINY)
        yield Study(
            out=tmp_path_factory.mktemp("reproduced"),
            preset="quick",
            models=("mcunet-10fps-vww",),
            datasets=("photos", "absent"),
            places={"photos": photos},
            weights={"mcunet-10fps-vww": str(start_weights)},
            layers=(1, 2),
            methods=("lance", "bp"),
            batch_size=8,
            threads=1,
            say=lambda text: None,
        )


def rows(study, claim):
    with (study.out / f"{claim}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def figure2(study):
    reproduce("fig2", study)
    return rows(study, "fig2")


def test_an_angle_for_each_epoch_and_count_of_layers(figure2):
    angles = [row for row in figure2 if row["quantity"] == "angle_deg" and row["dataset"] == "photos"]
    assert [(row["layers"], row["setting"]) for row in angles] == [
        (layers, f"epoch {epoch}") for layers in "12" for epoch in range(3)
    ]
    assert all(0 < float(row["measured"]) < 120 for row in angles)
    heads = [row for row in figure2 if row["method"] == "head only" and row["quantity"] == "accuracy_percent"]
    assert heads[0]["measured"]


def test_the_first_angle_is_that_of_lance_written_out(study, figure2):
    """Autograd through the whole network, the inputs of the trained layers projected and rebuilt."""
    cells, material = Cells(study), find_material(study, study.models[0], "photos")
    plan = shared_plans(study, "fig2", material.model, "photos", ("lance",))[-1]
    with Bundle(cells.package(material, 0, **plan.package)) as bundle:
        manifest, ranks = bundle.manifest, bundle.manifest.variant("lance", 2).projection_ranks
        stored = bundle.arrays(PROJECTIONS_MEMBER)
        projections = {name: np.array(stored[name][:, :rank]) for name, rank in ranks.items()}
        state = {name: torch.from_numpy(np.array(value)) for name, value in merged_state(bundle, {}).items()}
        layers = [layer.layer for layer in manifest.variant("lance", 2).layers]
    train = open_dataset(material.data, manifest.split, manifest.classes).train
    (rows_of_batch,) = calibration_batches(len(train), manifest.batch_size, 1, OTHER_ORDER)
    images = torch.from_numpy(load_batch(train, rows_of_batch, manifest.preprocessing))
    gradients = []
    for compress in (False, True):
        request = NetworkRequest(material.model, material.weights, "2", seed=manifest.seed)
        network = load_network(request, len(manifest.classes), lambda text: None, lambda *_: None).module
        network.load_state_dict(state)
        if compress:
            compress_layers(network, layers, projections)
        weights = [network.get_submodule(name).weight.requires_grad_() for name in layers]
        loss = cross_entropy(network(images), torch.from_numpy(train.labels[rows_of_batch]))
        gradients.append(torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)]).double())
    cosine = float(gradients[0] @ gradients[1] / (gradients[0].norm() * gradients[1].norm()))
    found = [
        row
        for row in figure2
        if (row["layers"], row["setting"], row["quantity"]) == ("2", "epoch 0", "angle_deg")
    ]
    # float32 gradients agree to some 1e-6; an angle of tens of degrees to a thousandth of a degree.
    assert float(found[0]["measured"]) == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-2)


def test_what_is_absent_is_a_row_that_says_so(figure2):
    (row, _) = [row for row in figure2 if row["dataset"] == "absent"]
    assert (row["measured"], row["seeds"]) == ("", "0")
    assert row["note"].startswith("no images: data/absent")


def test_every_file_of_a_claim_is_there(study, figure2):
    record = json.loads((study.out / "fig2.json").read_text())
    assert record["study"]["preset"] == "quick"
    assert record["seconds"] > 0
    assert (record["seeds"], record["micro_batch"], record["threads"]) == ([0], [8], [1])
    text = (study.out / "fig2.md").read_text()
    assert "seeds 0; micro-batch 8; threads 1;" in text
    assert "A quick study shows that everything runs" in text
    assert f"{TINY.train_images} training images, {TINY.epochs} epochs" in text
    assert (study.out / "fig2.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_skipped_and_a_broken_one_is_taken_up(study, figure2, monkeypatch):
    started = []
    run_device = cells_module.run_device

    def count(words, command, log, say):
        started.append(words["out"].name)
        run_device(words, command, log, say)

    monkeypatch.setattr(cells_module, "run_device", count)
    monkeypatch.setattr(cells_module, "calibrate", None)  # no package is made again
    reproduce("fig2", study)
    assert started == []
    assert rows(study, "fig2") == figure2
    broken = next((study.out / "runs").glob("*-lance-1-*/run.json"))
    record = json.loads(broken.read_text())
    broken.write_text(json.dumps({**record, "status": "interrupted"}))
    reproduce("fig2", study)
    assert started == [broken.parent.name]
    assert rows(study, "fig2") == figure2


LONG = 40  # epochs: far from the end at the first evaluation


def test_a_run_that_was_stopped_goes_on_with_the_threads_that_it_has(study, figure2):
    """Ctrl-C in the midst of training, and the same cell asked for with other threads."""
    (plan,) = [
        plan for plan in shared_plans(study, "fig2", study.models[0], "photos", ("lance",)) if plan.layers == 1
    ]

    def train(threads, say):
        cells = Cells(dataclasses.replace(study, threads=threads, say=say))
        material = find_material(study, study.models[0], "photos")
        package = cells.package(material, 0, **plan.package)
        return cells.run(material, package, 0, method="lance", layers=1, epochs=LONG)

    def stop(text):
        if text.startswith(f"  epoch {LONG // EVALUATIONS} "):
            raise KeyboardInterrupt

    before = set((study.out / "runs").iterdir())
    with pytest.raises(Interrupted, match="the same command goes on where this one was"):
        train(1, stop)
    (stopped,) = (path for path in set((study.out / "runs").iterdir()) - before if path.is_dir())
    assert json.loads((stopped / "run.json").read_text())["status"] != "finished"
    folder = train(2, study.say)
    record = json.loads((folder / "run.json").read_text())
    assert folder == stopped
    assert (record["status"], len(record["resumed"])) == ("finished", 1)
    assert (record["options"]["threads"], record["options"]["micro_batch"]) == (1, 8)
    assert folder.with_name(f"{folder.name}.log").read_text().count("epoch 1/") == 1


def test_a_cell_that_fails_is_a_row_and_the_others_stand(study, figure2, monkeypatch):
    run_device = cells_module.run_device

    def fail(words, command, log, say):
        if words["method"] == "bp" and words["layers"] == 2:  # figure 2 has run the others
            raise DataError("no luck today")
        run_device(words, command, log, say)

    monkeypatch.setattr(cells_module, "run_device", fail)
    only = dataclasses.replace(study, datasets=("photos",))
    with pytest.raises(
        ReproduceError, match=r"table2.md: 1 cell failed, with a row that says why; the others stand"
    ):
        reproduce("table2", only)
    found = {(row["method"], row["layers"], row["quantity"]): row for row in rows(study, "table2")}
    failed = found["bp", "2", "accuracy_percent"]
    assert (failed["measured"], failed["note"]) == ("", "failed: no luck today")
    # The input of the last convolution of the 96-pixel network: what plain backpropagation keeps.
    assert float(found["bp", "1", "activation_mib"]["measured"]) > float(
        found["lance", "1", "activation_mib"]["measured"]
    )
    assert float(found["head only", "0", "activation_mib"]["measured"]) == 0


def test_claims_of_the_command_line_are_those_of_the_table(lance_host):
    from lance_host.cli_reproduce import HELP

    assert set(HELP) == set(CLAIMS)
    for name in HELP:
        result = lance_host("reproduce", name, "--help")
        assert result.exit_code == 0
        assert f"lance-host reproduce {name} " in result.stdout


def test_theory_from_the_command_line(lance_host, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(theory, "draw_lines", lambda path, panel: drawn.append(panel.series))
    result = lance_host("reproduce", "theory", "--out", tmp_path / "out", "--seeds", "3,4")
    assert result.exit_code == 0, result.output
    assert "seeds 3;" in (tmp_path / "out" / "theory.md").read_text()
    assert json.loads((tmp_path / "out" / "theory.json").read_text())["seeds"] == [3]
    with (tmp_path / "out" / "theory.csv").open(newline="") as file:
        found = {
            (row["method"], row["setting"], row["quantity"]): float(row["measured"])
            for row in csv.DictReader(file)
        }
    made = "one step at 1/L on a target made for it"
    assert found["channels", made, "loss_change_percent"] < 0 < found["all modes", made, "loss_change_percent"]
    for method in ("channels", "all modes"):  # the picture shows what the table says
        after = dict(drawn[0][f"{method} projected"])
        assert after[0] == 1
        assert 100 * (after[1] - 1) == pytest.approx(found[method, made, "loss_change_percent"], rel=1e-6)
        assert found[method, f"{theory.DESCENT}20", "loss_ratio"] == pytest.approx(after[20])
    own = "random targets, subspaces of this batch"
    assert found["channels", own, "rises_percent"] == 0 < found["all modes", own, "rises_percent"]


def test_options_are_checked_before_anything_runs(lance_host, tmp_path):
    result = lance_host("reproduce", "table2", "--data", "folder", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "error: --data: expected NAME=VALUE, found 'folder'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_that_finished_cells_stay(lance_host, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(CLAIMS, "theory", dataclasses.replace(CLAIMS["theory"], find=stop))
    result = lance_host("reproduce", "theory", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert (
        "error: stopped; finished cells stay, and the same command goes on where this one was" in result.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["table1", "table8", "fig3", "fig4", "fig5"])
def test_the_other_claims_run(claim, study):
    """Minutes; what they do in parts is tested above."""
    data = study.places["photos"]
    four = study.out / "four"
    if not four.exists():  # table 1 halves the classes: four of them
        for folder in data.iterdir():
            shutil.copytree(folder, four / folder.name)
        shutil.copytree(data / "disc", four / "another")
    asked = dataclasses.replace(study, datasets=("four",), places={"four": four})
    reproduce(claim, asked)
    measured = [row for row in rows(study, claim) if row["measured"]]
    assert {row["method"] for row in measured} >= {"head only", "lance"}
    sizes = {"table8": "4, 8"}.get(claim, "8")
    assert f"seeds 0; micro-batch {sizes}; threads 1;" in (study.out / f"{claim}.md").read_text()
    CHECKS.get(claim, lambda *_: None)(measured, asked)


def check_small_batches(measured, study):
    """Plain backpropagation keeps the inputs of the last layers that are not depthwise, in float32."""
    kept = {
        (row["setting"], row["layers"]): float(row["measured"])
        for row in measured
        if row["quantity"] == "activation_mib" and row["method"] == "bp"
    }
    cells, material = Cells(study), find_material(study, study.models[0], "four")
    for size in BATCH_SIZES:
        plans = method_plans(
            "table8", material.model, "four", ("bp",), (1, 2), "", "pointwise:", batch_size=size
        )
        with Bundle(cells.package(material, 0, **plans[0].package)) as bundle:  # which is there
            manifest = bundle.manifest
        by_name = {layer.name: layer for layer in manifest.layers}
        for count in (1, 2):
            layers = [by_name[plan.layer] for plan in manifest.variant("bp", count).layers]
            assert [layer.groups for layer in layers] == [1] * count
            values = sum(math.prod(layer.input_shape) for layer in layers) * size
            assert kept[f"batch {size}", str(count)] == pytest.approx(4 * values / 2**20)
    assert len(kept) == 4


def check_energies(measured, study):
    sizes = [
        float(row["measured"])
        for row in measured
        if row["quantity"] == "activation_mib" and row["setting"].startswith("ε")
    ]
    assert len(sizes) == len(TINY.energies)
    assert sizes == sorted(set(sizes))  # more energy, more bytes


def check_phases(measured, study):
    times = {(row["layers"], row["method"], row["setting"]) for row in measured if row["quantity"] == "step_ms"}
    phases = {"", *(f"phase {name}" for name in STEP_PHASES)}
    assert len(STEP_PHASES) == 5
    for layers, methods in (("0", ["head only"]), ("1", ["lance", "bp"]), ("2", ["lance", "bp"])):
        for method in methods:
            assert {setting for *key, setting in times if key == [layers, method]} == phases
    assert {layers for layers, *_ in times} == {"0", "1", "2"}


CHECKS = {"table8": check_small_batches, "fig3": check_energies, "fig4": check_energies, "fig5": check_phases}
