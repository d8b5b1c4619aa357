"""Figure 4: gradient angle, activation memory and accuracy over the energy threshold ε."""

from collections.abc import Sequence
from pathlib import Path

from lance_host.reproduce.angles import plan_angles
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.material import Material, find_material
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.trained import Plan, did_run, guarded, lance_plan, run_plan, shared_plans

FILES = {"start_angle_deg": None, "angle_deg": "last.npz"}  # of the run: whose weights


def fig4(cells: Cells) -> list[Finding]:
    """A row for each ε; the head alone and backpropagation, the ends of the scale, beside them."""
    study, findings = cells.study, list[Finding]()
    layers = study.layers[-1]
    for model, dataset in study.pairs:
        shared = shared_plans(study, "fig4", model, dataset, ("bp",))
        ends = [plan for plan in shared if plan.layers in (0, layers)]
        plans = [
            lance_plan(study, "fig4", model, dataset, f"ε {energy:g}", energy=energy)
            for energy in study.size.energies
        ]
        findings += _pair(cells, model, dataset, [*ends, *plans])
    return findings


def _pair(cells: Cells, model: str, dataset: str, plans: Sequence[Plan]) -> list[Finding]:
    """Of one network and data set."""

    def work() -> list[Finding]:
        material, findings = find_material(cells.study, model, dataset), list[Finding]()
        for plan in plans:
            found = run_plan(cells, material, plan)
            findings += found
            if plan.method == "lance" and did_run(found):
                findings += _angles(cells, material, plan)
        return findings

    return guarded(cells.study, [plan.cell for plan in plans], ("accuracy_percent",), work)


def _angles(cells: Cells, material: Material, plan: Plan) -> list[Finding]:
    """With the weights that all ε begin with, and those that each ends with."""

    def work() -> list[Finding]:
        found = []
        for quantity, file in FILES.items():
            angles = [plan_angles(cells, material, plan, seed, file) for seed in cells.study.seeds]
            found.append(plan.cell.found(quantity, [one["mean_deg"] for one in angles]))
        return found

    return guarded(cells.study, [plan.cell], tuple(FILES), work)


ENERGY_AXIS = "ε"
PANELS = {
    "angle_deg": Axes("Angle between LANCE's gradient and the exact one", ENERGY_AXIS, "degrees, at the end"),
    "activation_mib": Axes("Activation memory", ENERGY_AXIS, "MiB", log_y=True),
    "accuracy_percent": Axes("Test accuracy", ENERGY_AXIS, "%"),
}


def draw_energy(path: Path, findings: list[Finding]) -> None:
    """Angle, activation memory and accuracy over ε, a panel each."""
    series: dict[str, dict[str, list[Point]]] = {name: {} for name in PANELS}
    for one in findings:
        if one.quantity in PANELS and one.measured is not None and one.setting.startswith(f"{ENERGY_AXIS} "):
            points = series[one.quantity].setdefault(f"{one.model}, {one.dataset}", [])
            points.append((float(one.setting[2:]), one.measured))
    draw_lines(path, *(Panel(axes, series[name]) for name, axes in PANELS.items()))
