"""The commands of learning task after task: `collect`, `next-task`."""

import sys
from pathlib import Path
from typing import Any, Literal

import click

from lance_device.cli_common import (
    AUTO,
    PATH,
    SIGNATURE,
    THREADS,
    check_signature,
    end_cleanly_on_signals,
    require_runtime_within_memory,
)
from lance_device.cli_types import Number, byte_count
from lance_edge.names import MEMORY_BATCHES, PROJECTION_BATCHES, task_name_after
from lance_edge.units import count

PASS_MEMORY = click.option(
    "--pass-memory",
    default="128MiB",
    metavar="BYTES",
    callback=byte_count,
    help="For second moments at a time; what does not fit takes another pass over the images.",
)


@click.command()
@click.option("--artifact", type=PATH, required=True, help="The package that was trained from: pkg.tar.")
@click.option("--checkpoint", type=PATH, required=True, help="run/last.npz or run/best.npz.")
@click.option("--data", type=PATH, required=True, help="Images of the finished task, or of the next one.")
@click.option("-o", "--output", type=PATH, default=Path("stats.npz"), help="The file to write.")
@click.option("--task", metavar="NAME", help="What the images are of.  [default: after --data]")
@click.option(
    "--memory",
    type=PATH,
    help="memory.npz of all finished tasks: measures what the projections of a next task need, outside of it."
    "  [default: only what a memory is made of]",
)
@click.option(
    "--mode",
    type=click.Choice(["patch", "channel"]),
    help="Of a convolution's input: what filters read, or channels.  [default: as --memory, else patch]",
)
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    help=f"Of images at most.  [default: {MEMORY_BATCHES}, with --memory {PROJECTION_BATCHES}, as on the"
    " workstation]",
)
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the images.  [default: the package's]")
@PASS_MEMORY
@click.option("--threads", **THREADS, help="auto: the cores of this machine.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: 8.")
@click.option("--strict", is_flag=True, help="Refuse images that cannot be read, instead of leaving them out.")
@SIGNATURE
def collect(
    artifact: Path,
    checkpoint: Path,
    data: Path,
    output: Path,
    task: str | None,
    memory: Path | None,
    mode: Literal["patch", "channel"] | None,
    batches: int | None,
    seed: int | None,
    pass_memory: int,
    threads: int | None,
    micro_batch: int | None,
    strict: bool,
    public_key: Path | None,
) -> None:
    """Second moments of the trained layers' inputs, and nothing else, for the workstation.

    \b
    lance-device collect --artifact pkg.tar --checkpoint run/last.npz --data animals -o stats.npz
    lance-host memory --artifact pkg.tar --checkpoint last.npz --stats stats.npz -o memory.npz

    The workstation protects a finished task without seeing an image. With --memory and the images of the next
    task, lance-host calibrate --stats makes its package as well. The second moments of few images can show
    what those images show: collect from many, and treat the file as you treat the images.
    """
    require_runtime_within_memory()
    end_cleanly_on_signals()
    from lance_device.collect import CollectRequest
    from lance_device.collect import collect as run_collect
    from lance_device.moments_pass import PassOptions
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores

    check_signature(artifact, public_key)
    options = PassOptions(
        threads=threads or available_cores(),
        micro_batch=micro_batch or DEFAULT_MICRO_BATCH,
        limit_bytes=pass_memory,
        mode=mode,
        progress=_show_progress(),
    )
    request = CollectRequest(
        artifact,
        checkpoint,
        data,
        output,
        task or task_name_after(data),
        options,
        memory,
        batches,
        seed,
        strict,
    )
    found = run_collect(request, lambda text: click.echo(text, err=True))
    click.echo(
        f"{output}: second moments of {count(len(found.layers), 'layer')} from"
        f" {count(found.batches, 'batch')} of {count(found.batch_size, 'image')}"
    )


def _show_progress() -> "_Progress":
    return _Progress(sys.stderr.isatty())


class _Progress:
    """A line that counts batches, on a terminal."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown

    def __call__(self, done: int, of: int) -> None:
        """Say it."""
        if self._is_shown:
            click.echo(f"\rbatch {done} of {of}", nl=done == of, err=True)


@click.command("next-task")
@click.option(
    "--run", type=PATH, help="A folder of tasks (train --tasks): says all but the next task's images."
)
@click.option("--artifact", type=PATH, help="The package of the finished task.")
@click.option("--checkpoint", type=PATH, help="Its run/last.npz or run/best.npz.")
@click.option("--data", type=PATH, help="The finished task's images.  [default: with --run, where they were]")
@click.option("--next-data", type=PATH, required=True, help="The next task's images; any classes.")
@click.option("-o", "--output", type=PATH, help="The next task's package to write.")
@click.option("--task", metavar="NAME", help="The next task's name.  [default: after --next-data]")
@click.option(
    "--threshold",
    type=Number(min=0, min_open=True, max=1),
    help="Share of the finished task's energy to protect.  [default: 0.97, and 0.003 more for each before]",
)
@click.option(
    "--energy",
    type=Number(min=0, min_open=True, max=1),
    default=0.98,
    help="Share of what the next task has outside of it that its projections keep.",
)
@click.option(
    "--memory-batches",
    type=click.IntRange(min=1),
    default=MEMORY_BATCHES,
    help="Of the finished task's images.",
)
@click.option(
    "--batches", type=click.IntRange(min=1), default=PROJECTION_BATCHES, help="Of the next task's images."
)
@PASS_MEMORY
@click.option("--threads", **THREADS, help="auto: the cores of this machine.")
@click.option("--micro-batch", **AUTO, help="Images in memory at a time; auto: 8.")
@click.option("--strict", is_flag=True, help="Refuse images that cannot be read, instead of leaving them out.")
@SIGNATURE
def next_task(
    run: Path | None,
    artifact: Path | None,
    checkpoint: Path | None,
    data: Path | None,
    output: Path | None,
    next_data: Path,
    task: str | None,
    pass_memory: int,
    threads: int | None,
    micro_batch: int | None,
    public_key: Path | None,
    **values: Any,
) -> None:
    """Protect a finished task, and make the next task's package, without a workstation.

    \b
    lance-device train --artifact pkg.tar --data animals --out tasks/ --tasks
    lance-device next-task --run tasks/ --next-data plants
    lance-device train --data plants --out tasks/

    The first package comes from lance-host calibrate --mode patch --any-rank. The new one keeps the heads of
    all tasks (eval --task, predict) and the memory of what they need, which training leaves alone.
    """
    require_runtime_within_memory()
    end_cleanly_on_signals()
    from lance_device.moments_pass import PassOptions
    from lance_device.next_task import NextTaskRequest, continue_folder
    from lance_device.next_task import next_task as make_next_task
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores
    from lance_device.task_folder import TaskFolder
    from lance_device.text import next_task_table

    name = task or task_name_after(next_data)
    options = PassOptions(
        threads=threads or available_cores(),
        micro_batch=micro_batch or DEFAULT_MICRO_BATCH,
        limit_bytes=pass_memory,
        progress=_show_progress(),
    )
    places = _places(run, artifact, checkpoint, data, output)
    check_signature(places["artifact"], public_key)
    request = NextTaskRequest(**places, next_data=next_data, task=name, options=options, **values)

    def note(text: str) -> None:
        click.echo(text, err=True)

    if run is None:
        click.echo(next_task_table(make_next_task(request, note)))
        click.echo(f"wrote {request.output}")
    else:
        place, made = continue_folder(TaskFolder(run), request, note)
        click.echo(next_task_table(made))
        click.echo(f"wrote {place.package}; go on with: lance-device train --out {run} --data {next_data}")


def _places(
    run: Path | None, artifact: Path | None, checkpoint: Path | None, data: Path | None, output: Path | None
) -> dict[str, Any]:
    """Package, checkpoint and images of the finished task, and where the next package goes."""
    from lance_device.task_folder import TaskFolder

    if run is None:
        if artifact is None or checkpoint is None or data is None or output is None:
            raise click.UsageError("give --run, or --artifact, --checkpoint, --data and --output")
        return {"artifact": artifact, "checkpoint": checkpoint, "data": data, "output": output}
    if artifact is not None or checkpoint is not None or output is not None:
        raise click.UsageError("--run says --artifact, --checkpoint and --output; leave them out")
    place = TaskFolder(run).current()
    return {
        "artifact": place.package,
        "checkpoint": place.checkpoint,
        "data": data or Path(place.record.data),
        "output": place.path,
        "finished": place.record.task,
    }
