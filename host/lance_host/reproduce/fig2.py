"""Figure 2: the angle between LANCE's and backpropagation's gradients while LANCE trains."""

from dataclasses import replace
from pathlib import Path

from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.gradients import gradient_angles
from lance_host.reproduce.material import AbsentError, Material, find_material
from lance_host.reproduce.plots import Axes, Point, draw_lines
from lance_host.reproduce.study import BATCH_SIZE
from lance_host.reproduce.trained import Plan, method_plans, run_plan

MOST_DEG = 70.0  # below which the paper reports it


def fig2(cells: Cells) -> list[Finding]:
    """An angle for each epoch, from the same weights and batches; accuracies of LANCE and the head alone."""
    findings = []
    for model, dataset in cells.study.pairs:
        for layers in cells.study.layers:
            head, lance = method_plans("fig2", model, dataset, ("lance",), (layers,), "", batch_size=BATCH_SIZE)
            lance = replace(lance, words={"keep_every": 1})
            try:
                material = find_material(cells.study, model, dataset)
            except AbsentError as reason:
                findings.append(lance.cell.found("angle_deg", (), str(reason)))
                continue
            findings += [one for plan in (head, lance) for one in run_plan(cells, material, plan)[:2]]
            if all(one.measured is not None for one in findings[-2:]):
                findings += _epochs(cells, material, lance)
    return findings


def _epochs(cells: Cells, material: Material, plan: Plan) -> list[Finding]:
    """The angle at the start and after each epoch, mean over batches and seeds."""
    found: dict[int, list[float]] = {}
    worst: dict[int, float] = {}
    for seed in cells.study.seeds:
        package = cells.package(material, seed, **plan.package)
        run = cells.run(material, package, seed, method=plan.method, layers=plan.layers, **plan.words)
        name = f"angles of {run.name}"
        cells.used.append(name)
        with cells.timed(name):
            for epoch in range(cells.study.size.epochs + 1):
                checkpoint = run / f"epoch-{epoch:04}.npz" if epoch else None
                batches = cells.study.size.gradient_batches
                angles = gradient_angles(material, package, plan.layers, checkpoint, batches, seed)
                cells.study.say(f"{run.name}, epoch {epoch}: {angles.mean_deg:.1f} degrees")
                found.setdefault(epoch, []).append(angles.mean_deg)
                worst[epoch] = max(angles.worst_deg, worst.get(epoch, 0.0))
    rows = []
    for epoch, values in found.items():
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
    draw_lines(path, axes, series)
