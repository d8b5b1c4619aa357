"""What several commands have in common."""

from pathlib import Path
from typing import Any

import click

from lance_device.cli_types import auto_or_count

PATH = click.Path(path_type=Path)
AUTO: dict[str, Any] = {"default": "auto", "metavar": "auto|N", "callback": auto_or_count}
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


def require_runtime_within_memory() -> None:
    """See that there is a runtime, and that a lack of memory will be an error of the command."""
    from lance_device.address_space import expect_address_space

    expect_address_space()
    from lance_device.guard import bounded_memory
    from lance_device.session import require_runtime

    require_runtime()
    click.get_current_context().with_resource(bounded_memory())
