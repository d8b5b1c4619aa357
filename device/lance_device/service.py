"""A systemd unit that trains in the background, from boot to boot, until the run has finished."""

import getpass
import itertools
import os
import pwd
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from lance_edge.errors import Interrupted, StorageError
from lance_edge.files import atomic_writer

# Exit codes after which starting again would only repeat the message: wrong usage, package, checkpoint, data,
# model, numbers, platform.  A full disk (8) may have room later.
FINAL_EXIT_CODES = (2, 3, 4, 5, 6, 7, 9)
STOPPED = Interrupted.exit_code  # on request: the state is saved
PATH_OPTIONS = ("--cache-dir", "--require-signature")  # of train: beside the three that every service has
UNIT = """\
# Written by lance-device install-service; it may be edited.
[Unit]
Description=On-device training into {out}
# A disk of /etc/fstab that is mounted late is waited for.
RequiresMountsFor={mounts}
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

    @property
    def absolute_arguments(self) -> tuple[str, ...]:
        """`arguments` that mean the same from another folder."""
        words: list[str] = []
        for word in self.arguments:
            option, equals, value = word.partition("=")
            if equals and option in PATH_OPTIONS:
                word = f"{option}={Path(value).absolute()}"
            elif words and words[-1] in PATH_OPTIONS:
                word = str(Path(word).absolute())
            words.append(word)
        return tuple(words)

    @property
    def cache_folders(self) -> tuple[Path, ...]:
        """Where `--cache-dir` keeps features; none without it."""
        words = self.absolute_arguments
        given = [value for option, value in itertools.pairwise(words) if option == "--cache-dir"]
        given += [word.partition("=")[2] for word in words if word.startswith("--cache-dir=")]
        return tuple(map(Path, given))

    @property
    def user(self) -> str:
        """Who trains."""
        return os.environ.get("SUDO_USER") or getpass.getuser()


def unit_text(request: ServiceRequest) -> str:
    """The unit."""
    artifact, data, out = (path.absolute() for path in (request.artifact, request.data, request.out))
    words = [sys.executable, "-m", "lance_device.cli", "train", "--artifact", artifact, "--data", data]
    words += ["--out", out, "--resume-or-start", *request.absolute_arguments]
    return UNIT.format(
        artifact=_escaped(artifact),
        command=" ".join(_quoted(word).replace("$", "$$") for word in words),
        final=" ".join(map(str, FINAL_EXIT_CODES)),
        home=_escaped(out.parent),
        mounts=" ".join(map(_quoted, (artifact, data, out.parent, *request.cache_folders))),
        name=request.name,
        nice=request.nice,
        out=_escaped(out),
        stopped=STOPPED,
        target="default.target" if request.is_for_user else "multi-user.target",
        confinement="" if request.is_for_user else _confinement(request, out.parent),
    )


def _confinement(request: ServiceRequest, folder: Path) -> str:
    """Settings that the systemd of a user cannot make on every system."""
    # "-": a cache that was removed since does not keep the service from its start.
    places = [_quoted(folder), *(_quoted(f"-{place}") for place in request.cache_folders)]
    return CONFINEMENT.format(user=request.user, writable=" ".join(places))


def install(request: ServiceRequest) -> Path:
    """Write the unit where systemd finds it.

    Raises:
        StorageError: if it cannot be written.
    """
    path = request.unit_path
    for folder in (request.out.absolute().parent, *request.cache_folders):
        _make_folder(folder, request.user)
    try:
        with atomic_writer(path) as file:
            file.write(unit_text(request).encode())
    except StorageError:
        raise StorageError(
            f"{path}: cannot write; run the same with sudo, with --user for a service of your own, or with"
            " --print"
        ) from None
    return path


def _make_folder(folder: Path, user: str) -> None:
    """Make a folder that the service writes into, of the user who trains: `sudo` would make it root's."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in made if os.geteuid() == 0 else ():
            shutil.chown(place, user, pwd.getpwnam(user).pw_gid)
    except (OSError, LookupError) as error:
        raise StorageError(f"{folder}: cannot make this folder ({error}); make it, or choose another") from None


def commands(request: ServiceRequest) -> tuple[str, ...]:
    """What starts the service, and shows what it does."""
    user = ["--user"] if request.is_for_user else []
    control = ["systemctl", *user]
    # Without it, the services of a user begin when he logs in, and end when he logs out.
    linger = (shlex.join(["loginctl", "enable-linger", request.user]),) if request.is_for_user else ()
    return (
        *linger,
        shlex.join([*control, "daemon-reload"]),
        shlex.join([*control, "enable", "--now", request.name]),
        shlex.join(["journalctl", *user, "-u", request.name, "-f"]),
    )


def _quoted(value: object) -> str:
    """A word of a list in a unit (systemd.syntax(7)): quotes, C escapes; `%` is doubled (`$` in commands)."""
    word = str(value)
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    needs_quotes = not word or not set(" \t;'\"\\").isdisjoint(word)
    return f'"{escaped}"' if needs_quotes else escaped


def _escaped(path: Path) -> str:
    """A path in a setting that takes no quotes: `%` starts a specifier."""
    return str(path).replace("%", "%%")
