"""Options that several commands have, and how they are read."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)

MODEL = click.option(
    "--model",
    default="mcunet",
    show_default=True,
    help="Network of the zoo (an unknown name lists them), or your own: FILE.py:FACTORY, MODULE:FACTORY,"
    " torchvision:NAME, timm:NAME, FILE.onnx.",
)
INPUT_SIZE = click.option(
    "--input-size",
    "--resolution",
    "resolution",
    type=int,
    help="Pixels of the network's square input. Default: its own; 224 where it does not say.",
)
HEAD = click.option(
    "--head",
    default="linear",
    show_default=True,
    metavar="linear|none|MODULE",
    help="What becomes new for the classes of --data, and trains: the layer that gives the logits; nothing (the"
    " network's own stays, frozen unless --layers names it); or that layer.",
)


def numbers(context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """Parse `0.5` or `0.485,0.456,0.406`."""
    if text is None:
        return None
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise click.BadParameter(f"expected numbers such as 0.5 or 0.485,0.456,0.406, found {text!r}")
    return values


def wrote(output: Path) -> str:
    """`wrote pkg.tar (1.25 MiB)`."""
    from lance_host.text import human_bytes

    return f"wrote {output} ({human_bytes(output.stat().st_size)})"


@contextmanager
def progress_bars() -> Iterator[Any]:
    """A bar per named piece of work, on a terminal: call it with (name, done, total)."""
    bars: dict[str, Any] = {}

    def show(name: str, done: int, total: int) -> None:
        if total <= 0 or not sys.stderr.isatty():  # a download may not say how long it is
            return
        if name not in bars:
            bars[name] = click.progressbar(length=total, label=name, file=sys.stderr)
            bars[name].__enter__()
        bar = bars[name]
        bar.update(done - bar.pos)
        if done >= total:
            bar.__exit__(None, None, None)

    try:
        yield show
    finally:
        for bar in bars.values():
            if not bar.finished:
                bar.__exit__(None, None, None)
