"""Figure 3: what the energy threshold ε and the number N of calibration batches do to accuracy and bytes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lance_edge.bundle import Bundle
from lance_edge.errors import Interrupted, LanceError, StorageError
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import Finding
from lance_host.reproduce.material import find_material
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.trained import Plan, lance_plan, run_plans, shared_plans

ENERGY = 0.7  # while N varies


def fig3(cells: Cells) -> list[Finding]:
    """Rows over ε at the preset's N, and over N at ε 0.7; the head alone beside them."""
    study, findings = cells.study, list[Finding]()
    for model, dataset in study.pairs:
        plans = shared_plans(study, "fig3", model, dataset, ())
        plans += [
            lance_plan(study, "fig3", model, dataset, f"ε {energy:g}", energy=energy)
            for energy in study.size.energies
        ]
        over_n = [
            lance_plan(study, "fig3", model, dataset, f"N {number}", energy=ENERGY, batches=number)
            for number in study.size.calibrations
        ]
        findings += run_plans(cells, model, dataset, plans + _distinct(cells, model, dataset, over_n))
    return findings


def _distinct(cells: Cells, model: str, dataset: str, plans: Sequence[Plan]) -> list[Plan]:
    """Plans by the number of batches that calibration took: few images give less than was asked for.

    Of several with the same batches the last stays, which table 2 has too.
    """
    found = {}
    try:
        material = find_material(cells.study, model, dataset)
        for plan in plans:
            package = cells.package(material, cells.study.seeds[0], **plan.package)
            with Bundle(package) as bundle:
                number = bundle.manifest.calibration_batches
            found[number] = replace(plan, cell=replace(plan.cell, setting=f"N {number}"))
    except (Interrupted, StorageError):
        raise
    except LanceError:
        return list(plans)  # whose rows will say why
    return list(found.values())


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
