"""From records to what people read: rows, matrices, a table beside published values, figures.

`results.csv` and `summary.csv` hold what the computation gives, which does not depend on how often a benchmark
was broken off; `costs.csv` holds times.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_edge.accuracy_matrix import AccuracyMatrix, AfterTask, write_matrix
from lance_edge.files import atomic_writer
from lance_host.continual_benchmark.literature import PUBLISHED, PublishedValue
from lance_host.continual_benchmark.records import Settings, TaskRecord, read_records

RESULTS, SUMMARY, COSTS, TABLE = "results.csv", "summary.csv", "costs.csv", "table.md"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the sample, 0 of one) over seeds, in percent."""

    mean: float
    std: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.seeds > 1 else "")


@dataclass(frozen=True)
class MethodSummary:
    """A method over its complete seeds; `None` where a figure has no meaning (joint training forgets nothing).

    `kept_bytes` (beside the network) and `activation_bytes` are the largest of the last task over the seeds.
    """

    method: str
    seeds: int
    acc: Spread
    bwt: Spread | None
    learning_accuracy: Spread | None
    activation_bytes: int
    kept_bytes: int
    seconds: float


def write_results(folder: Path, settings: Settings) -> None:
    """Write every table anew from the records; figures too, where matplotlib is installed.

    Raises:
        StorageError: if they cannot be written.
        LanceError: if a record is damaged.
    """
    by_method = read_records(folder)
    records = [record for group in by_method.values() for record in group]
    _write_csv(
        folder / RESULTS,
        ("method", "seed", "after", "task", "accuracy", "epochs", "lr"),
        _result_rows(records, settings),
    )
    _write_csv(folder / COSTS, ("method", "seed", "task", "seconds"), _cost_rows(records))
    for matrix_folder, matrix in matrices(folder, by_method).items():
        write_matrix(matrix_folder / "accuracy_matrix.csv", matrix)
    summaries = summarise(by_method, len(settings.tasks))
    _write_csv(folder / SUMMARY, SUMMARY_COLUMNS, map(_summary_row, summaries))
    with atomic_writer(folder / TABLE) as file:
        file.write((summary_table(summaries, settings) + "\n").encode())


def matrices(folder: Path, by_method: dict[str, list[TaskRecord]]) -> dict[Path, AccuracyMatrix]:
    """The accuracy matrix of every run that learns one task after the other, by its folder."""
    found = {}
    for method, records in by_method.items():
        for seed in dict.fromkeys(record.seed for record in records):
            own = [record for record in records if record.seed == seed]
            if [record.after for record in own] == list(range(len(own))):
                found[folder / method / f"seed-{seed}"] = matrix_of(own)
    return found


def matrix_of(records: Sequence[TaskRecord]) -> AccuracyMatrix:
    """Of the records of one run, in the order of its tasks."""
    rows = (AfterTask(r.task, r.accuracies, r.ranks, r.kept_bytes) for r in records)
    return AccuracyMatrix(tuple(rows))


def summarise(by_method: dict[str, list[TaskRecord]], tasks: int) -> list[MethodSummary]:
    """Of every method with a seed that learnt all tasks."""
    return [s for method, records in by_method.items() if (s := _summarise(method, records, tasks)) is not None]


def _summarise(method: str, records: Sequence[TaskRecord], tasks: int) -> MethodSummary | None:
    last = [record for record in records if record.after == tasks - 1]
    if not last:
        return None
    runs = [[r for r in records if r.seed == end.seed] for end in last]
    complete = [matrix_of(run) for run in runs if len(run) == tasks]
    accs = [statistics.fmean(record.accuracies) for record in last]
    return MethodSummary(
        method=method,
        seeds=len(last),
        acc=spread(accs),
        bwt=spread([m.bwt for m in complete if m.bwt is not None]) if complete else None,
        learning_accuracy=spread([m.learning_accuracy or 0.0 for m in complete]) if complete else None,
        activation_bytes=max(record.activation_bytes for record in last),
        kept_bytes=max(record.bytes_beside for record in last),
        seconds=statistics.fmean(sum(record.seconds for record in run) for run in runs),
    )


def spread(fractions: Sequence[float]) -> Spread:
    """Of fractions, in percent."""
    percent = [100 * value for value in fractions]
    std = statistics.stdev(percent) if len(percent) > 1 else 0.0
    return Spread(statistics.fmean(percent), std, len(percent))


# --- files --------------------------------------------------------------------------------------------

SUMMARY_COLUMNS = (
    *("method", "seeds", "acc_mean", "acc_std", "bwt_mean", "bwt_std", "learning_accuracy_mean"),
    *("activation_bytes", "kept_bytes"),
)


def _summary_row(summary: MethodSummary) -> list[str]:
    pairs = [(spread.mean, spread.std) if spread else (None, None) for spread in (summary.acc, summary.bwt)]
    learning = summary.learning_accuracy.mean if summary.learning_accuracy else None
    numbers = [value for pair in pairs for value in pair] + [learning]
    texts = ["" if value is None else f"{value:.4f}" for value in numbers]
    return [summary.method, str(summary.seeds), *texts, str(summary.activation_bytes), str(summary.kept_bytes)]


def _result_rows(records: Iterable[TaskRecord], settings: Settings) -> Iterable[list[str]]:
    for record in records:
        for task, accuracy in zip(settings.tasks, record.accuracies, strict=False):
            yield [
                *(record.method, str(record.seed), record.task, task),
                *(f"{accuracy:.6f}", str(record.epochs), f"{record.lr:g}"),
            ]


def _cost_rows(records: Iterable[TaskRecord]) -> Iterable[list[str]]:
    for record in records:
        yield [record.method, str(record.seed), record.task, f"{record.seconds:.1f}"]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    with atomic_writer(path) as file:
        file.write(text.getvalue().encode())


# --- table --------------------------------------------------------------------------------------------


def summary_table(summaries: Sequence[MethodSummary], settings: Settings) -> str:
    """A table in Markdown, best ACC first, with the published ACC where this is that benchmark."""
    published = PUBLISHED.get((settings.benchmark, settings.network), {})
    rows = [
        "| method | seeds | ACC % | BWT % | learning accuracy % | activations | kept | published ACC % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(summaries, key=lambda summary: -summary.acc.mean):
        value = published.get(one.method)
        cells = (one.method, one.seeds, one.acc, one.bwt or "", one.learning_accuracy or "")
        sizes = (_mebibytes(one.activation_bytes), _mebibytes(one.kept_bytes))
        rows.append("| " + " | ".join(map(str, (*cells, *sizes, "" if value is None else value.acc))) + " |")
    if published:
        sources = dict.fromkeys(value.source for value in published.values())
        rows += ["", "Published: " + "; ".join(sources) + ".  Not run here: " + _others(published, summaries)]
    return "\n".join(rows)


def _others(published: Mapping[str, PublishedValue], summaries: Sequence[MethodSummary]) -> str:
    own = {summary.method for summary in summaries}
    return ", ".join(f"{name} {value.acc}" for name, value in published.items() if name not in own) or "none"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
