"""A systemd unit that trains in the background, from boot to boot, until the run has finished."""

import contextlib
import getpass
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from lance_edge.errors import StorageError
from lance_edge.files import atomic_writer

# Exit codes after which starting again would only repeat the message: wrong usage, package, checkpoint, data,
# model, numbers, platform.  A full disk (8) may have room later.
FINAL_EXIT_CODES = (2, 3, 4, 5, 6, 7, 9)
STOPPED = 130  # on request: the state is saved
UNIT = """\
# Written by lance-device install-service; it may be edited.
[Unit]
Description=On-device training into {out}
ConditionPathExists={artifact}

[Service]
Type=exec
ExecStart={command}
WorkingDirectory={home}
Environment=PYTHONUNBUFFERED=1
# A stop ends the micro-batch at hand, saves the last complete step and exits in under two seconds.
KillSignal=SIGTERM
TimeoutStopSec=30
SuccessExitStatus={stopped}
# The run is taken up where it was, also after a crash, a full disk or a power cut.
Restart=on-failure
RestartSec=30
RestartPreventExitStatus={final}
Nice={nice}
OOMScoreAdjust=500
StandardOutput=journal
StandardError=journal
SyslogIdentifier={name}
# It needs its files, and no network.
NoNewPrivileges=yes
{confinement}
[Install]
WantedBy={target}
"""
CONFINEMENT = """\
User={user}
PrivateNetwork=yes
ProtectSystem=strict
ReadWritePaths={writable}
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictRealtime=yes
"""


@dataclass(frozen=True)
class ServiceRequest:
    """What to train, and as which service.

    Attributes:
        name: of the unit, without `.service`.
        is_for_user: a unit of the user's own systemd, and not of the whole machine.
        arguments: further options of `lance-device train`.
    """

    artifact: Path
    data: Path
    out: Path
    name: str
    is_for_user: bool
    nice: int
    arguments: tuple[str, ...]

    @property
    def unit_path(self) -> Path:
        """Where systemd looks for it."""
        if not self.is_for_user:
            return Path("/etc/systemd/system") / f"{self.name}.service"
        config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
        return Path(config) / "systemd" / "user" / f"{self.name}.service"


def unit_text(request: ServiceRequest) -> str:
    """The unit."""
    artifact, data, out = (path.absolute() for path in (request.artifact, request.data, request.out))
    words = [sys.executable, "-m", "lance_device.cli", "train", "--artifact", artifact, "--data", data]
    words += ["--out", out, "--resume-or-start", *request.arguments]
    return UNIT.format(
        artifact=_escaped(artifact),
        command=" ".join(_quoted(str(word)) for word in words),
        final=" ".join(map(str, FINAL_EXIT_CODES)),
        home=_escaped(out.parent),
        name=request.name,
        nice=request.nice,
        out=_escaped(out),
        stopped=STOPPED,
        target="default.target" if request.is_for_user else "multi-user.target",
        confinement="" if request.is_for_user else _confinement(request, out.parent),
    )


def _confinement(request: ServiceRequest, folder: Path) -> str:
    """Settings that the systemd of a user cannot make on every system."""
    following = zip(request.arguments, request.arguments[1:], strict=False)
    places = [folder, *(Path(value).absolute() for option, value in following if option == "--cache-dir")]
    paths = " ".join(_quoted(str(place)) for place in places)
    user = os.environ.get("SUDO_USER") or getpass.getuser()
    return CONFINEMENT.format(user=user, writable=paths)


def install(request: ServiceRequest) -> Path:
    """Write the unit where systemd finds it.

    Raises:
        StorageError: if it cannot be written.
    """
    path = request.unit_path
    with contextlib.suppress(OSError):  # atomic_writer says it better
        request.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_writer(path) as file:
            file.write(unit_text(request).encode())
    except StorageError:
        raise StorageError(
            f"{path}: cannot write; run the same with sudo, with --user for a service of your own, or with"
            " --print"
        ) from None
    return path


def commands(request: ServiceRequest) -> tuple[str, ...]:
    """What starts the service, and shows what it does."""
    user = ["--user"] if request.is_for_user else []
    control = ["systemctl", *user]
    return (
        shlex.join([*control, "daemon-reload"]),
        shlex.join([*control, "enable", "--now", request.name]),
        shlex.join(["journalctl", *user, "-u", request.name, "-f"]),
    )


def _quoted(word: str) -> str:
    """A word of a command line of a unit (systemd.service(5): quotes, C escapes; `%` and `$` are doubled)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    needs_quotes = not word or not set(" \t;'\"\\").isdisjoint(word)
    return f'"{escaped}"' if needs_quotes else escaped


def _escaped(path: Path) -> str:
    """A path in a setting that takes no quotes: `%` starts a specifier."""
    return str(path).replace("%", "%%")
