"""The command line of the device: only the modules called cli print or exit.

Heavy modules are imported within the commands, so that `--help` answers at once and a machine without
onnxruntime gets one clear line instead of an import error.
"""

import json
from pathlib import Path
from typing import Any

import click

from lance_device.bench_cli import bench, bench_worker
from lance_device.cli_board import doctor, install_service
from lance_device.cli_common import (
    AUTO,
    PATH,
    SIGNATURE,
    THREADS,
    check_signature,
    require_runtime_within_memory,
    tell_of_others,
)
from lance_device.cli_tasks import collect, next_task
from lance_device.cli_train import train
from lance_device.cli_types import Commands
from lance_device.cli_watch import watch
from lance_edge.errors import CheckpointError, DataError

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
RUN = click.option(
    "--run", type=PATH, help="A folder of tasks (train --tasks), instead of package and checkpoint."
)
TASK = click.option("--task", metavar="NAME|NUMBER", help="Whose head answers, where several were learnt.")
PARTS = ("test", "validation", "train")


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="lance-edge", prog_name="lance-device")
def main() -> None:
    """Train and use image classifiers on this device, from a package that lance-host made.

    \b
    lance-device train --artifact pkg.tar --data photos --out run/
    lance-device predict --artifact pkg.tar --checkpoint run/last.npz new-photos/
    lance-device bench --artifact pkg.tar

    \b
    Exit codes: 0 done; 2 no such option, or a value of no use; 3 package, 4 checkpoint, 5 data, 6 network
    or 8 disk cannot be used, or not with these options; 7 the numbers ran away; 9 this machine cannot;
    130 stopped, go on with --resume; 1 anything else.
    """


main.add_command(train)
main.add_command(watch)
main.add_command(bench)
main.add_command(bench_worker)
main.add_command(collect)
main.add_command(next_task)
main.add_command(doctor)
main.add_command(install_service)


@main.command("eval")
@RUN
@click.option("--artifact", type=PATH, help="The package that was trained from: pkg.tar.")
@click.option("--checkpoint", type=PATH, help="run/last.npz or run/best.npz.")
@click.option("--data", type=PATH, help="Folder with a folder of images per class, or an .npz.")
@TASK
@click.option("--part", type=click.Choice(PARTS), default="test", help="Which of the images.")
@click.option("--threads", **THREADS, help="auto: the cores of this machine.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: 8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--strict", is_flag=True, help="Refuse images that cannot be read, instead of leaving them out.")
@SIGNATURE
def evaluate_command(
    run: Path | None,
    artifact: Path | None,
    checkpoint: Path | None,
    data: Path | None,
    task: str | None,
    part: str,
    threads: int | None,
    micro_batch: int | None,
    as_json: bool,
    strict: bool,
    public_key: Path | None,
) -> None:
    """Accuracy, overall and per class, and loss of a checkpoint.

    \b
    lance-device eval --artifact pkg.tar --checkpoint run/best.npz --data photos
    lance-device eval --run tasks/ --task animals

    Without --task, of the task that was trained last.
    """
    require_runtime_within_memory()
    if run is not None:
        artifact, checkpoint, images_of = _in_folder(run, artifact, checkpoint, task)
        data = data or images_of
    if artifact is None or checkpoint is None or data is None:
        raise click.UsageError("give --artifact, --checkpoint and --data, or --run of a folder of tasks")
    from lance_device.classifier import from_package
    from lance_device.evaluate import evaluate, on_images, open_labelled
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores
    from lance_device.text import evaluation_json, evaluation_table
    from lance_edge.bundle import Bundle
    from lance_edge.other_files import of_data
    from lance_edge.screening import find_bad, refuse, without

    signed = check_signature(artifact, public_key)
    with Bundle(artifact, signed) as bundle:
        classifier = from_package(bundle, checkpoint, threads or available_cores(), task)
        dataset = open_labelled(data, bundle.manifest, classifier.classes)
    skipped = find_bad(dataset, available_cores(), (part,))
    if strict:
        refuse(data, skipped)
    tell_of_others(of_data(data))
    for row in skipped:
        _warn(row.name, row.reason)
    images = getattr(without(dataset, {row.name for row in skipped}), part)
    size = micro_batch or DEFAULT_MICRO_BATCH
    result = evaluate(on_images(classifier.logits, classifier.preprocessing), images, size)
    if result is None:
        raise DataError(f"{data}: the {part} part has no images; choose another --part")
    if as_json:
        click.echo(json.dumps(evaluation_json(result, classifier.classes, part), ensure_ascii=False))
    else:
        click.echo(evaluation_table(result, classifier.classes, part))


@main.command()
@RUN
@click.option("--artifact", type=PATH, help="The package that was trained from: pkg.tar.")
@click.option("--checkpoint", type=PATH, help="run/last.npz or run/best.npz.")
@click.option("--model", type=PATH, help="Instead of these two: an ONNX model of lance-host merge.")
@TASK
@click.option("--top", type=click.IntRange(min=1), default=3, help="Likeliest classes to print.")
@click.option("--threads", **THREADS, help="auto: the cores of this machine.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: 8.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list with an entry for each image.")
@click.option("--strict", is_flag=True, help="End at the first image that cannot be read.")
@SIGNATURE
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILES_OR_FOLDERS...")
def predict(
    run: Path | None,
    artifact: Path | None,
    checkpoint: Path | None,
    model: Path | None,
    task: str | None,
    top: int,
    threads: int | None,
    micro_batch: int | None,
    as_json: bool,
    strict: bool,
    public_key: Path | None,
    files: tuple[Path, ...],
) -> None:
    """Classify image files, and all images in folders.

    \b
    lance-device predict --artifact pkg.tar --checkpoint run/last.npz photo.jpg more-photos/
    lance-device predict --model finetuned.onnx photo.jpg --json

    An image that cannot be read is left out, with a warning: the exit code is 0 if any could be classified,
    else 5 (--strict: at the first one).

    Where the package has learnt several tasks and no --task is given, the head that is surest of its first
    class answers. No head knows what it does not know, so this is a guess: give the task where it is known.
    """
    if run is not None:
        artifact, checkpoint, _ = _in_folder(run, artifact, checkpoint, None)
    is_package = artifact is not None and checkpoint is not None
    if (model is None) != is_package or (model is not None and (artifact or checkpoint)):
        raise click.UsageError("give --artifact and --checkpoint, or --model alone, or --run")
    if model is not None and task is not None:
        raise click.UsageError("--task is of a package; an exported model has one head")
    require_runtime_within_memory()
    from lance_device.classifier import AllHeads
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores
    from lance_device.predict import predict as classify
    from lance_device.predict import predict_by_confidence
    from lance_device.text import prediction_json, prediction_line
    from lance_edge.other_files import of_folders

    signed = check_signature(artifact or model or Path(), public_key)
    network = _open_network(artifact, checkpoint, model, task, threads or available_cores(), signed)
    tell_of_others(of_folders(files))
    size, on_bad = micro_batch or DEFAULT_MICRO_BATCH, None if strict else _warn_of_image
    if isinstance(network, AllHeads):
        predictions = predict_by_confidence(network, files, top, size, on_bad)
    else:
        predictions = classify(network, files, top, size, on_bad)
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


def _warn_of_image(name: str, error: DataError) -> None:
    _warn(name, error.reason)


def _warn(name: str, reason: str) -> None:
    click.echo(f"warning: {name} is left out ({reason})", err=True)


def _in_folder(
    run: Path, artifact: Path | None, checkpoint: Path | None, task: str | None
) -> tuple[Path, Path, Path]:
    """Package and checkpoint of the last finished task in a folder of tasks, and where a task's images are."""
    from lance_device.task_folder import TaskFolder, find_place

    if artifact is not None or checkpoint is not None:
        raise click.UsageError("--run says --artifact and --checkpoint; leave them out")
    places = TaskFolder(run).learned()
    if not places:
        raise CheckpointError(
            f"{run}: no finished task here; give a folder that lance-device train --tasks made"
        )
    wanted = places[-1] if task is None else find_place(places, task, run)
    return places[-1].package, places[-1].checkpoint, Path(wanted.record.data)


def _open_network(
    artifact: Path | None,
    checkpoint: Path | None,
    model: Path | None,
    task: str | None,
    threads: int,
    signed: str | None,
) -> Any:
    """A classifier, or where several tasks might be meant the heads of all."""
    from lance_device.classifier import all_heads, from_onnx, from_package
    from lance_edge.bundle import Bundle

    if artifact is None or checkpoint is None:
        return from_onnx(model or Path(), threads, signed)
    with Bundle(artifact, signed) as bundle:
        if task is None and bundle.manifest.tasks:
            return all_heads(bundle, checkpoint, threads)
        return from_package(bundle, checkpoint, threads, task)


if __name__ == "__main__":
    main()
