"""What the command lines of the benchmarks have in common."""

import argparse
from pathlib import Path

from lance_edge.counts import parse_counts
from lance_edge.errors import StorageError


def counts(text: str) -> tuple[int, ...]:
    """`4`, `2,4` or `1-10`."""
    found = parse_counts(text)
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"expected counts from 1 such as 4, 2,4 or 1-10, found {text!r}")
    return found


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def make_folder(out: Path) -> None:
    """Make the folder of the figures, before minutes are spent on them.

    Raises:
        StorageError: if it holds files already, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_in_use = any(out.iterdir())
    except OSError as error:
        raise StorageError(
            f"--out {out}: cannot make this folder ({error.strerror}); name another one"
        ) from None
    if is_in_use:
        raise StorageError(f"--out {out}: expected a new or empty folder, found files in it; name another one")
