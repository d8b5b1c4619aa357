"""Commands about the board itself: `doctor`, `install-service`."""

import dataclasses
import json
from pathlib import Path

import click

from lance_device.cli_common import PATH
from lance_edge.errors import PlatformError


def _service_name(context: click.Context, option: click.Parameter, text: str) -> str:
    from lance_device.cli_service import service_name

    return service_name(context, option, text)


@click.command()
@click.option("--out", type=PATH, default=Path(), show_default=False, help="Where runs will be written.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, out: Path, as_json: bool) -> None:
    """Is this machine fit to train, and if not, what is to be done?

    Shows board, system, processor, memory, disk, heat and power, versions, and whether the runtime's
    telemetry is off. Exits with 9 if there is a problem that prevents training.

    \b
    lance-device doctor
    """
    from lance_device.doctor import PROBLEM, examine, report

    findings = examine(out)
    if as_json:
        click.echo(
            json.dumps([dataclasses.asdict(finding) for finding in findings], ensure_ascii=False, indent=1)
        )
    else:
        click.echo(report(findings))
    context.exit(PlatformError.exit_code if any(finding.verdict == PROBLEM for finding in findings) else 0)


@click.command("install-service", context_settings={"ignore_unknown_options": True})
@click.option("--artifact", type=PATH, required=True, help="Package of lance-host calibrate: pkg.tar.")
@click.option("--data", type=PATH, required=True, help="Folder with a folder of images per class, or an .npz.")
@click.option("--out", type=PATH, required=True, help="Folder for checkpoints and measurements: run/.")
@click.option("--name", default="lance-train", callback=_service_name, help="Of the service.")
@click.option("--user", "is_for_user", is_flag=True, help="A service of your own; needs no sudo.")
@click.option("--nice", type=click.IntRange(0, 19), default=10, help="Let other programs go first: 0 to 19.")
@click.option("--print", "only_print", is_flag=True, help="Print the unit, and write nothing.")
@click.option("--allow-missing", is_flag=True, help="Package or data come later, with a disk, say.")
@click.argument("train_options", nargs=-1, type=click.UNPROCESSED, metavar="[TRAIN_OPTIONS]...")
def install_service(
    artifact: Path,
    data: Path,
    out: Path,
    name: str,
    is_for_user: bool,
    nice: int,
    only_print: bool,
    allow_missing: bool,
    train_options: tuple[str, ...],
) -> None:
    """Write a systemd unit that trains in the background and goes on after every reboot.

    Further options are those of lance-device train, and are checked as it checks them; so is the package. What
    is not there is refused, unless with --allow-missing; --print, which may be for another board, only warns.

    \b
    sudo lance-device install-service --artifact pkg.tar --data photos --out run/ --epochs 20 --max-temp 75
    systemctl enable --now lance-train
    """
    from lance_device.cli_service import check_service, refuse_missing
    from lance_device.service import ServiceRequest, commands, install, unit_text

    request = ServiceRequest(artifact, data, out, name, is_for_user, nice, train_options)
    missing = check_service(request)
    if not allow_missing and not only_print:
        refuse_missing(request, missing)
    for line in missing:
        click.echo(f"warning: {line}; the service can train only once it is", err=True)
    if only_print:
        click.echo(unit_text(request), nl=False)
        return
    click.echo(f"wrote {install(request)}; now run:")
    for command in commands(request):
        click.echo(f"  {command}")
