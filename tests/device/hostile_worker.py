"""Does with a hostile file what its owner would, in a process that may be killed: see `hostile.py`.

Says `ready`, then reads a line for each case, `<kind> <file>`, and answers with a line of JSON.  A memory limit
stands for a small board.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from lance_device.cli import main as lance_device
from lance_device.guard import status_bytes

MEMORY_BYTES = 1 << 30


class Refused(Exception):  # noqa: N818 - the good end of a bad file
    """The command ended in one line."""


def run(*words: Any) -> None:
    """A command of `lance-device`.

    Raises:
        Refused: if it ends in one line and the exit code of a `LanceError`.
    """
    result = CliRunner().invoke(lance_device, [str(word) for word in words])
    if result.exit_code == 0:
        return
    last_line = result.stderr.splitlines()[-1] if result.stderr else ""
    if isinstance(result.exception, SystemExit) and result.exit_code in range(3, 10):
        raise Refused(last_line)
    raise result.exception or RuntimeError(result.output)


def package(
    path: Path, images: Path, good: Path, folder: Path, methods: tuple[str, ...] = ("lance", "bp")
) -> None:
    """Train two steps from it, with each of its methods, evaluating at the end."""
    for method in methods:
        out, flags = folder / f"run-{method}", ("--method", method)
        words = ("--artifact", path, "--data", images, "--out", out, "--steps", 2, "--threads", 1, "--quiet")
        run("train", *words, "--eval-every", 0, *flags)


def checkpoint(path: Path, images: Path, good: Path, folder: Path) -> None:
    """Evaluate it, and go on from it."""
    run("eval", "--artifact", good, "--checkpoint", path, "--data", images, "--threads", 1)
    shutil.copy(path, folder / "last.npz")
    run("train", "--artifact", good, "--data", images, "--out", folder, "--resume", "--quiet")


def graph(path: Path, images: Path, good: Path, folder: Path) -> None:
    """Classify with it."""
    run("predict", "--model", path, images / "red", "--threads", 1)


def layered(path: Path, images: Path, good: Path, folder: Path) -> None:
    """The same of one whose methods go by layer."""
    package(path, images, good, folder, ("hosvd", "asi"))


KINDS = {"package": package, "layered": layered, "checkpoint": checkpoint, "graph": graph}


def main() -> None:
    images, good = map(Path, sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library may print
    os.fsync = lambda descriptor: None  # a case is about what is read; syncing takes most of its time
    with tempfile.TemporaryDirectory() as folder:
        package(good, images, good, Path(folder))  # loads what is loaded late
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True, file=answers)
    for line in sys.stdin:
        kind, file = line.split()
        started, outcome = time.monotonic(), "used"
        try:
            with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
                KINDS[kind](Path(file), images, good, Path(folder))
        except Refused as refusal:
            outcome = str(refusal)
        except BaseException:
            outcome = "escaped: " + traceback.format_exc()
        answer = {"outcome": outcome, "seconds": time.monotonic() - started}
        answer["peak_kib"] = status_bytes("VmHWM") // 1024  # ru_maxrss begins with that of the tests' process
        print(json.dumps(answer), flush=True, file=answers)


if __name__ == "__main__":
    main()
