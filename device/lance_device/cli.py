"""The command line of the device: the only module here that prints or exits.

Heavy modules are imported within the commands, so that `--help` answers at once and a machine without
onnxruntime gets one clear line instead of an import error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from lance_device.bench_cli import bench, bench_worker
from lance_device.cli_types import (
    Commands,
    Number,
    auto_or_count,
    byte_count,
    class_weights,
    minutes_or_steps,
)
from lance_edge.errors import DataError

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
PATH = click.Path(path_type=Path)
PARTS = ("test", "validation", "train")
AUTO: dict[str, Any] = {"default": "auto", "metavar": "auto|N", "callback": auto_or_count}


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="lance-edge", prog_name="lance-device")
def main() -> None:
    """Train and use image classifiers on this device, from a package that lance-host made.

    \b
    lance-device train --artifact pkg.tar --data photos --out run/
    lance-device predict --artifact pkg.tar --checkpoint run/last.npz new-photos/
    lance-device bench --artifact pkg.tar
    """


main.add_command(bench)
main.add_command(bench_worker)


@main.command()
@click.option("--artifact", type=PATH, required=True, help="Package of lance-host calibrate: pkg.tar.")
@click.option("--data", type=PATH, required=True, help="Folder with a folder of images per class, or an .npz.")
@click.option("--out", type=PATH, required=True, help="Folder for checkpoints and measurements: run/.")
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
    type=click.Choice(["cosine", "constant"]),
    default="cosine",
    help="Learning rate over the steps; cosine ends at 1 % of --lr.",
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
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of order and flips; moves no image.")
@click.option("--threads", **AUTO, help="auto: what the board advises, else its cores.")
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
@click.option("--resume", is_flag=True, help="Take up the run in --out; its options stay as they were.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@click.pass_context
def train(
    context: click.Context,
    /,
    artifact: Path,
    data: Path,
    out: Path,
    checkpoint_every: tuple[float | None, int | None],
    resume: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Train on the images in --data.

    \b
    lance-device train --artifact pkg.tar --data photos --out run/
    lance-device train --artifact pkg.tar --data photos --out run-bp/ --method bp --epochs 10 --lr 0.01

    Writes last.npz and best.npz (weights), steps.csv and summary.csv (time and memory per phase),
    history.csv (accuracy per epoch), split.csv (which image is in which part) and run.json. Ctrl-C keeps
    the last complete step; the same command with --resume goes on from there to the same weights, bit for
    bit. A batch is always full: images left over at the end of an epoch join the next. A cache of features
    lies in features.cache, or in --cache-dir, where later runs on the same images find it.
    """
    _require_runtime()
    from lance_device.live import Live, Silent
    from lance_device.run_setup import CheckpointEvery, TrainRequest
    from lance_device.text import result_table
    from lance_device.train import train as run_training

    minutes, steps = checkpoint_every
    given = {name for name in values if _is_given(context, name)}
    request = TrainRequest(
        artifact=artifact,
        data=data,
        out=out,
        values=values,
        given=frozenset(given),
        checkpoint_every=CheckpointEvery(steps, None if minutes is None else 60 * minutes),
        resume=resume,
        arguments=tuple(sys.argv[1:]),
    )
    result = run_training(request, Silent() if quiet else Live(sys.stderr))
    if not quiet:
        click.echo(result_table(result))


@main.command("eval")
@click.option("--artifact", type=PATH, required=True, help="The package that was trained from: pkg.tar.")
@click.option("--checkpoint", type=PATH, required=True, help="run/last.npz or run/best.npz.")
@click.option("--data", type=PATH, required=True, help="Folder with a folder of images per class, or an .npz.")
@click.option("--part", type=click.Choice(PARTS), default="test", help="Which of the images.")
@click.option("--threads", **AUTO, help="auto: the cores of this machine.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: 8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate_command(
    artifact: Path,
    checkpoint: Path,
    data: Path,
    part: str,
    threads: int | None,
    micro_batch: int | None,
    as_json: bool,
) -> None:
    """Accuracy, overall and per class, and loss of a checkpoint.

    \b
    lance-device eval --artifact pkg.tar --checkpoint run/best.npz --data photos
    """
    _require_runtime()
    from lance_device.classifier import from_package
    from lance_device.evaluate import evaluate, on_images
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores
    from lance_device.text import evaluation_json, evaluation_table
    from lance_edge.bundle import Bundle
    from lance_edge.datasets import open_dataset

    with Bundle(artifact) as bundle:
        classifier = from_package(bundle, checkpoint, threads or available_cores())
        dataset = open_dataset(data, bundle.manifest.split, bundle.manifest.classes)
    images = getattr(dataset, part)
    size = micro_batch or DEFAULT_MICRO_BATCH
    result = evaluate(on_images(classifier.logits, classifier.preprocessing), images, size)
    if result is None:
        raise DataError(f"{data}: the {part} part has no images; choose another --part")
    if as_json:
        click.echo(json.dumps(evaluation_json(result, classifier.classes, part), ensure_ascii=False))
    else:
        click.echo(evaluation_table(result, classifier.classes, part))


@main.command()
@click.option("--artifact", type=PATH, help="The package that was trained from: pkg.tar.")
@click.option("--checkpoint", type=PATH, help="run/last.npz or run/best.npz.")
@click.option("--model", type=PATH, help="Instead of these two: an ONNX model of lance-host merge.")
@click.option("--top", type=click.IntRange(min=1), default=3, help="Likeliest classes to print.")
@click.option("--threads", **AUTO, help="auto: the cores of this machine.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: 8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list with an entry for each file.")
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILES_OR_FOLDERS...")
def predict(
    artifact: Path | None,
    checkpoint: Path | None,
    model: Path | None,
    top: int,
    threads: int | None,
    micro_batch: int | None,
    as_json: bool,
    files: tuple[Path, ...],
) -> None:
    """Classify image files, and all images in folders.

    \b
    lance-device predict --artifact pkg.tar --checkpoint run/last.npz photo.jpg more-photos/
    lance-device predict --model finetuned.onnx photo.jpg --json
    """
    is_package = artifact is not None and checkpoint is not None
    if (model is None) != is_package or (model is not None and (artifact or checkpoint)):
        raise click.UsageError("give --artifact and --checkpoint, or --model alone")
    _require_runtime()
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores
    from lance_device.predict import predict as classify
    from lance_device.text import prediction_json, prediction_line

    classifier = _open_classifier(artifact, checkpoint, model, threads or available_cores())
    predictions = classify(classifier, files, top, micro_batch or DEFAULT_MICRO_BATCH)
    if as_json:
        entries = [prediction_json(prediction) for prediction in predictions]
        click.echo(json.dumps(entries, ensure_ascii=False, indent=1))
    else:
        for prediction in predictions:
            click.echo(prediction_line(prediction))


@main.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUNS...")
def compare(runs: tuple[Path, ...]) -> None:
    """Finished runs side by side: accuracy, memory, time of each phase.

    \b
    lance-device compare run-lance/ run-bp/
    """
    from lance_device.compare import comparison_table

    click.echo(comparison_table(runs))


def _open_classifier(artifact: Path | None, checkpoint: Path | None, model: Path | None, threads: int) -> Any:
    from lance_device.classifier import from_onnx, from_package
    from lance_edge.bundle import Bundle

    if artifact is None or checkpoint is None:
        return from_onnx(model or Path(), threads)
    with Bundle(artifact) as bundle:
        return from_package(bundle, checkpoint, threads)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _require_runtime() -> None:
    from lance_device.session import require_runtime

    require_runtime()


if __name__ == "__main__":
    main()
