"""The command `lance-device bench`, and the hidden one that its processes run."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import click

from lance_device.cli_common import AUTO, PATH
from lance_edge.counts import parse_counts


def _counts(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    counts = parse_counts(text)
    if not counts:
        raise click.BadParameter(f"expected counts such as 4, 1-10 or 1,2,4,8, found {text!r}")
    return counts


def _sizes(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    counts = _counts(context, option, text)
    if counts is not None and counts[0] < 1:
        raise click.BadParameter("expected whole numbers from 1, found 0")
    return counts


def _names(context: click.Context, option: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise click.BadParameter("expected names such as lance,bp, found none")
    return names


@click.command()
@click.option("--artifact", type=PATH, required=True, help="Package of lance-host calibrate: pkg.tar.")
@click.option("--data", type=PATH, help="Images to train on.  [default: generated ones, which cost no reading]")
@click.option("--out", type=PATH, help="Folder for the measurements.  [default: bench-<time>/]")
@click.option(
    "--methods", callback=_names, metavar="NAMES", help="Of lance,bp,asi,hosvd.  [default: all in the package]"
)
@click.option(
    "--layers", callback=_counts, metavar="COUNTS", help="1-10, or 2,4.  [default: all in the package]"
)
@click.option(
    "--micro-batch",
    "micro_batches",
    callback=_sizes,
    metavar="COUNTS",
    help="8, or several: 1,2,4,8,16.  [default: what the board advises]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="That the package must be for.  [default: whatever it is]"
)
@click.option("--steps", type=click.IntRange(min=1), default=3, help="Measured steps of a trial.")
@click.option("--trials", type=click.IntRange(min=1), default=3, help="Processes for each setting.")
@click.option("--warmups", type=click.IntRange(min=0), default=1, help="Steps before them, kept and flagged.")
@click.option("--threads", **AUTO, help="auto: what the board advises, else its cores.")
@click.option(
    "--board", default="auto", metavar="auto|NAME", help="Whose advice: rpi3b-plus, rpi4, rpi5, generic."
)
@click.option(
    "--cache",
    type=click.Choice(["on", "off"]),
    default="off",
    help="on: measured steps read the frozen part's features from disk, as later epochs of a training run do.",
)
@click.option("--quiet", is_flag=True, help="Say nothing but the table and errors.")
def bench(out: Path | None, quiet: bool, cache: str, **values: Any) -> None:
    """Measure training steps: time of every phase and peak memory, methods side by side.

    \b
    lance-device bench --artifact pkg.tar
    lance-device bench --artifact pkg.tar --micro-batch 1,2,4,8,16,32
    lance-device bench --artifact bench.tar --layers 1-10 --steps 5 --trials 5 --cache on

    Every setting is measured in processes of its own, in turns with the others; a step reads, computes and
    updates like one of training, on the same batch each time. Writes steps.csv (a row for each phase of each
    step), summary.csv (a row for each phase of each setting, with the ratio of its median to that of LANCE) and
    run.json. Ctrl-C keeps what was measured. bench.tar is a package of several layer counts, see
    lance-host calibrate --layers 1-10 --methods all.
    """
    from lance_device.bench import bench as run_bench
    from lance_device.bench_plan import BenchRequest
    from lance_device.bench_report import bench_table
    from lance_device.live import Live, Silent
    from lance_device.session import require_runtime

    require_runtime()
    folder = out or Path(f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    request = BenchRequest(out=folder, cached=cache == "on", arguments=tuple(sys.argv[1:]), **values)
    result = run_bench(request, Silent() if quiet else Live(sys.stderr))
    click.echo(bench_table(result.summary))
    for text in (*result.warnings, *(f"not measured: {failure}" for failure in result.failures)):
        click.echo(f"warning: {text}", err=True)
    if not quiet:
        click.echo(f"\nwrote {folder}/steps.csv, summary.csv, run.json")


@click.command("bench-worker", hidden=True)
@click.argument("job", type=PATH)
@click.argument("rows", type=PATH)
def bench_worker(job: Path, rows: Path) -> None:
    """Measure one setting; `lance-device bench` starts this."""
    from lance_device.bench_job import Job, work
    from lance_edge.records import from_json

    work(from_json(Job, json.loads(job.read_text())), rows)
