"""The commands of learning task after task: `collect`, `next-task`."""

import re
import sys
from pathlib import Path

import click

from lance_device.cli_common import AUTO, PATH, SIGNATURE, check_signature, require_runtime_within_memory
from lance_device.cli_types import byte_count

PASS_MEMORY = click.option(
    "--pass-memory",
    default="128MiB",
    metavar="BYTES",
    callback=byte_count,
    help="For second moments at a time; what does not fit takes another pass over the images.",
)
BATCHES = click.option(
    "--batches",
    type=click.IntRange(min=1),
    default=100,
    help="Calibration batches at most, as on the workstation.",
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
@BATCHES
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the images.  [default: the package's]")
@PASS_MEMORY
@click.option("--threads", **AUTO, help="auto: the cores of this machine.")
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
    batches: int,
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
    from lance_device.collect import CollectRequest
    from lance_device.collect import collect as run_collect
    from lance_device.moments_pass import PassOptions
    from lance_device.options import DEFAULT_MICRO_BATCH, available_cores

    check_signature(artifact, public_key)
    options = PassOptions(
        batches, threads or available_cores(), micro_batch or DEFAULT_MICRO_BATCH, pass_memory, _show_progress()
    )
    request = CollectRequest(
        artifact, checkpoint, data, output, task or task_after(data), options, memory, seed, strict
    )
    found = run_collect(request, lambda text: click.echo(text, err=True))
    layers = f"{len(found.layers)} layers" if len(found.layers) != 1 else "1 layer"
    click.echo(
        f"{output}: second moments of {layers} from {found.batches} batches of {found.batch_size} images"
    )


def task_after(data: Path) -> str:
    """A task's name from where its images are."""
    return re.sub(r"[^\w.-]+", "-", data.absolute().stem).lstrip(".")[:56] or "task"


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
