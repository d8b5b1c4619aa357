"""What memory there is, and a bound on it, so that a lack is an error within this process and not its end.

Linux hands out more memory than there is and kills who touches it.  Below the bound an allocation fails at
once, and the run ends in one line with its last complete step saved.
"""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# Control groups, version 2 and 1: folder below GROUPS, what a group may use, what it uses, and in memory.stat
# what of that is files in memory, which the kernel takes back when it needs to.
GROUP_FILES = {
    "": ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": (
        *("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
    ),
}


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within the block, data of this process (as `RLIMIT_DATA` counts them) grow by what is free at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data = status_bytes("VmData", "VmStk")
    if data is None:
        yield
        return
    bound = data + free_bytes()
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def status_bytes(*names: str) -> int | None:
    """Entries of /proc/self/status (`VmData`, `VmPeak`), added up; `None` where there is no such file."""
    prefixes = tuple(f"{name}:" for name in names)
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(prefixes))


def free_bytes() -> int:
    """Memory that this process can still get: of the machine, and of its control groups."""
    free = [int(psutil.virtual_memory().available)]
    free += [limit - used for limit, used in _group_memory()]
    return max(0, min(free))


def group_limit_bytes() -> int | None:
    """What the control groups leave to this process, the tightest of them; `None` if there is no limit.

    That is a group's limit without what others in it use.
    """
    own = status_bytes("RssAnon") or 0
    total = psutil.virtual_memory().total
    left = [limit - max(0, used - own) for limit, used in _group_memory() if limit < total]
    return max(0, min(left)) if left else None


def _group_memory() -> Iterator[tuple[int, int]]:
    """`(limit, use)` of every group from this process's own up to the root, where there is a limit."""
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            kind = next((kind for kind in controllers.split(",") if kind in GROUP_FILES), None)
            if kind is None:
                continue
            folder, limit_name, used_name, files = GROUP_FILES[kind]
            group = Path(path.lstrip("/"))
            for parent in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    base = GROUPS / folder / parent
                    used = int((base / used_name).read_text()) - _entries(base / "memory.stat", files)
                    yield int((base / limit_name).read_text()), used


def _entries(path: Path, names: tuple[str, ...]) -> int:
    """The sum of some lines `name value` of a file."""
    pairs = (line.split() for line in path.read_text().splitlines())
    return sum(int(value) for name, value in pairs if name in names)
