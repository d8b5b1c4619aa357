"""Table 2: accuracy, activation memory and multiply-adds of every method, network and data set."""

from dataclasses import replace
from pathlib import Path

from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import MIB, Cell, Finding, by_pair
from lance_host.reproduce.paper import published
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.trained import Plan, run_plans, shared_plans

AXES = Axes("", "activations, MiB", "test accuracy, %", log_x=True)
LEAST_MIB = 1e-3  # where the head alone, which keeps none, stands on a logarithmic axis


def table2(cells: Cells) -> list[Finding]:
    """A row for each method and number of layers; LANCE also with its ranks within the published bytes."""
    findings = []
    for model, dataset in cells.study.pairs:
        plans = shared_plans(cells.study, "table2", model, dataset, cells.study.methods)
        findings += run_plans(cells, model, dataset, plans + budget_plans(cells, model, dataset))
    return findings


def budget_plans(cells: Cells, model: str, dataset: str) -> list[Plan]:
    """LANCE with ranks chosen within the activation memory that was published for it, where one was."""
    plans = []
    for layers in cells.study.layers:
        printed = published("table2", "activation_mib", model, dataset, "lance", layers)
        if printed is not None and not printed.differences(cells.study):
            budgets = {"lance": int(printed.value * MIB)}
            package = {
                "layers": str(layers),
                "methods": ("lance",),
                "budgets": budgets,
                "batch_size": cells.study.batch_size,
            }
            cell = Cell("table2", model, dataset, "lance", layers, f"within {printed.value:g} MiB")
            plans.append(Plan(cell, package, "lance", layers))
    return plans


def draw_accuracy(path: Path, findings: list[Finding]) -> None:
    """Accuracy over bytes, a plane for each network and data set."""
    pairs = by_pair(findings, "Accuracy over activation memory")
    panels = [Panel(replace(AXES, title=title), _series(own), joined=False) for title, own in pairs.items()]
    draw_lines(path, *panels)


def _series(findings: list[Finding]) -> dict[str, list[Point]]:
    """A series for each method, the published points apart: hollow."""
    series: dict[str, list[Point]] = {}
    cells: dict[tuple[object, ...], dict[str, Finding]] = {}
    for one in findings:
        cells.setdefault((one.method, one.layers, one.setting), {})[one.quantity] = one
    for found in cells.values():
        if not {"activation_mib", "accuracy_percent"} <= set(found):
            continue
        size, accuracy = found["activation_mib"], found["accuracy_percent"]
        name = ", ".join(filter(None, (accuracy.method, accuracy.setting)))
        if size.measured is not None and accuracy.measured is not None:
            series.setdefault(name, []).append((max(size.measured, LEAST_MIB), accuracy.measured))
        if size.published is not None and accuracy.published is not None and not accuracy.setting:
            series.setdefault(f"{name}, published", []).append((size.published, accuracy.published))
    return series
