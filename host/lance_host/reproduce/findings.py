"""What a claim's cells gave, beside what was published: rows of CSV, and a table of Markdown."""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lance_edge.files import atomic_writer
from lance_edge.profiles import cells, columns
from lance_host.reproduce.paper import Published, published, source

# Name in the CSV -> heading, and the digits behind the point.
QUANTITIES = {
    "accuracy_percent": ("test accuracy, %", 2),
    "activation_mib": ("activations, MiB", 3),
    "saved_mib": ("saved, MiB", 3),
    "paper_gmacs": ("paper's GMAC a step", 3),
    "graph_gmacs": ("our graphs' GMAC a step", 3),
    "angle_deg": ("angle to BP's gradient, degrees", 1),
    "start_angle_deg": ("angle with the first weights, degrees", 1),
    "worst_angle_deg": ("largest angle of a batch", 1),
    "step_ms": ("step, ms", 1),
    "ratio_to_lance": ("step, times LANCE's", 2),
    "least_cosine": ("least cosine to the gradient", 3),
    "ascents_percent": ("first directions that ascend, %", 2),
    "rises_percent": ("steps in which the loss rises, %", 1),
    "worst_error": ("worst relative error", 1),
    "loss_ratio": ("loss, first = 1", 4),
    "loss_change_percent": ("loss after one step, change in %", 4),
}
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One number of one cell; a row of `<claim>.csv`.

    Attributes:
        quantity: `activation_mib` and `saved_mib` are means over the steps of a run, in figure 5 the largest of
            a benchmark, as in reports; with HOSVD, whose ranks change from step to step, the two differ.
        layers: trained layers without the head; `None` where that says nothing.
        setting: what else varies: `batch 4`, `ε 0.7`.
        measured: mean over the seeds; `None` where the cell could not be run, and `note` says why.
        spread: standard deviation over the seeds; `None` with one.
        relation: `is`, or `below` where a bound was published.
    """

    claim: str
    model: str
    dataset: str
    method: str
    layers: int | None
    setting: str
    quantity: str
    measured: float | None
    spread: float | None
    seeds: int
    published: float | None
    relation: str | None
    source: str | None
    note: str | None


@dataclass(frozen=True)
class Cell:
    """Whose numbers: all of a finding but the numbers."""

    claim: str
    model: str
    dataset: str
    method: str
    layers: int | None = None
    setting: str = ""

    def __str__(self) -> str:
        layers = "" if self.layers is None else f"{self.layers} layers"
        return " ".join(filter(None, (self.model, self.dataset, self.method, layers, self.setting)))

    def printed(self, quantity: str) -> Published | None:
        """What was published for it; `None` where nothing is at hand."""
        return published(self.claim, quantity, self.model, self.dataset, self.method, self.layers, self.setting)

    def found(self, quantity: str, values: Sequence[float], note: str | None = None) -> Finding:
        """The finding of one quantity, of which each seed gave a value; without any, `note` says why."""
        printed = self.printed(quantity)
        return Finding(
            **vars(self),
            quantity=quantity,
            measured=statistics.fmean(values) if values else None,
            spread=statistics.stdev(values) if len(values) > 1 else None,
            seeds=len(values),
            published=printed.value if printed else None,
            relation=printed.relation if printed else None,
            source=printed.source if printed else None,
            note=note,
        )


def comparable(findings: Iterable[Finding], study: object) -> tuple[list[Finding], list[str]]:
    """The findings without published numbers that this study cannot be compared with, and why not."""
    kept, reasons = [], dict[str, None]()
    for one in findings:
        cell = Cell(*(getattr(one, field.name) for field in fields(Cell)))
        printed = cell.printed(one.quantity)
        differences = printed.differences(study) if printed else []
        reasons.update(dict.fromkeys(differences))
        kept.append(replace(one, published=None, relation=None, source=None) if differences else one)
    return kept, list(reasons)


def by_pair(findings: Iterable[Finding], title: str) -> dict[str, list[Finding]]:
    """The findings of each network and data set, by their picture's title; it names both if there are more."""
    pairs: dict[tuple[str, str], list[Finding]] = {}
    for one in findings:
        pairs.setdefault((one.model, one.dataset), []).append(one)
    return {title if len(pairs) == 1 else f"{title}, {', '.join(pair)}": own for pair, own in pairs.items()}


def write_csv(path: Path, findings: Iterable[Finding]) -> None:
    """Write all findings, atomically."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns(Finding))
    writer.writerows(cells(finding) for finding in findings)
    with atomic_writer(path) as file:
        file.write(buffer.getvalue().encode())


def markdown_table(findings: Sequence[Finding]) -> str:
    """A row for each cell, a column for each quantity: `measured (published)`, `-` where there is none."""
    quantities = [name for name in QUANTITIES if any(one.quantity == name for one in findings)]
    rows: dict[tuple[str, ...], dict[str, Finding]] = {}
    for one in findings:
        layers = "" if one.layers is None else str(one.layers)
        key: tuple[str, ...] = (one.model, one.dataset, one.method, layers, one.setting)
        rows.setdefault(key, {})[one.quantity] = one
    heads = ["network", "images", "method", "layers", "setting"]
    used = [index for index in range(len(heads)) if any(key[index] for key in rows)]
    lines = [[heads[index] for index in used] + [QUANTITIES[name][0] for name in quantities] + ["note"]]
    for key, found in rows.items():
        notes = dict.fromkeys(one.note for one in found.values() if one.note)
        texts = [cell_text(found[name]) if name in found else "-" for name in quantities]
        lines.append([key[index] for index in used] + texts + ["; ".join(notes)])
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def cell_text(finding: Finding) -> str:
    """`75.20 ± 0.31 (75.85)`; `not run (75.85)`."""
    digits = QUANTITIES[finding.quantity][1]
    if finding.measured is None:
        text = "not run"
    elif finding.quantity == "worst_error":
        text = f"{finding.measured:.{digits}e}"
    else:
        text = f"{finding.measured:.{digits}f}"
    if finding.spread is not None:
        text += f" ± {finding.spread:.{digits}f}"
    if finding.published is not None:
        text += f" ({'< ' if finding.relation == 'below' else ''}{finding.published:g})"
    return text


def caption(findings: Sequence[Finding], differences: Sequence[str] = ()) -> str:
    """What the brackets are, and what is not in them; a claim without published numbers says so.

    Args:
        differences: to the published study, for which numbers were left out.
    """
    left_out = f"Published numbers are left out where they cannot be compared ({'; '.join(differences)})."
    if any(finding.published is not None for finding in findings):
        text = f"In brackets what was published: {source()}: all images, 50 epochs."
        return f"{text} {left_out}" if differences else text
    if differences:
        return f"{left_out} Source: {source()}."
    return f"No published number of this claim is at hand ({source()})."
