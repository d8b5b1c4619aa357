"""The command line of the workstation: only `cli*.py` print, and know click."""

from typing import Any

import click

from lance_edge import __version__
from lance_edge.errors import LanceError
from lance_host.cli_benchmark import continual
from lance_host.cli_calibrate import calibrate, layers
from lance_host.cli_continual import memory
from lance_host.cli_export import export_ort
from lance_host.cli_keys import keygen, sign
from lance_host.cli_package import inspect, merge, sample_data
from lance_host.cli_report import report
from lance_host.cli_reproduce import reproduce


class Commands(click.Group):
    """Turns an expected failure into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a `LanceError` is not a traceback."""
        try:
            return super().invoke(ctx)
        except LanceError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)
        except MemoryError:
            click.echo("error: not enough memory; try a smaller --batch-size or --resolution", err=True)
            ctx.exit(9)
        except KeyboardInterrupt:
            click.echo("stopped; nothing was written", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lance-host")
def cli() -> None:
    """Prepare on-device training: calibrate a network once, copy the package to the board.

    \b
    lance-host calibrate --model mcunet --data photos/ --layers 4 -o pkg.tar
    scp pkg.tar pi:            # and on the board:  lance-device train --artifact pkg.tar ...
    lance-host merge --artifact pkg.tar --checkpoint run/last.npz -o finetuned.pth
    lance-host report run/ -o report.html
    lance-host reproduce theory

    \b
    Exit codes: 0 done; 2 no such option, or a value of no use; 3 package, memory or statistics, 4 checkpoint,
    5 data, 6 network or 8 disk cannot be used, or not with these options; 7 the numbers ran away; 9 this
    machine cannot; 130 stopped; 1 anything else.
    """


COMMANDS = (
    *(calibrate, layers, inspect, merge, report, reproduce, keygen, sign, sample_data, export_ort),
    *(memory, continual),
)
for command in COMMANDS:
    cli.add_command(command)
