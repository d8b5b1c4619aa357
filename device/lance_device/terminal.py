"""A few lines of a terminal that are written over and over.

Plain control sequences (ECMA-48: cursor up, erase), which every terminal since the VT100 knows.  `rich` would
bring 13 MB to the board's disk and 5 MiB to the process, a twentieth of what training takes altogether.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from typing import TextIO

ERASE_LINE, ERASE_BELOW = "\x1b[K", "\x1b[J"
FEWEST_COLUMNS = 20


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def speaks_unicode(stream: TextIO) -> bool:
    """Whether more than ASCII can be written."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


class Block:
    """The last lines of a terminal; what is printed above it scrolls away as usual."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = 0  # lines of the block that stand above the cursor

    def show(self, lines: Sequence[str]) -> None:
        """Write these lines in place of the ones before; what does not fit the terminal is cut off."""
        columns, rows = shutil.get_terminal_size()
        width = max(columns - 1, FEWEST_COLUMNS)  # a full line would wrap on some terminals
        fitting = [line[:width] for line in lines[: max(rows - 1, 1)]]
        self._write(self._back() + "".join(f"{line}{ERASE_LINE}\n" for line in fitting) + ERASE_BELOW)
        self._shown = len(fitting)

    def print(self, text: str) -> None:
        """A line that stays, in place of the block; the next `show` puts the block below it."""
        self._write(f"{self._back()}{ERASE_BELOW}{text}\n")
        self._shown = 0

    def clear(self) -> None:
        """Take the block away."""
        self._write(self._back() + ERASE_BELOW)
        self._shown = 0

    def _back(self) -> str:
        return f"\x1b[{self._shown}A\r" if self._shown else "\r"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody looks any more: a closed terminal is no reason to stop
            self._stream.write(text)
            self._stream.flush()
