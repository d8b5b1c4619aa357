"""Figure 3: what the energy threshold ε and the number N of calibration batches do to accuracy and bytes."""

from pathlib import Path

from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Cell, Finding
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.study import Study
from lance_host.reproduce.trained import Plan, run_plans, shared_plans

ENERGY = 0.7  # while N varies


def fig3(cells: Cells) -> list[Finding]:
    """Rows over ε at the preset's N, and over N at ε 0.7; the head alone beside them."""
    study, findings = cells.study, list[Finding]()
    for model, dataset in study.pairs:
        plans = shared_plans(study, "fig3", model, dataset, ())
        plans += [
            _plan(study, model, dataset, f"ε {energy:g}", energy=energy) for energy in study.size.energies
        ]
        plans += [
            _plan(study, model, dataset, f"N {number}", energy=ENERGY, batches=number)
            for number in study.size.calibrations
        ]
        findings += run_plans(cells, model, dataset, plans)
    return findings


def _plan(study: Study, model: str, dataset: str, setting: str, **options: object) -> Plan:
    layers = study.layers[-1]
    package = {"layers": str(layers), "methods": ("lance",), "batch_size": study.batch_size, **options}
    return Plan(Cell("fig3", model, dataset, "lance", layers, setting), package, "lance", layers)


def draw_ablation(path: Path, findings: list[Finding]) -> None:
    """Accuracy over ε, and below it over N."""
    axes = {
        "ε": Axes("Energy threshold", "ε", "test accuracy, %"),
        "N": Axes(f"Calibration batches, ε {ENERGY:g}", "N", "test accuracy, %", log_x=True),
    }
    series: dict[str, dict[str, list[Point]]] = {"ε": {}, "N": {}}
    for one in findings:
        name, _, value = one.setting.partition(" ")
        if one.quantity == "accuracy_percent" and one.measured is not None and value:
            points = series[name].setdefault(f"{one.model}, {one.dataset}", [])
            points.append((float(value), one.measured))
    draw_lines(path, *(Panel(axes[name], series[name]) for name in axes))
