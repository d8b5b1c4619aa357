"""Figure 2: the angle between LANCE's and backpropagation's gradients while LANCE trains."""

from dataclasses import replace
from pathlib import Path

from lance_host.reproduce.angles import plan_angles
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.material import AbsentError, Material, find_material
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.trained import Plan, run_plan, shared_plans

MOST_DEG = 70.0  # below which the paper reports it


def fig2(cells: Cells) -> list[Finding]:
    """An angle for each epoch, from the same weights and batches; accuracies of LANCE and the head alone."""
    study, findings = cells.study, list[Finding]()
    for model, dataset in study.pairs:
        plans = [
            plan if plan.method == "bp" else replace(plan, words={"keep_every": 1})
            for plan in shared_plans(study, "fig2", model, dataset, ("lance",))
        ]
        try:
            material = find_material(study, model, dataset)
        except AbsentError as reason:
            study.say(f"{model} on {dataset}: {reason}")
            findings += [plan.cell.found("angle_deg", (), str(reason)) for plan in plans if plan.words]
            continue
        for plan in plans:
            found = run_plan(cells, material, plan)[:2]
            findings += found
            if plan.words and found[0].measured is not None:
                findings += _epochs(cells, material, plan)
    return findings


def _epochs(cells: Cells, material: Material, plan: Plan) -> list[Finding]:
    """The angle at the start and after each epoch, mean over batches and seeds."""
    means: dict[int, list[float]] = {}
    worst: dict[int, float] = {}
    for seed in cells.study.seeds:
        for epoch in range(cells.study.size.epochs + 1):
            file = f"epoch-{epoch:04}.npz" if epoch else None
            angles = plan_angles(cells, material, plan, seed, file)
            means.setdefault(epoch, []).append(angles["mean_deg"])
            worst[epoch] = max(angles["worst_deg"], worst.get(epoch, 0.0))
    rows = []
    for epoch, values in means.items():
        cell = replace(plan.cell, setting=f"epoch {epoch}")
        rows += [cell.found("angle_deg", values), cell.found("worst_angle_deg", [worst[epoch]])]
    return rows


def draw_angles(path: Path, findings: list[Finding]) -> None:
    """Angle over epochs, a line for each network, data set and number of layers."""
    series: dict[str, list[Point]] = {}
    for one in findings:
        if one.quantity == "angle_deg" and one.measured is not None:
            name = f"{one.model}, {one.dataset}, {one.layers} layers"
            series.setdefault(name, []).append((float(one.setting.removeprefix("epoch ")), one.measured))
    axes = Axes(
        "LANCE's gradient and the exact one",
        "epoch",
        "angle, degrees",
        bound=(MOST_DEG, "published: below 70"),
    )
    draw_lines(path, Panel(axes, series))
