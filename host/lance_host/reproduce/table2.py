"""Table 2: accuracy, activation memory and multiply-adds of every method, network and data set."""

from dataclasses import replace
from pathlib import Path

from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import MIB, Cell, Finding, by_pair
from lance_host.reproduce.paper import published
from lance_host.reproduce.plots import Axes, Panel, Point, draw_lines
from lance_host.reproduce.trained import Plan, run_plans, shared_plans

AXES = Axes("", "activations, MiB (the head alone keeps none: left edge)", "test accuracy, %", log_x=True)
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
    """Accuracy over bytes, a plane for each network and data set that was there; numbers are trained layers."""
    found = [one for one in findings if one.measured is not None]
    panels = []
    for title, own in by_pair(found, "Accuracy over activation memory, and number of layers").items():
        series = _series(own)
        points = {name: [point for point, _ in places] for name, places in series.items()}
        texts = {name: [text for _, text in places] for name, places in series.items()}
        panels.append(Panel(replace(AXES, title=title), points, joined=False, texts=texts))
    draw_lines(path, *panels)


def _series(findings: list[Finding]) -> dict[str, list[tuple[Point, str]]]:
    """A series for each method, the published points apart: hollow.  Points, and what is beside them."""
    series: dict[str, list[tuple[Point, str]]] = {}
    cells: dict[tuple[object, ...], dict[str, Finding]] = {}
    for one in findings:
        cells.setdefault((one.method, one.layers, one.setting), {})[one.quantity] = one
    for found in cells.values():
        if not {"activation_mib", "accuracy_percent"} <= set(found):
            continue
        size, accuracy = found["activation_mib"], found["accuracy_percent"]
        name = ", ".join(filter(None, (accuracy.method, accuracy.setting)))
        text = str(accuracy.layers or "")
        if size.measured is not None and accuracy.measured is not None:
            series.setdefault(name, []).append(((max(size.measured, LEAST_MIB), accuracy.measured), text))
        if size.published is not None and accuracy.published is not None and not accuracy.setting:
            series.setdefault(f"{name}, published", []).append(((size.published, accuracy.published), text))
    return series
