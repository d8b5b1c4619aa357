"""What a report shows, as files: a CSV or a PNG for each figure."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from lance_edge.files import atomic_writer
from lance_edge.report.page import Report
from lance_edge.report.plots import BarPlot, LinePlot, Plot
from lance_host.report.draw import png

Rows = Iterable[tuple[object, ...]]
BAND = ("band from", "band to")  # around a value: what it spans is in the figure's caption


def write_csv(report: Report, folder: Path) -> list[Path]:
    """A file for each figure, and for each table; values are plain, and their units stand in the headers.

    Raises:
        StorageError: if they cannot be written.
    """
    shown = (table for section in report.sections if section.plots for table in section.tables)
    tables = (*report.results, *shown)
    written = [
        _write_table(folder / f"{table.name}.csv", table.data, zip(*table.data.values(), strict=True))
        for table in tables
    ]
    for plot in _plots(report):
        header, rows = _bar_rows(plot) if isinstance(plot, BarPlot) else _line_rows(plot)
        written.append(_write_table(folder / f"{plot.name}.csv", header, rows))
    return written


def write_png(report: Report, folder: Path) -> list[Path]:
    """A picture for each figure.

    Raises:
        StorageError: if they cannot be written.
    """
    written = []
    for plot in _plots(report):
        path = folder / f"{plot.name}.png"
        with atomic_writer(path) as file:
            file.write(png(plot))
        written.append(path)
    return written


def _plots(report: Report) -> Iterator[Plot]:
    return (plot for section in report.sections for plot in section.plots)


def _line_rows(plot: LinePlot) -> tuple[tuple[str, ...], Rows]:
    header = ("series", plot.x_label, plot.y_label, *BAND)
    rows = []
    for line in plot.lines:
        low, high = (values or ("",) * len(line.x) for values in (line.low, line.high))
        rows += [(line.label or "rank", *values) for values in zip(line.x, line.y, low, high, strict=True)]
    return header, rows


def _bar_rows(plot: BarPlot) -> tuple[tuple[str, ...], Rows]:
    header = (
        plot.x_label,
        "bar",
        *(f"{part}: {plot.y_label}" for part in plot.part_names),
        *BAND,
    )
    return header, [
        (group.label, bar.label, *bar.parts, *(bar.spread or ("", "")))
        for group in plot.groups
        for bar in group.bars
    ]


def _write_table(path: Path, header: Iterable[str], rows: Rows) -> Path:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    with atomic_writer(path) as file:
        file.write(buffer.getvalue().encode())
    return path


def _cell(value: object) -> object:
    return "" if value is None else format(value, ".9g") if isinstance(value, float) else value
