"""The command `report`."""

import importlib.util
from pathlib import Path

import click

from lance_edge.errors import PlatformError

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="RUNS...")
@click.option(
    "-o", "--output", type=FOLDER, help="The page to write.  [default: report.html, unless --csv or --png]"
)
@click.option(
    "--artifact",
    type=FOLDER,
    help="The package, for ranks and spectra.  [default: the one that a run names, if it is found]",
)
@click.option("--csv", "csv_folder", type=FOLDER, metavar="DIR", help="Write the data of each figure as CSV.")
@click.option("--png", "png_folder", type=FOLDER, metavar="DIR", help="Write each figure as a picture.")
def report(
    folders: tuple[Path, ...],
    output: Path | None,
    artifact: Path | None,
    csv_folder: Path | None,
    png_folder: Path | None,
) -> None:
    """Show runs and benchmarks: one page with figures, tables and warnings, for a browser without a network.

    \b
    lance-host report run/ -o report.html
    lance-host report run-lance/ run-bp/ --artifact pkg.tar -o report.html
    lance-host report bench-out/ profiles/recorded/ -o benchmarks.html
    lance-host report run/ --csv data/ --png pictures/

    RUNS are --out folders of lance-device train and bench, folders of such folders, or CSV files copied from
    a board without their run.json. Ratios of times are taken within one machine only.
    """
    _require_matplotlib()
    from lance_edge.units import size
    from lance_host.report.report import ReportRequest
    from lance_host.report.report import report as write

    page = output or (None if csv_folder or png_folder else Path("report.html"))
    written = write(ReportRequest(folders, artifact, page, csv_folder, png_folder))
    for path in written:
        click.echo(f"wrote {path} ({size(path.stat().st_size)})")


def _require_matplotlib() -> None:
    """It came to the extra later than the rest of it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlatformError(
            "matplotlib not installed; lance-host report needs it: pip install 'lance-edge[host]'"
        )
