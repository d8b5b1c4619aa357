"""The accuracy matrix as a heatmap, and ACC over the tasks as curves."""

import importlib.util
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lance_edge.files import atomic_writer
from lance_host.continual_benchmark.records import Settings, TaskRecord, read_records

HEATMAP, CURVES = "heatmap.png", "curves.png"
DOTS_PER_INCH = 120
COLUMNS = 3  # of heatmaps


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_figures(folder: Path, settings: Settings) -> None:
    """Write `heatmap.png` and `curves.png` of the methods that learn one task after the other.

    Raises:
        StorageError: if they cannot be written.
    """
    means = {method: mean_rows(records) for method, records in read_records(folder).items()}
    drawn = {method: rows for method, rows in means.items() if rows}
    if drawn:
        _write(folder / HEATMAP, _heatmaps(drawn, len(settings.tasks)))
        _write(folder / CURVES, _curves(drawn))


def mean_rows(records: Sequence[TaskRecord]) -> list[list[float]]:
    """The rows R[i, :i + 1] of the accuracy matrix in percent, each the mean over the seeds that came so far.

    Nothing for a method that learns all tasks at once.
    """
    rows = []
    for after in range(1 + max(record.after for record in records)):
        own = [record.accuracies for record in records if record.after == after]
        if not own:
            return []
        rows.append([100 * statistics.fmean(values) for values in zip(*own, strict=True)])
    return rows


def _heatmaps(means: dict[str, list[list[float]]], tasks: int) -> Any:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(means))
    lines = -(-len(means) // columns)
    figure = Figure(figsize=(1.5 + 0.45 * tasks * columns + columns, (0.45 * tasks + 1.2) * lines))
    for number, (method, rows) in enumerate(means.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        full = [row + [float("nan")] * (tasks - len(row)) for row in rows]
        axes.imshow(full, vmin=0, vmax=100, cmap="viridis")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                axes.text(
                    j,
                    i,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 60 else "black",
                )
        axes.set_xticks(range(tasks), range(1, tasks + 1))
        axes.set_yticks(range(len(rows)), range(1, len(rows) + 1))
        axes.set(title=method, xlabel="accuracy on task (%)", ylabel="after task")
    return figure


def _curves(means: dict[str, list[list[float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for method, rows in means.items():
        axes.plot(range(1, len(rows) + 1), [statistics.fmean(row) for row in rows], marker="o", label=method)
    axes.set(xlabel="tasks learnt", ylabel="mean accuracy on them (%)")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def _write(path: Path, figure: Any) -> None:
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DOTS_PER_INCH)
    with atomic_writer(path) as file:
        file.write(data.getvalue())
