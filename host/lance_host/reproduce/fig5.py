"""Figure 5: the time of a training step over the number of layers, all methods, phase by phase."""

from dataclasses import replace
from pathlib import Path

from lance_edge.bench_rows import BenchSummaryRow
from lance_edge.profiles import STEP_PHASES, read_rows
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import MIB, Cell, Finding, by_pair
from lance_host.reproduce.material import Material, find_material
from lance_host.reproduce.plots import Axes, Stacks, draw_stacks
from lance_host.reproduce.study import counts
from lance_host.reproduce.trained import HEAD_ONLY, guarded

TIME = ("step_ms",)
PHASE = "phase "  # in `setting`, before the name of a phase that is not the whole step


def fig5(cells: Cells) -> list[Finding]:
    """Rows of whole steps, and of each phase; features from the cache, as in later epochs of a run."""
    return [found for model, dataset in cells.study.pairs for found in _pair(cells, model, dataset)]


def _pair(cells: Cells, model: str, dataset: str) -> list[Finding]:
    """Of one network and data set: the head alone, then every number of layers, a benchmark each."""
    study, own = cells.study, Cell("fig5", model, dataset, HEAD_ONLY, 0)
    layers = study.size.bench_layers
    trained = [replace(own, method=method, layers=None) for method in study.methods]

    def head() -> list[Finding]:
        material = find_material(study, model, dataset)
        return _measure(cells, material, _package(cells, material, "0", ("bp",)), 0)

    def rest() -> list[Finding]:
        material = find_material(study, model, dataset)
        package = _package(cells, material, layers, study.methods)
        numbers = counts("--layers", layers)
        return [found for number in numbers for found in _measure(cells, material, package, number)]

    return guarded(study, [own], TIME, head) + guarded(study, trained, TIME, rest)


def _package(cells: Cells, material: Material, layers: str, methods: tuple[str, ...]) -> Path:
    options = {"layers": layers, "methods": methods, "batch_size": cells.study.batch_size}
    return cells.package(material, cells.study.seeds[0], **options)


def _measure(cells: Cells, material: Material, package: Path, number: int) -> list[Finding]:
    """The benchmark of one number of layers; if it fails, the others stand."""
    study = cells.study
    methods = study.methods if number else ("bp",)
    own = Cell("fig5", material.model, material.dataset, HEAD_ONLY, number)
    asked = [replace(own, method=method) for method in methods] if number else [own]

    def work() -> list[Finding]:
        folder = cells.bench(
            package,
            data=material.data,
            layers=number,
            methods=",".join(methods),
            steps=study.size.bench_steps,
            trials=study.size.bench_trials,
            cache="on",
        )
        rows = read_rows(folder / "summary.csv", BenchSummaryRow)
        return [found for row in rows for found in _findings(material, row)]

    return guarded(study, asked, TIME, work)


def _findings(material: Material, row: BenchSummaryRow) -> list[Finding]:
    method = row.method if row.layers else HEAD_ONLY
    setting = "" if row.phase == "step" else PHASE + row.phase
    cell = Cell("fig5", material.model, material.dataset, method, row.layers, setting)
    found = [cell.found("step_ms", [row.p50_ms])]
    if row.phase == "step":
        found += [cell.found("saved_mib", [row.saved_bytes / MIB])]
        found += [cell.found("ratio_to_lance", [row.ratio_to_lance])] if row.ratio_to_lance is not None else []
    return found


def draw_phases(path: Path, findings: list[Finding]) -> None:
    """A stacked bar for each method and number of layers; a plane for each network and data set."""
    stacks = []
    for title, own in by_pair(findings, "A training step, features cached").items():
        bars: dict[tuple[str, int], dict[str, float]] = {}
        for one in own:
            phase = one.setting.removeprefix(PHASE)
            if one.measured is not None and phase in STEP_PHASES and one.layers is not None:
                bars.setdefault((one.method, one.layers), {})[phase] = one.measured
        stacks.append(Stacks(Axes(title, "layers and method", "median of each phase, ms"), bars))
    draw_stacks(path, *stacks)
