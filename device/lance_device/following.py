"""Following a run from outside: only its folder is read, and nothing in it is locked or written."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from lance_device.run_folder import RunFolder
from lance_edge.errors import DataError
from lance_edge.report.views import Files, View

LOCKS = Path("/proc/locks")
ENDED = ("finished", "interrupted", "failed")
PATIENCE_S = 30.0  # without a new row and without a process, before a run counts as lost


@dataclass(frozen=True)
class Sight:
    """How a run stands: `waiting`, `running`, `finished`, `interrupted`, `failed` or `lost`."""

    state: str
    is_new: bool

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to be expected."""
        return self.state in (*ENDED, "lost")


class Follower:
    """Reads what a run writes, as it writes it; it may be there before the run, and after its end.

    Raises:
        DataError: if the path is a file.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(PermissionError):  # reading will say so
            if path.exists() and not path.is_dir():
                raise DataError(f"{path}: expected a run's folder, found a file; name the --out of train")
        folder = RunFolder(path)
        name = path.resolve().name or "run"
        self.path = path
        self._files = (folder.steps, folder.history, folder.record)
        self.view = View(Files(name, *self._files))
        self._changed_at = time.monotonic()
        self._has_looked = False

    def look(self) -> Sight:
        """Read what is new.

        Raises:
            DataError: naming file, line and column of what cannot be read.
        """
        is_new = self.view.update()
        if is_new:  # to the first look all is new, however old
            self._changed_at = time.monotonic() - (0.0 if self._has_looked else self._age_s())
        self._has_looked = True
        self.view.is_lost = False  # so that its status is what the record says
        state = self._state()
        self.view.is_lost = state == "lost"
        return Sight(state, is_new)

    def _age_s(self) -> float:
        """How long ago the run wrote."""
        written = [path.stat().st_mtime for path in self._files if path.exists()]
        return max(0.0, time.time() - max(written, default=0.0))

    def _state(self) -> str:
        status = self.view.status
        if status in ENDED:
            return str(status)
        if status is None and self.view.is_empty:
            return "waiting"
        is_quiet = time.monotonic() - self._changed_at >= PATIENCE_S
        return "lost" if is_quiet and is_held(self.path) is False else "running"


def is_held(folder: Path) -> bool | None:
    """Whether a process on this machine trains into the folder; `None` where the system does not say.

    Read from the kernel's list of locks: trying the lock would stand in the way of a run that begins.
    """
    try:
        inode = folder.stat().st_ino
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return None
    # 1: FLOCK  ADVISORY  WRITE 1234 fd:01:393228 0 EOF
    return any("FLOCK" in line and f":{inode} " in line for line in lines)
