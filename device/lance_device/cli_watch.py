"""The command `watch`, and `--serve` of it and of `train`."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from lance_device.cli_types import Number


def _address(context: click.Context, option: click.Parameter, text: str | None) -> tuple[str, int] | None:
    """Parse `8080`, `0.0.0.0:8080` or `[::]:8080`."""
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in text and not host):
        raise click.BadParameter(f"expected a port such as 8080, or 0.0.0.0:8080, found {text!r}")
    return host or "127.0.0.1", int(port)


SERVE = click.option(
    "--serve",
    metavar="[ADDRESS:]PORT",
    callback=_address,
    help="Offer a page with the figures of the run, refreshed, to browsers on this machine (8080; from another:"
    " ssh -L 8080:localhost:8080 pi), or to whoever reaches ADDRESS (0.0.0.0:8080).",
)


@contextlib.contextmanager
def serving_if_asked(
    serve: tuple[str, int] | None, run: Path, note: Callable[[str], None]
) -> Iterator[str | None]:
    """Serve the page of a run while the block lasts, if `--serve` was given; gives where."""
    if serve is None:
        yield None
        return
    from lance_device.serve import Address, serving  # brings the report: 2 MiB that other runs spare

    address = Address(*serve)
    with serving(address, run) as found:
        open_to = "" if address.is_loopback else ", for whoever reaches this address: it has no password"
        note(f"the run's page is at http://{found}/{open_to}")
        yield f"http://{found}/"


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--every",
    type=Number(min=0.1),
    default=1.0,
    metavar="SECONDS",
    help="How often to look at the run's files.",
)
@SERVE
@click.pass_context
def watch(context: click.Context, run: Path, every: float, serve: tuple[str, int] | None) -> Any:
    """Follow a run from another shell, or over ssh.

    \b
    lance-device watch run/
    ssh -t pi lance-device watch run/
    lance-device watch run/ --serve 8080

    Reads the run's folder and changes nothing; it may be started before the run or after its end. Exit codes: 0
    the run finished, 10 it was stopped, 11 it failed, 12 its process is gone, 130 Ctrl-C (the run goes on). A
    process that was killed counts as gone once nothing new has come for 30 seconds.
    With --serve the page stays after the run's end, until Ctrl-C; the exit code is then that of the run.
    """
    from lance_device.following import Follower
    from lance_device.live import Live
    from lance_device.watch import EXIT_CODES, ending, until_ctrl_c
    from lance_device.watch import watch as follow

    follower, live = Follower(run), Live(sys.stderr)
    with serving_if_asked(serve, run, live.note) as page:
        state = follow(follower, live, every)
        click.echo(ending(follower, state))
        if page is not None:
            live.note(f"the run has ended; its page stays at {page} until Ctrl-C")
            until_ctrl_c()
    context.exit(EXIT_CODES[state])
