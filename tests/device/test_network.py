"""The device opens no connection: not while it trains, not when it loads its libraries."""

import re
import shutil
import subprocess
import sys

import pytest
from device_harness import spawn, train_words

# Every way to a network from Python goes through `socket`; anything that is tried is an error of the run.
NO_SOCKETS = """
import sys
def refuse(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        raise AssertionError(f"network: {event} {arguments}")
sys.addaudithook(refuse)
"""


def test_no_command_uses_a_socket(package, images, tmp_path):
    run = tmp_path / "run"
    common = ("--artifact", package.path, "--checkpoint", run / "last.npz")
    for words in (
        (*train_words(package, images, run), "--steps", 3),
        ("eval", *common, "--data", images),
        ("predict", *common, images / "red"),
        ("compare", run),
        ("doctor",),
    ):
        process = spawn(*words, prelude=NO_SOCKETS)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_the_watch_of_these_tests_sees_a_socket():
    code = NO_SOCKETS + "import socket; socket.socket()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "network: socket.__new__" in done.stderr


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_nor_do_the_libraries_below_python(package, images, tmp_path):
    """System calls of a whole run, all of its threads and children."""
    trace = tmp_path / "trace"
    code = "from lance_device.cli import main; main()"
    words = (*train_words(package, images, tmp_path / "run"), "--steps", 3)
    command = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=socket,connect,sendto,bind",
        "-o",
        str(trace),
        sys.executable,
    ]
    done = subprocess.run(
        [*command, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("this system does not permit strace")
    assert done.returncode == 0, done.stderr
    calls = trace.read_text().splitlines()
    assert [call for call in calls if re.search(r"AF_INET|AF_NETLINK", call)] == []
