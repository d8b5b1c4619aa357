"""Figure 2: the angle between LANCE's and backpropagation's gradients while LANCE trains."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lance_host.reproduce.angles import plan_angles
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.material import Material, find_material
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.trained import Plan, did_run, guarded, run_plan, shared_plans

MOST_DEG = 70.0  # below which the paper reports it


def fig2(cells: Cells) -> list[Finding]:
    """An angle for each epoch, from the same weights and batches; accuracies of LANCE and the head alone."""
    study, findings = cells.study, list[Finding]()
    for model, dataset in study.pairs:
        plans = shared_plans(study, "fig2", model, dataset, ("lance",))
        findings += _pair(cells, model, dataset, plans)
    return findings


def _pair(cells: Cells, model: str, dataset: str, plans: Sequence[Plan]) -> list[Finding]:
    """Of one network and data set."""

    def work() -> list[Finding]:
        material, findings = find_material(cells.study, model, dataset), list[Finding]()
        for plan in plans:
            found = run_plan(cells, material, plan)[:2]
            findings += found
            if plan.method == "lance" and did_run(found):
                for epoch in range(cells.study.size.epochs + 1):
                    findings += _epoch(cells, material, plan, epoch)
        return findings

    asked = [plan.cell for plan in plans if plan.method == "lance"]
    return guarded(cells.study, asked, ("angle_deg",), work)


def _epoch(cells: Cells, material: Material, plan: Plan, epoch: int) -> list[Finding]:
    """The angle after an epoch (0: at the start), mean over batches and seeds."""
    cell = replace(plan.cell, setting=f"epoch {epoch}")
    file = f"epoch-{epoch:04}.npz" if epoch else None

    def work() -> list[Finding]:
        angles = [plan_angles(cells, material, plan, seed, file) for seed in cells.study.seeds]
        return [
            cell.found("angle_deg", [one["mean_deg"] for one in angles]),
            cell.found("worst_angle_deg", [max(one["worst_deg"] for one in angles)]),
        ]

    return guarded(cells.study, [cell], ("angle_deg",), work)


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
