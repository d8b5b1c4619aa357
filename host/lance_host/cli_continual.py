"""`lance-host memory`, and the options of `lance-host calibrate` for tasks after the first."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lance_edge.errors import LanceError
from lance_edge.manifest import MODES
from lance_edge.names import MEMORY_BATCHES
from lance_host.cli_options import FILE, progress_bars, wrote

# Of a task with a memory, which `bp` alone would not respect, and of any other.
DEFAULT_METHODS = {True: "lance", False: "lance,bp"}
FIRST_DEFAULTS = {"layers": "4", "energy": 0.7, "mode": "channel"}
NEXT_DEFAULTS = {"layers": "", "energy": 0.98, "mode": "patch"}

NEXT_TASK = (
    click.option(
        "--checkpoint", type=FILE, help="Go on from this finished run: new head for --data, old heads kept."
    ),
    click.option("--artifact", type=FILE, help="Its package. Default: the one that the run's run.json names."),
    click.option(
        "--memory",
        type=FILE,
        help="memory.npz: train only where it leaves earlier tasks alone (lance-host memory).",
    ),
    click.option(
        "--stats", "statistics", type=FILE, help="stats.npz of lance-device collect, in place of --data."
    ),
    click.option(
        "--null-space-below",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="A protected mode of at most so many dimensions takes all of its null space (published code: 80).",
    ),
)


def next_task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a task after the first."""
    for option in reversed(NEXT_TASK):
        command = option(command)
    return command


def files_first(command: Callable[..., Any]) -> Callable[..., Any]:
    """Look at the files that a command is given before anything else, which takes seconds."""

    @functools.wraps(command)
    def checked(*arguments: Any, **options: Any) -> Any:
        from lance_host.given_files import check_files

        check_files(options)
        return command(*arguments, **options)

    return checked


def past_of(options: dict[str, Any], is_model_given: bool) -> Any:
    """The `After` of a calibration, or `None` for a first task; fills defaults in, and takes its options out.

    Raises:
        LanceError: if an option of later tasks stands without --checkpoint.
    """
    from lance_host.request import After

    names = ("artifact", "memory", "statistics", "null_space_below")
    checkpoint, own = options.pop("checkpoint"), {name: options.pop(name) for name in names}
    if checkpoint is None:
        for flag, name in (("--memory", "memory"), ("--stats", "statistics"), ("--artifact", "artifact")):
            if own[name] is not None:
                raise LanceError(f"{flag}: goes with --checkpoint, the run of the task before; name that too")
    defaults = FIRST_DEFAULTS if checkpoint is None else NEXT_DEFAULTS
    options |= {name: value for name, value in defaults.items() if options[name] is None}
    if checkpoint is None:
        return None
    if not is_model_given:
        options["model"] = ""  # the package's
    return After(checkpoint, **own)


@click.command()
@click.option("--artifact", type=FILE, help="The package of the run. Default: the one that its run.json names.")
@click.option("--checkpoint", type=FILE, required=True, help="last.npz or best.npz of the finished run.")
@click.option("--data", type=FILE, help="The finished task's images, as they were trained.")
@click.option("--stats", "statistics", type=FILE, help="stats.npz of lance-device collect, in place of --data.")
@click.option(
    "--memory",
    type=FILE,
    help="The memory of the tasks before, which is extended. Default: the one in the package.",
)
@click.option(
    "--threshold",
    type=float,
    help="Share of the task's energy that is protected. Default: 0.97, and 0.003 more for each earlier task.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Protect what filters read (patch, the default), or channels. After an earlier task: as its memory.",
)
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    default=MEMORY_BATCHES,
    show_default=True,
    help="Batches of images at most.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Chooses the images. Default: the package's.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("-o", "--output", type=FILE, default=Path("memory.npz"), show_default=True, help="What to write.")
@files_first
def memory(**options: Any) -> None:
    """Remember what a finished task needs, so that the next one leaves it alone.

    \b
    lance-host memory --checkpoint run1/last.npz --data task1/ -o memory1.npz
    lance-host calibrate --checkpoint run1/last.npz --memory memory1.npz --data task2/ -o task2.tar
    lance-device train --artifact task2.tar --data task2/ --out run2/
    lance-host memory --checkpoint run2/last.npz --data task2/ -o memory2.npz
    """
    from lance_host.memory_build import MemoryRequest, make_memory
    from lance_host.memory_table import memory_table
    from lance_host.request import Feedback

    with progress_bars() as progress:
        made = make_memory(MemoryRequest(**options), Feedback(say=click.echo, progress=progress))
    click.echo()
    click.echo(memory_table(made))
    click.echo(f"\n{wrote(options['output'])}")
