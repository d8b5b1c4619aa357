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
    """Resident memory, with a peak that starts anew at every `reset_peak` where the kernel permits."""

    def __init__(self) -> None:
        self.resets_peak = self._try_reset()

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
        sizes = _status_sizes_kib()
        peak_kib = sizes.get("VmHWM") if self.resets_peak else _max_rss_kib()
        return Memory(rss_kib=sizes.get("VmRSS"), peak_rss_kib=peak_kib)

    @staticmethod
    def _try_reset() -> bool:
        try:
            descriptor = os.open(CLEAR_REFS, os.O_WRONLY)
        except OSError:
            return False
        try:
            return os.write(descriptor, RESET_PEAK) > 0
        except OSError:
            return False
        finally:
            os.close(descriptor)


def _status_sizes_kib() -> dict[str, int]:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    return {name: int(value.split()[0]) for name, _, value in fields}


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
        if self._vcgencmd is None:
            return None
        try:
            done = subprocess.run(
                [self._vcgencmd, *question],
                capture_output=True,
                text=True,
                timeout=VCGENCMD_TIMEOUT_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            self._vcgencmd = None  # no permission, or no such firmware: do not try again
            return None
        _, equals, value = done.stdout.strip().partition("=")
        return value if equals else None


def _scaled(path: Path, factor: float) -> float | None:
    try:
        return int(path.read_text()) * factor
    except (OSError, ValueError):
        return None
