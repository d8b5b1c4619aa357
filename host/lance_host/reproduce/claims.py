"""The table of claims, and what a claim leaves: `<claim>.csv`, `.md`, `.png` and `.json`."""

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_edge import __version__
from lance_edge.errors import LanceError
from lance_edge.files import atomic_writer
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.fig2 import draw_angles, fig2
from lance_host.reproduce.fig3 import draw_ablation, fig3
from lance_host.reproduce.fig4 import draw_energy, fig4
from lance_host.reproduce.fig5 import draw_phases, fig5
from lance_host.reproduce.findings import Finding, caption, comparable, markdown_table, write_csv
from lance_host.reproduce.material import PAPERS, check_named
from lance_host.reproduce.plots import require_matplotlib
from lance_host.reproduce.study import Study, check
from lance_host.reproduce.table1 import table1
from lance_host.reproduce.table2 import draw_accuracy, table2
from lance_host.reproduce.table8 import table8
from lance_host.reproduce.theory import draw_descent, theory
from lance_host.reproduce.trained import FAILED
from lance_host.text import count

QUICK_NOTE = (
    " A quick study shows that everything runs, and what it costs; its accuracies are those of a few images and"
    " epochs and cannot be compared."
)
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Claim:
    """One of the paper's tables or figures: what finds its numbers, and what draws them.

    Attributes:
        on_images: whether anything is trained.
        epochs: which length of the preset its runs have.
        one_seed: whether it takes the first seed alone.
        datasets: that it takes where they are there, beside those asked for.
    """

    title: str
    find: Callable[[Cells], list[Finding]]
    draw: Callable[[Path, list[Finding]], None]
    on_images: bool = True
    epochs: str = "epochs"
    one_seed: bool = False
    datasets: tuple[str, ...] = ()

    def seeds(self, study: Study) -> tuple[int, ...]:
        """Those of a study that it takes."""
        return study.seeds[:1] if self.one_seed else study.seeds


CLAIMS = {
    "table1": Claim(
        "Pretraining on one half of the classes, fine-tuning on the other",
        table1,
        draw_accuracy,
        datasets=(PAPERS,),
    ),
    "table2": Claim("Accuracy, activation memory and multiply-adds", table2, draw_accuracy),
    "table8": Claim(
        "Small batches, layers counted without depthwise convolutions",
        table8,
        draw_accuracy,
        epochs="small_batch_epochs",
    ),
    "fig2": Claim("Angle between LANCE's gradient and backpropagation's", fig2, draw_angles),
    "fig3": Claim("Ablation of the energy threshold and the calibration batches", fig3, draw_ablation),
    "fig4": Claim("Angle, memory and accuracy over the energy threshold", fig4, draw_energy),
    "fig5": Claim("Time of a training step over the number of layers", fig5, draw_phases, one_seed=True),
    "theory": Claim(
        "Descent with exact channel projectors, and when it breaks",
        theory,
        draw_descent,
        on_images=False,
        one_seed=True,
    ),
}


class ReproduceError(LanceError):
    """Cells that failed: the others stand in the table."""


def reproduce(name: str, study: Study) -> str:
    """Run what is missing of a claim, write its files, and return the table.

    Raises:
        ReproduceError: if cells failed; all files are written.
        LanceError: for what no cell could be run with; no result is written.
    """
    claim, cells = CLAIMS[name], Cells(study)
    check(study)
    if claim.on_images:
        check_named(study, claim.datasets)
    require_matplotlib()
    with cells.timed(name):
        findings, differences = comparable(claim.find(cells), study)
    expect_numbers(findings, study.out / f"{name}.csv")
    study.out.mkdir(parents=True, exist_ok=True)
    write_csv(study.out / f"{name}.csv", findings)
    note = QUICK_NOTE if claim.on_images and study.preset == "quick" else ""
    table = f"{markdown_table(findings)}\n\n{caption(findings, differences)}{note}"
    if not cells.used:  # a claim without cells
        cells.used.append(name)
    seconds = cells.seconds
    text = (
        f"# {claim.title} ({name})\n\n{circumstances(study, claim, seconds, cells.run_options())}\n\n{table}\n"
    )
    _write(study.out / f"{name}.md", text)
    _write(study.out / f"{name}.json", json.dumps(_record(name, cells, seconds), indent=1, default=str) + "\n")
    claim.draw(study.out / f"{name}.png", findings)
    failed = len(failed_cells(findings))
    if failed:
        raise ReproduceError(
            f"{study.out / name}.md: {count(failed, 'cell')} failed, with a row that says why; the others"
            " stand. Correct the cause and run the same command again"
        )
    return table


def expect_numbers(findings: Sequence[Finding], path: Path) -> None:
    """See that anything was there to run: results of nothing must not replace those of an earlier call.

    Raises:
        LanceError: saying what is absent.
    """
    if not failed_cells(findings) and all(one.measured is None for one in findings):
        reasons = "; ".join(dict.fromkeys(one.note for one in findings if one.note))
        raise LanceError(f"{path}: not written, as there was nothing to run: {reasons}")


def failed_cells(findings: Sequence[Finding]) -> set[tuple[object, ...]]:
    """The cells of which something failed: a run, a benchmark, an angle."""
    return {
        (one.model, one.dataset, one.method, one.layers, one.setting)
        for one in findings
        if (one.note or "").startswith(FAILED)
    }


def circumstances(study: Study, claim: Claim, seconds: float, run_options: Mapping[str, Sequence[int]]) -> str:
    """One line: preset, seeds, what of the recipe is another, micro-batch, threads, machine, time."""
    size = study.size
    images = "all images" if size.train_images is None else f"{size.train_images} training images"
    length = (
        f"Preset {study.preset} ({images}, {getattr(size, claim.epochs)} epochs), "
        if claim.on_images
        else "Float64, "
    )
    seeds = ", ".join(map(str, claim.seeds(study)))
    recipe = "".join(
        f"; {name.replace('_', ' ')} {getattr(study, name):g}"
        for name in ("lr", "weight_decay")
        if claim.on_images and getattr(study, name) != getattr(Study, name)
    )
    options = "".join(
        f"; {name.replace('_', '-')} {', '.join(map(str, values))}" for name, values in run_options.items()
    )
    time = f"{seconds / 60:.1f} minutes for all cells"
    return f"{length}seeds {seeds}{recipe}{options}; {machine()}; {time}; lance-edge {__version__}."


def machine() -> str:
    """`AMD EPYC (x86_64), 2 cores`."""
    try:
        lines = CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (
        f"{(names or [platform.processor() or 'processor'])[0]} ({platform.machine()}), {os.cpu_count()} cores"
    )


def _record(name: str, cells: Cells, seconds: float) -> dict[str, object]:
    study = cells.study
    asked = {key: value for key, value in vars(study).items() if key != "say"}
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {"lance-edge": __version__, "python": platform.python_version()}
    return {
        **{"claim": name, "written": when, "seconds": round(seconds, 1), "machine": machine()},
        **{"versions": versions, "seeds": CLAIMS[name].seeds(study), **cells.run_options(), "study": asked},
    }


def _write(path: Path, text: str) -> None:
    with atomic_writer(path) as file:
        file.write(text.encode())
