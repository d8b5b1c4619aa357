"""Figure 5: the time of a training step over the number of layers, all methods, phase by phase."""

from pathlib import Path

from lance_edge.bench_rows import BenchSummaryRow
from lance_edge.errors import Interrupted, LanceError, StorageError
from lance_edge.profiles import STEP_PHASES, read_rows
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.findings import MIB, Cell, Finding
from lance_host.reproduce.material import AbsentError, Material, find_material
from lance_host.reproduce.plots import Axes, draw_stacks
from lance_host.reproduce.study import counts
from lance_host.reproduce.trained import FAILED

PHASE = "phase "  # in `setting`, before the name of a phase that is not the whole step


def fig5(cells: Cells) -> list[Finding]:
    """Rows of whole steps, and of each phase; features from the cache, as in later epochs of a run."""
    findings = []
    for model, dataset in cells.study.pairs:
        cell = Cell("fig5", model, dataset, "lance")
        try:
            material = find_material(cells.study, model, dataset)
            findings += _measure(cells, material)
        except (Interrupted, StorageError):
            raise
        except AbsentError as reason:
            findings.append(cell.found("step_ms", (), str(reason)))
        except LanceError as error:
            findings.append(cell.found("step_ms", (), f"{FAILED}{error}"))
    return findings


def _measure(cells: Cells, material: Material) -> list[Finding]:
    study, findings = cells.study, list[Finding]()
    layers = counts("--layers", study.size.bench_layers)
    package = cells.package(
        material,
        study.seeds[0],
        layers=study.size.bench_layers,
        methods=study.methods,
        batch_size=study.batch_size,
    )
    for number in (0, *layers):  # one benchmark each: a study that was broken off keeps what it has
        methods = study.methods if number else ("bp",)
        if not number:
            head = cells.package(
                material, study.seeds[0], layers="0", methods=("bp",), batch_size=study.batch_size
            )
        folder = cells.bench(
            package if number else head,
            data=material.data,
            layers=number,
            methods=",".join(methods),
            steps=study.size.bench_steps,
            trials=study.size.bench_trials,
            cache="on",
        )
        for row in read_rows(folder / "summary.csv", BenchSummaryRow):
            findings += _findings(material, row)
    return findings


def _findings(material: Material, row: BenchSummaryRow) -> list[Finding]:
    method = row.method if row.layers else "head only"
    setting = "" if row.phase == "step" else PHASE + row.phase
    cell = Cell("fig5", material.model, material.dataset, method, row.layers, setting)
    found = [cell.found("step_ms", [row.p50_ms])]
    if row.phase == "step":
        found += [cell.found("saved_mib", [row.saved_bytes / MIB])]
        found += [cell.found("ratio_to_lance", [row.ratio_to_lance])] if row.ratio_to_lance is not None else []
    return found


def draw_phases(path: Path, findings: list[Finding]) -> None:
    """A stacked bar for each method and number of layers."""
    bars: dict[str, dict[str, float]] = {}
    for one in findings:
        phase = one.setting.removeprefix(PHASE)
        if one.measured is not None and phase in STEP_PHASES and one.quantity == "step_ms":
            bars.setdefault(f"{one.layers} {one.method}", {})[phase] = one.measured
    axes = Axes("A training step, features cached", "layers and method", "median of each phase, ms")
    draw_stacks(path, axes, bars)
