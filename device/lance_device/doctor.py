"""`lance-device doctor`: is this machine fit to train, and if not, what is to be done?

Each check looks at one thing and gives findings; none of them changes anything.  The runtime is tried in a
process of its own: a build for another processor dies there with an illegal instruction, and not here.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lance_device.address_space import LEAST_ADDRESS_SPACE
from lance_device.guard import free_bytes, group_limit_bytes
from lance_device.machine import cpu_entries, describe_self, governor
from lance_device.probe import HealthProbe
from lance_edge.throttling import REMEDIES, earlier_troubles, flags_of, troubles
from lance_edge.units import size

OK, WARNING, PROBLEM = "ok", "warning", "problem"

LEAST_GLIBC = (2, 28)  # of onnxruntime's wheels
LEAST_FREE_BYTES = LEAST_ADDRESS_SPACE // 2  # of memory: Python, numpy and onnxruntime with a small network
LEAST_DISK_BYTES = 64 << 20  # checkpoints and measurements of a small network
HOT_C = 75.0  # a Pi throttles at 80
TRIAL_TIMEOUT_S = 120.0
USEFUL_FEATURES = ("fp", "asimd", "asimddp", "asimdhp", "crc32", "sse4_2", "avx", "avx2", "avx512f", "fma")

# Says versions and whether anything could be sent.  Telemetry is decided when the runtime loads: where it is on
# (seen with 1.31.1), that starts a thread and opens a data base of events in the user's cache.
TRIAL = """
import json, os
import numpy

def names(folder):
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()

def files():
    found = set()
    for name in names("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return {link for link in found if link.startswith(("/", "socket:")) and not link.startswith("/proc/")}

files_before, threads_before = files(), names("/proc/self/task")
from lance_device.run_record import describe_software
versions = describe_software()["versions"]
print(json.dumps({
    "versions": versions,
    "switch": os.environ.get("ORT_DISABLE_TELEMETRY") == "1",
    "threads": len(names("/proc/self/task") - threads_before),
    "files": sorted(files() - files_before),
}))
"""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        verdict: `ok`, `warning` (it trains, but) or `problem` (it does not train).
        remedy: what to do; empty where all is well.
    """

    name: str
    value: str
    verdict: str = OK
    remedy: str = ""


def examine(folder: Path) -> list[Finding]:
    """All checks.

    Args:
        folder: where runs are to be written.
    """
    return [finding for check in CHECKS for finding in check(folder)]


def report(findings: list[Finding]) -> str:
    """A line for each finding, and a last one with the verdict."""
    width = max(len(finding.name) for finding in findings)
    marks = {OK: " ", WARNING: "!", PROBLEM: "x"}
    lines = [
        f"{marks[finding.verdict]} {finding.name:<{width}}  {finding.value}"
        + (f"; {finding.remedy}" if finding.remedy else "")
        for finding in findings
    ]
    counts = {
        verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (PROBLEM, WARNING)
    }
    verdict = "this machine cannot train" if counts[PROBLEM] else "this machine can train"
    return "\n".join([*lines, f"{verdict}: {counts[PROBLEM]} problems (x), {counts[WARNING]} warnings (!)"])


def _board(folder: Path) -> Iterator[Finding]:
    yield Finding("board", describe_self() or "unknown (no device tree)")
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}, {_libc()}")


def _bits(folder: Path) -> Iterator[Finding]:
    if sys.maxsize >= 2**32:
        yield Finding("Python", f"{platform.python_version()}, 64-bit, {sys.executable}")
        return
    remedy = "install a 64-bit OS (Raspberry Pi OS 64-bit): there is no onnxruntime for 32-bit ARM"
    if platform.machine() in ("aarch64", "arm64"):
        remedy += "; the kernel is 64-bit already, but the programs are not"
    yield Finding("Python", f"{platform.python_version()}, 32-bit", PROBLEM, remedy)


def _c_library(folder: Path) -> Iterator[Finding]:
    name, version = platform.libc_ver()
    if name != "glibc":
        remedy = (
            "use a distribution with glibc (Raspberry Pi OS, Debian, Ubuntu): onnxruntime has no other wheels"
        )
        yield Finding("C library", name or "unknown, not glibc", WARNING, remedy)
    elif tuple(map(int, version.split(".")[:2])) < LEAST_GLIBC:
        remedy = f"onnxruntime needs glibc {'.'.join(map(str, LEAST_GLIBC))}: install a newer OS"
        yield Finding("C library", f"glibc {version}", PROBLEM, remedy)


def _processor(folder: Path) -> Iterator[Finding]:
    entries, clock = cpu_entries(), governor()
    found = (entries.get("Features") or entries.get("flags") or "").split()
    useful = [name for name in USEFUL_FEATURES if name in found]
    value = f"{os.cpu_count()} cores, features {' '.join(useful) or 'unknown'}"
    yield Finding("processor", value + (f", governor {clock}" if clock else ""))
    if clock == "powersave":
        yield Finding("governor", clock, WARNING, "it holds the clock low: choose ondemand or performance")


def _memory(folder: Path) -> Iterator[Finding]:
    memory, free, group = psutil.virtual_memory(), free_bytes(), group_limit_bytes()
    value = f"{size(memory.total)}, {size(free)} free" + (f", limit {size(group)}" if group is not None else "")
    if free < LEAST_FREE_BYTES:
        remedy = f"Python with onnxruntime takes about {size(LEAST_FREE_BYTES)}: close other programs"
        yield Finding("memory", value, PROBLEM, remedy)
    else:
        yield Finding("memory", value)


def _disk(folder: Path) -> Iterator[Finding]:
    parent = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = psutil.disk_usage(str(parent)).free
    if not os.access(parent, os.W_OK):
        yield Finding("disk", f"{parent}: not writable", PROBLEM, "choose another folder, or its permissions")
    elif free < LEAST_DISK_BYTES:
        yield Finding("disk", f"{parent}: {size(free)} free", PROBLEM, "free some space")
    else:
        yield Finding("disk", f"{parent}: {size(free)} free")


def _heat(folder: Path) -> Iterator[Finding]:
    health = HealthProbe().read()
    flags = flags_of(health.throttled)
    if health.temperature_c is None:
        yield Finding("temperature", "unknown (no thermometer), so --max-temp cannot be used")
    elif health.temperature_c >= HOT_C:
        yield Finding(
            "temperature", f"{health.temperature_c:.0f} °C", WARNING, "cool it, or pause with --max-temp"
        )
    else:
        yield Finding("temperature", f"{health.temperature_c:.0f} °C")
    for name in troubles(flags):
        yield Finding("power and heat", f"{name} now ({health.throttled})", WARNING, REMEDIES[name])
    for name in earlier_troubles(flags):
        yield Finding(
            "power and heat", f"{name} since it started ({health.throttled})", WARNING, REMEDIES[name]
        )
    if not flags and health.throttled is not None:
        yield Finding("power and heat", f"well ({health.throttled})")


def _clock(folder: Path) -> Iterator[Finding]:
    if time.gmtime().tm_year < 2025:  # a board without a battery, before it has found the time
        yield Finding("clock", time.strftime("%Y-%m-%d"), WARNING, "it is wrong: runs will have odd names")


def _runtime(folder: Path) -> Iterator[Finding]:
    """Loads onnxruntime, numpy and pillow elsewhere."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRIAL], capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("onnxruntime", "does not load in two minutes", PROBLEM, "reinstall it")
        return
    if done.returncode != 0:
        yield Finding(
            "onnxruntime", _failure(done), PROBLEM, "reinstall lance-edge and onnxruntime for this Python"
        )
        return
    answer = json.loads(done.stdout)
    versions = answer["versions"]
    yield Finding("onnxruntime", versions.pop("onnxruntime"))
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items()))
    yield _telemetry(answer)


def _telemetry(answer: dict[str, Any]) -> Finding:
    opened = [*answer["files"], *([f"{answer['threads']} threads"] if answer["threads"] else [])]
    if answer["switch"] and not opened:
        return Finding(
            "telemetry", "off (ORT_DISABLE_TELEMETRY=1): loading the runtime opened no socket, file or thread"
        )
    value = f"on: loading the runtime opened {', '.join(opened) or 'nothing, but its switch is not set'}"
    return Finding("telemetry", value, PROBLEM, "set ORT_DISABLE_TELEMETRY=1, and report this")


def _failure(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode == -signal.SIGILL:
        return (
            "dies of an illegal instruction: this build is for a newer processor (1.21.0 is, on a Raspberry Pi)"
        )
    if done.returncode < 0:
        return f"dies of {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return lines[-1][:200] if lines else f"ends with {done.returncode}"


def _libc() -> str:
    return " ".join(platform.libc_ver()).strip() or "unknown C library"


CHECKS: tuple[Callable[[Path], Iterator[Finding]], ...] = (
    *(_board, _bits, _c_library, _processor, _memory, _disk, _heat, _clock, _runtime),
)
