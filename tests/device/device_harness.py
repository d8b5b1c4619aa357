"""Running the command line from tests."""

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from tiny_package import TinyPackage

from lance_device.cli import main


def lance_device(*arguments: Any) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def train(package: TinyPackage, images: Path, out: Path, *arguments: Any) -> Result:
    """`lance-device train` with one thread, for speed."""
    return lance_device(*train_words(package, images, out), *arguments)


def into(words: Sequence[Any], out: Path) -> tuple[Any, ...]:
    """A command line that leaves its run in `out`, where the given one says `OUT`."""
    return tuple(out if word == "OUT" else word for word in words)


def train_words(package: TinyPackage, images: Path, out: Path) -> tuple[Any, ...]:
    return ("train", "--artifact", package.path, "--data", images, "--out", out, "--threads", 1)


def started(result: Result) -> Result:
    """The result of a command that must have ended well."""
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, exit_code: int) -> str:
    """The one line of a command that must have failed in this way."""
    assert result.exit_code == exit_code, (result.exit_code, result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]


def spawn(*arguments: Any, prelude: str = "", close_fds: bool = True) -> subprocess.Popen[str]:
    """Run a command in a process of its own, after some Python statements."""
    # A process that the shell started in the background has SIGINT ignored, and hands that on.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{interruptible}\n{prelude}\nfrom lance_device.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, close_fds=close_fds
    )


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything in a checkpoint but its meta and its seal."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files if name not in ("meta", "sha256")}


def assert_same_arrays(found: Path, expected: Path) -> None:
    """Bit for bit."""
    a, b = arrays(found), arrays(expected)
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
