"""Running `lance-device` in a process of its own: what trains here is what trains on a board."""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from lance_edge.errors import Interrupted, LanceError

COMMAND = (sys.executable, "-m", "lance_device.cli")


STOPPED = "stopped; finished cells stay, and the same command goes on where this one was"


class DeviceError(LanceError):
    """A run of the device that failed."""


def run_device(words: Mapping[str, object], command: str, log: Path, say: Callable[[str], None]) -> None:
    """Run a command of `lance-device` to its end; what it says goes to `say` and, line by line, into `log`.

    Args:
        words: options by name; `True` stands for a flag, `None` leaves the option out.

    Raises:
        DeviceError: with the last line that it said.
        Interrupted: after Ctrl-C, when the device has saved its state.
    """
    last = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8") as kept,
        subprocess.Popen(
            [*COMMAND, command, *options(words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        try:
            for line in process.stderr or ():
                last = line.strip() or last
                kept.write(line)
                say(f"  {line.rstrip()}")
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # twice does no harm: a terminal has told it already
            process.wait()
            raise Interrupted(STOPPED) from None
    if process.returncode != 0:
        raise DeviceError(
            f"lance-device {command} ended with code {process.returncode}: {last.removeprefix('error: ')};"
            f" all that it said is in {log}"
        )


def options(words: Mapping[str, object]) -> list[str]:
    """`{"eval_every": 5, "quiet": True}` to `["--eval-every", "5", "--quiet"]`."""
    found = []
    for name, value in words.items():
        if value is None or value is False:
            continue
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(str(value))
    return found
