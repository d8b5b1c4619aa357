"""`lance-host keygen` and `sign`: who made a package."""

from pathlib import Path

import click

from lance_host.cli_options import FILE


@click.command()
@click.argument("key", type=FILE)
def keygen(key: Path) -> None:
    """Make a key pair for signing packages: KEY stays secret, KEY.pub goes to the boards.

    \b
    lance-host keygen ~/.config/lance-edge/key
    """
    from lance_host.signing import make_keys

    click.echo(f"wrote {key} (keep it secret) and {make_keys(key)} (for lance-device --require-signature)")


@click.command()
@click.option("--key", type=FILE, required=True, help="The private key of lance-host keygen.")
@click.argument("artifact", type=FILE)
def sign(key: Path, artifact: Path) -> None:
    """Sign a package; copy pkg.tar.sig along with pkg.tar.

    \b
    lance-host sign --key ~/.config/lance-edge/key pkg.tar
    """
    from lance_host.signing import sign as write

    click.echo(f"wrote {write(artifact, key)}")
