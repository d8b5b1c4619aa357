"""What the kernel says of this machine: board, processor, governor of the clock."""

from pathlib import Path

MODEL = Path("/proc/device-tree/model")  # Raspberry Pi 4 Model B Rev 1.4, and a zero byte
CPU_INFO = Path("/proc/cpuinfo")  # ends with an entry Model on a Raspberry Pi
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_self() -> str | None:
    """What this machine calls itself, `None` where it does not say."""
    return _text(MODEL) or cpu_entries().get("Model")


def cpu_entries() -> dict[str, str]:
    """The entries of /proc/cpuinfo, of every name the last; empty where there is no such file."""
    lines = (_text(CPU_INFO) or "").splitlines()
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def governor() -> str | None:
    """What decides the processor's clock: `ondemand`, `performance`, `powersave`, ..."""
    return _text(GOVERNOR)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0 \n") or None
    except OSError:
        return None
