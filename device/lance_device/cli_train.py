"""The command `train`."""

import sys
from pathlib import Path
from typing import Any

import click

from lance_device.cli_common import (
    AUTO,
    PATH,
    SIGNATURE,
    THREADS,
    check_signature,
    require_runtime_within_memory,
)
from lance_device.cli_types import Number, byte_count, class_weights, minutes_or_steps
from lance_device.cli_watch import SERVE, serving_if_asked
from lance_device.niceness import be_nice


@click.command()
@click.option(
    "--artifact", type=PATH, help="Package of lance-host calibrate: pkg.tar; a folder of tasks has its own."
)
@click.option("--data", type=PATH, required=True, help="Folder with a folder of images per class, or an .npz.")
@click.option("--out", type=PATH, required=True, help="Folder for checkpoints and measurements: run/.")
@click.option("--tasks", is_flag=True, help="Make --out a folder of tasks, of which this is the first.")
@click.option(
    "--result",
    type=click.Choice(["auto", "last", "best"]),
    default="auto",
    help="In a folder of tasks: the checkpoint that the next task goes on from.  [auto: best with plateau]",
)
@click.option("--method", help="Method in the package: lance, bp.  [default: the package's first]")
@click.option(
    "--layers",
    type=click.IntRange(min=0),
    help="Train so many layers, where the package offers a choice.  [default: the most it has]",
)
@click.option("--epochs", type=click.IntRange(min=1), default=50, help="Times that every image is seen.")
@click.option("--steps", type=click.IntRange(min=1), help="Train so many batches, whatever --epochs says.")
@click.option("--lr", type=Number(min=0, min_open=True), default=0.05, help="Learning rate at the start.")
@click.option("--momentum", type=Number(min=0, max=1, max_open=True), default=0.9, help="Of SGD.")
@click.option("--weight-decay", type=Number(min=0), default=0.0, help="Of SGD, added to the gradient.")
@click.option("--clip", type=Number(min=0), default=2.0, help="Largest norm of all gradients; 0 is off.")
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant", "plateau"]),
    default="cosine",
    help="Learning rate over the steps; cosine ends at 1 % of --lr; plateau halves it when the validation loss"
    " falls no more.",
)
@click.option(
    "--patience", type=click.IntRange(min=1), default=6, help="Of plateau: epochs without a lower loss."
)
@click.option(
    "--min-lr",
    type=Number(min=0, min_open=True),
    default=1e-5,
    help="Of plateau: the run ends where --lr would fall below it.",
)
@click.option(
    "--augment",
    type=click.Choice(["auto", "flip", "none"]),
    default="auto",
    callback=lambda context, option, text: None if text == "auto" else text,
    help="Mirror half of the images; auto: of images, but not of arrays.",
)
@click.option(
    "--label-smoothing",
    type=Number(min=0, max=1, max_open=True),
    default=0.0,
    help="Share of the target that all classes divide.",
)
@click.option(
    "--class-weights",
    default="none",
    metavar="none|balanced|W1,W2,...",
    callback=class_weights,
    help="How much a sample of each class counts in the loss; balanced: each class as much as any other.",
)
@click.option(
    "--protect",
    metavar="MEMORY.NPZ|package",
    help="Keep off the subspaces that earlier tasks need: every gradient is projected (GPM). A file of"
    " lance-host memory, or what the package holds; for --method bp: the package's lance needs none.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of order and flips; moves no image.")
@click.option("--threads", **THREADS, help="auto: what the board advises, else its cores.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: what the board advises, 8.")
@click.option(
    "--board", default="auto", metavar="auto|NAME", help="Whose advice: rpi3b-plus, rpi4, rpi5, generic."
)
@click.option("--shuffle/--no-shuffle", default=True, help="A new order in every epoch.")
@click.option("--eval-every", type=click.IntRange(min=0), default=1, help="In epochs; 0: at the end only.")
@click.option(
    "--cache",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    help="Keep the features of the frozen part on disk (float16) instead of computing them in every epoch;"
    " auto: if images are seen more than once and there is room.",
)
@click.option(
    "--cache-size", default="1GiB", metavar="BYTES", callback=byte_count, help="Of the disk, for these at most."
)
@click.option(
    "--cache-dir", type=PATH, help="Folder of features that runs share.  [default: each run keeps its own]"
)
@click.option(
    "--checkpoint-every",
    default="5m",
    metavar="MINUTESm|STEPS",
    callback=minutes_or_steps,
    help="Write last.npz every 5m (minutes) or 200 (steps), and at the end or when stopped."
    " Seldom spares an SD card; a power cut costs at most this much training.",
)
@click.option(
    "--keep-every",
    type=click.IntRange(min=1),
    metavar="EPOCHS",
    help="Keep a copy of the state after every so many epochs: epoch-0010.npz.",
)
@click.option(
    "--on-nan",
    type=click.Choice(["stop", "skip", "halve-lr"]),
    default="stop",
    help="When a step's loss or gradients are no numbers: it is never applied; then stop with the state before"
    " it saved, go on with the next batch, or go on with half the learning rate.",
)
@click.option(
    "--memory-limit",
    metavar="BYTES",
    callback=byte_count,
    help="Stay below 200MiB, say: takes the largest --micro-batch that fits, or stops before it trains.",
)
@click.option(
    "--max-temp", type=Number(min=20, max=120), metavar="°C", help="Pause between steps above it, say 75."
)
@click.option(
    "--duty-cycle", type=Number(min=0, max=1, min_open=True), default=1.0, help="Share of the time to work."
)
@click.option("--nice", type=click.IntRange(0, 19), help="Let other programs go first: 0 to 19.")
@click.option("--strict", is_flag=True, help="Refuse images that cannot be read, instead of leaving them out.")
@click.option("--resume", is_flag=True, help="Take up the run in --out; its options stay as they were.")
@click.option("--resume-or-start", is_flag=True, help="The same if there is a run in --out, else begin one.")
@SIGNATURE
@SERVE
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def train(
    context: click.Context,
    /,
    artifact: Path | None,
    data: Path,
    out: Path,
    tasks: bool,
    result: str,
    checkpoint_every: tuple[float | None, int | None],
    keep_every: int | None,
    resume: bool,
    resume_or_start: bool,
    memory_limit: int | None,
    max_temp: float | None,
    duty_cycle: float,
    nice: int | None,
    strict: bool,
    protect: str | None,
    public_key: Path | None,
    serve: tuple[str, int] | None,
    quiet: bool,
    **values: Any,
) -> None:
    """Train on the images in --data.

    \b
    lance-device train --artifact pkg.tar --data photos --out run/
    lance-device train --artifact pkg.tar --data photos --out run-bp/ --method bp --epochs 10 --lr 0.01

    Writes last.npz and best.npz (weights; the best by validation accuracy, ties by validation loss),
    steps.csv and summary.csv (time and memory per phase), history.csv (accuracy per epoch), split.csv
    (which image is in which part) and run.json. Ctrl-C keeps the last complete step; the same command with
    --resume goes on from there to the same weights, bit for bit. A batch is always full: images left over
    at the end of an epoch join the next. A cache of features lies in features.cache, or in --cache-dir,
    where later runs on the same images find it.
    """
    expect_sense(context)
    given = {name for name in values if _is_given(context, name)}
    be_nice(nice)
    require_runtime_within_memory()
    from lance_device.live import Live, Silent
    from lance_device.pace import PaceOptions
    from lance_device.remeasure import remeasure
    from lance_device.run_setup import CheckpointEvery, TrainRequest
    from lance_device.task_folder import TaskFolder, open_place
    from lance_device.text import matrix_table, result_table
    from lance_device.train import train as run_training

    place = None
    if tasks or TaskFolder(out).has_tasks:
        chosen = result if result != "auto" else "best" if values["schedule"] == "plateau" else "last"
        place = open_place(out, artifact, data, chosen, takes_up=resume or resume_or_start)
        artifact, out = place.package, place.path
    if artifact is None:
        raise click.UsageError("--artifact is missing: the package of lance-host calibrate")
    signed = check_signature(artifact, public_key)
    minutes, steps = checkpoint_every
    request = TrainRequest(
        artifact=artifact,
        data=data,
        out=out,
        values=values,
        given=frozenset(given),
        checkpoint_every=CheckpointEvery(steps, None if minutes is None else 60 * minutes, keep_every or 0),
        resume=resume,
        arguments=tuple(sys.argv[1:]),
        resume_or_start=resume_or_start,
        memory_limit=memory_limit,
        strict=strict,
        pace=PaceOptions(max_temp, duty_cycle, nice),
        signed_sha256=signed,
        protect=protect,
    )
    reporter = Silent() if quiet else Live(sys.stderr)
    with serving_if_asked(serve, out, reporter.note):
        ended = run_training(request, reporter)
    if not quiet:
        click.echo(result_table(ended))
    if place is not None:
        matrix = remeasure(TaskFolder(place.path.parent), reporter.note)
        if not quiet:
            click.echo(matrix_table(matrix))


def expect_sense(context: click.Context) -> None:
    """See that options go together.

    Raises:
        UsageError: if not.
    """
    values = context.params
    if not (values["resume"] or values["resume_or_start"]):  # a resumed run keeps its options
        _check_schedule(values, {name for name in values if _is_given(context, name)})
    if values["cache"] == "off" and values["cache_dir"] is not None:
        raise click.UsageError("--cache-dir is for --cache on or auto; with --cache off nothing is kept")


def _check_schedule(values: dict[str, Any], given: set[str]) -> None:
    """What --schedule plateau needs, and what only it takes."""
    if values["schedule"] != "plateau":
        foreign = sorted(given & {"patience", "min_lr"})
        if foreign:
            raise click.UsageError(
                f"--{foreign[0].replace('_', '-')} is of --schedule plateau; give both or none"
            )
    elif values["eval_every"] != 1:
        raise click.UsageError("--schedule plateau looks at the loss after every epoch; leave out --eval-every")
    elif values["min_lr"] > values["lr"]:
        raise click.UsageError(
            f"--schedule plateau: --min-lr {values['min_lr']:g} is above --lr {values['lr']:g}; lower it"
        )


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
