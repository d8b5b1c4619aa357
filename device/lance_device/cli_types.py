"""Option values of the command line, and the turning of errors into exit codes."""

import math
from typing import Any

import click

from lance_device.thread_limits import TIMES_CORES, most_threads
from lance_edge.counts import parse_bytes
from lance_edge.errors import Interrupted, LanceError, PlatformError


def auto_or_count(context: click.Context, option: click.Parameter, text: str) -> int | None:
    """Parse `auto` (`None`) or a whole number from 1."""
    if text == "auto":
        return None
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise click.BadParameter(f"expected auto or a whole number from 1, found {text!r}")
    return count


def auto_or_threads(context: click.Context, option: click.Parameter, text: str) -> int | None:
    """The same, for threads that this machine can have."""
    count, most = auto_or_count(context, option, text), most_threads()
    if count is not None and count > most:
        raise click.BadParameter(
            f"expected at most {most}, {TIMES_CORES} for each core of this machine, found {count}: more would"
            " only wait for each other; auto takes as many as there are cores"
        )
    return count


def minutes_or_steps(
    context: click.Context, option: click.Parameter, text: str
) -> tuple[float | None, int | None]:
    """Parse `5m` (minutes) or `200` (steps) to `(minutes, steps)`, of which one is `None`."""
    is_minutes = text.endswith("m")
    try:
        amount = float(text[:-1]) if is_minutes else int(text)
    except ValueError:
        amount = 0
    if not 0 < amount < math.inf:
        raise click.BadParameter(f"expected minutes such as 5m, or steps such as 200, found {text!r}")
    return (float(amount), None) if is_minutes else (None, int(amount))


def byte_count(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Parse `512MiB`, `1.5 GB` or `4096` to bytes; nothing stays nothing."""
    if text is None:
        return None
    count = parse_bytes(text)
    if count is None:
        raise click.BadParameter(f"expected bytes such as 512MiB or 2GB, found {text!r}")
    return count


def class_weights(context: click.Context, option: click.Parameter, text: str) -> str:
    """Let `none`, `balanced` and `1,2.5,1` pass."""
    from lance_device.class_weights_text import is_understood

    if not is_understood(text):
        raise click.BadParameter(
            f"expected none, balanced, or positive numbers such as 1,2.5,1, found {text!r}"
        )
    return text


class Number(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"expected a finite number, found {value!r}", param, ctx)
        return number


class Commands(click.Group):
    """Commands whose expected failures end as one line on stderr and the exit code of their kind."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except LanceError as error:
            _fail(ctx, str(error), error.exit_code)
        except PermissionError as error:  # of a folder above what was to be looked at, as a rule
            what = f"{error.filename}: not permitted ({error.strerror})"
            _fail(
                ctx, f"{what}; check its permissions, and those of the folders above it", LanceError.exit_code
            )
        except KeyboardInterrupt:
            _fail(ctx, "stopped on request", Interrupted.exit_code)
        except MemoryError:
            text = "not enough memory; close other programs or use a smaller --micro-batch"
            _fail(ctx, text, PlatformError.exit_code)


def _fail(context: click.Context, message: str, exit_code: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    context.exit(exit_code)
