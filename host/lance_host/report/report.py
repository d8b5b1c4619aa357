"""The main path of `lance-host report`."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_edge.errors import DataError
from lance_edge.files import atomic_writer
from lance_edge.report.content import compose
from lance_edge.report.folders import open_views
from lance_edge.report.page import render
from lance_host.report.data import write_csv, write_png
from lance_host.report.draw import svg
from lance_host.report.package import package_section


@dataclass(frozen=True)
class ReportRequest:
    """What is asked for; of the three outputs those that are named are written."""

    folders: tuple[Path, ...]
    artifact: Path | None = None
    output: Path | None = None
    csv_folder: Path | None = None
    png_folder: Path | None = None


def report(request: ReportRequest) -> Sequence[Path]:
    """Write the page, the data or the pictures; gives what was written.

    Raises:
        DataError: if a folder has no run, or something in it cannot be read.
        ArtifactError: if the package that was named cannot be read.
        StorageError: if something cannot be written.
    """
    _expect_no_collision(request)
    left_out: list[str] = []
    views = open_views(request.folders, left_out.append)
    package, notices = package_section(views, request.artifact)
    now = datetime.datetime.now().astimezone().isoformat(" ", timespec="minutes")
    content = compose(views, now, package, (*left_out, *notices))
    written: list[Path] = []
    if request.output is not None:
        page = render(content, svg)
        with atomic_writer(request.output) as file:
            file.write(page.encode("utf-8", "replace"))
        written.append(request.output)
    if request.csv_folder is not None:
        written += write_csv(content, request.csv_folder)
    if request.png_folder is not None:
        written += write_png(content, request.png_folder)
    return written


def _expect_no_collision(request: ReportRequest) -> None:
    """CSV files of a report in the folder of a run would be taken for its measurements, or replace them."""
    runs = {folder.resolve() for folder in request.folders}
    if request.csv_folder is not None and request.csv_folder.resolve() in runs:
        raise DataError(f"--csv {request.csv_folder}: is the folder of a run; choose one for the report alone")
