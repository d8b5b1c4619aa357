"""What this machine says about itself: memory of this process, heat, clock, throttling.

A value that a machine does not give is `None` and leaves its column empty.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS_BYTES = 8192  # longer than the file is
RESET_PEAK = b"5"  # proc(5): resets VmHWM to the present resident size
TEMPERATURE = Path("/sys/class/thermal/thermal_zone0/temp")  # millidegrees
CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")  # kHz
HEALTH_INTERVAL_S = 5.0  # a reading starts up to three small processes: not for every step
VCGENCMD_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process, now and at its peak."""

    rss_kib: int | None
    peak_rss_kib: int | None


class MemoryProbe:
    """Resident memory, with a peak that starts anew at every `reset_peak` where the kernel permits.

    The two files stay open: a step reads them at the end of each phase of each micro-batch.
    """

    def __init__(self) -> None:
        self._status = _open(STATUS, os.O_RDONLY)
        self._clear_refs = _open(CLEAR_REFS, os.O_WRONLY)
        self.resets_peak = self._try_reset()

    def __del__(self) -> None:
        for descriptor in (self._status, self._clear_refs):
            if descriptor is not None:
                os.close(descriptor)

    @property
    def peak_source(self) -> str:
        """Where peaks come from; `ru_maxrss` is the peak since the process began and only rises."""
        return "VmHWM, reset per phase" if self.resets_peak else "ru_maxrss, only rises"

    def reset_peak(self) -> None:
        """Begin a new peak."""
        if self.resets_peak:
            self._try_reset()

    def read(self) -> Memory:
        """Present and peak resident size."""
        status = b"" if self._status is None else os.pread(self._status, STATUS_BYTES, 0)
        peak_kib = _size_kib(status, b"VmHWM:") if self.resets_peak else _max_rss_kib()
        return Memory(rss_kib=_size_kib(status, b"VmRSS:"), peak_rss_kib=peak_kib)

    def _try_reset(self) -> bool:
        try:
            return self._clear_refs is not None and os.write(self._clear_refs, RESET_PEAK) > 0
        except OSError:
            return False


def _open(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags)
    except OSError:
        return None


def _size_kib(status: bytes, field: bytes) -> int | None:
    """The number of a line such as `VmRSS:    1234 kB`."""
    _, found, rest = status.partition(field)
    return int(rest.split(maxsplit=1)[0]) if found else None


def _max_rss_kib() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest // 1024 if sys.platform == "darwin" else largest  # macOS counts in bytes


@dataclass(frozen=True)
class Health:
    """Heat and speed of the board; `throttled` are the firmware's flags, `0x0` when all is well."""

    temperature_c: float | None = None
    arm_mhz: float | None = None
    throttled: str | None = None


class HealthProbe:
    """Reads the board's health, from `vcgencmd` where there is one, else from sysfs."""

    def __init__(self, interval_s: float = HEALTH_INTERVAL_S) -> None:
        self._vcgencmd = shutil.which("vcgencmd")
        self._unanswered: set[tuple[str, ...]] = set()
        self._interval_s = interval_s
        self._read_at = float("-inf")
        self._health = Health()

    def read(self) -> Health:
        """The latest reading, at most `interval_s` old."""
        now = time.monotonic()
        if now - self._read_at >= self._interval_s:
            self._health = Health(self._temperature_c(), self._arm_mhz(), self._ask("get_throttled"))
            self._read_at = now
        return self._health

    def _temperature_c(self) -> float | None:
        answer = self._ask("measure_temp")  # temp=48.3'C
        if answer is not None:
            with contextlib.suppress(ValueError):
                return float(answer.rstrip("'C"))
        return _scaled(TEMPERATURE, 1e-3)

    def _arm_mhz(self) -> float | None:
        answer = self._ask("measure_clock", "arm")  # frequency(48)=1400000000
        if answer is not None:
            with contextlib.suppress(ValueError):
                return float(answer) * 1e-6
        return _scaled(CLOCK, 1e-3)

    def _ask(self, *question: str) -> str | None:
        """The right side of vcgencmd's `name=value`."""
        if self._vcgencmd is None or question in self._unanswered:
            return None
        try:
            done = subprocess.run(
                [self._vcgencmd, *question],
                capture_output=True,
                text=True,
                timeout=VCGENCMD_TIMEOUT_S,
                check=True,
            )
        except subprocess.TimeoutExpired:
            return None  # a board that swaps; it may answer the next time
        except (OSError, subprocess.CalledProcessError):
            self._unanswered.add(question)  # no permission, or the firmware does not know it: never ask again
            return None
        _, equals, value = done.stdout.strip().partition("=")
        return value if equals else None


def _scaled(path: Path, factor: float) -> float | None:
    try:
        return int(path.read_text()) * factor
    except (OSError, ValueError):
        return None
