"""What several commands have in common."""

from pathlib import Path
from typing import Any

import click

from lance_device.cli_types import auto_or_count, auto_or_threads

PATH = click.Path(
    path_type=Path, readable=False
)  # who opens it says what is wrong, with an exit code of its own
AUTO: dict[str, Any] = {"default": "auto", "metavar": "auto|N", "callback": auto_or_count}
THREADS: dict[str, Any] = {**AUTO, "callback": auto_or_threads}
SIGNATURE = click.option(
    "--require-signature",
    "public_key",
    type=PATH,
    metavar="KEY.PUB",
    help="Refuse a package that lance-host sign did not sign with this key.",
)


def check_signature(file: Path, public_key: Path | None) -> str | None:
    """The SHA-256 that a package, or an exported model, must have by its signature, if one is asked for."""
    if public_key is None:
        return None
    from lance_device.signature import signed_digest

    return signed_digest(file, public_key)


def tell_of_others(text: str) -> None:
    """Say which files of a folder were not taken as images, if any."""
    if text:
        click.echo(text, err=True)


def require_runtime_within_memory() -> None:
    """See that there is a runtime, and that a lack of memory will be an error of the command."""
    from lance_device.address_space import expect_address_space

    expect_address_space()
    from lance_device.guard import bounded_memory
    from lance_device.session import require_runtime

    require_runtime()
    click.get_current_context().with_resource(bounded_memory())


def end_cleanly_on_signals() -> None:
    """See that a polite kill ends this command as Ctrl-C does, with nothing half-written left."""
    from lance_device.stop import ended_by_signals

    click.get_current_context().with_resource(ended_by_signals())
