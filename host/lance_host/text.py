"""Text for people: aligned columns, sizes with units."""

import math
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from lance_edge.units import plural

WIDTH = 120
GAP = "  "
LABEL_WIDTH = 20


def human_bytes(number: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `512 B`, `5.86 MiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{number} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def one_line(error: Exception) -> str:
    """The kind of an exception and the last line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def human_macs(number: int) -> str:
    """Multiply-adds in the largest decimal unit that leaves at least 1: `512`, `12.3 M`, `1.20 G`."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(number)


def fact(label: str, text: str) -> list[str]:
    """`label  text`, wrapped under itself; at most three lines, the rest is cut with `...`."""
    lines = textwrap.wrap(text, WIDTH - LABEL_WIDTH, max_lines=3, placeholder=" ...") or ["-"]
    return [f"{label if i == 0 else '':<{LABEL_WIDTH}}{line}" for i, line in enumerate(lines)]


def grid(columns: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines with a rule under the heading: the first column to the left, the others right."""
    widths = [width(column) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        lines.append(GAP.join([first, *others]).rstrip())
    return [lines[0], "-" * (sum(widths) + len(GAP) * (len(widths) - 1)), *lines[1:]]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as one cell in which the modes stand under each other; some may have fewer of them."""
    widths = [width(column) for column in zip_longest(*rows, fillvalue="")]
    return [" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in rows]


def shorten(name: str, width: int) -> str:
    """At most `width` characters, cut in the middle: both ends tell layers apart."""
    if len(name) <= width:
        return name
    head = (width - 3) // 3
    return f"{name[:head]}...{name[head + 3 - width :]}"


def width(column: Sequence[str]) -> int:
    """Characters of the longest cell."""
    return max(map(len, column))


def percent(share: float) -> str:
    """Whole percent, rounded down so that 100 means all; a share short by rounding only is not cut."""
    return str(math.floor(share * 100 + 1e-6))


def ratio(whole: int, part: int) -> str:
    """`31.8x`, or `-` where there is nothing to divide by."""
    return f"{whole / part:.1f}x" if part else "-"


def count(number: int, noun: str) -> str:
    """`1 batch`, `1,024 batches`."""
    return f"{number:,} {plural(number, noun)}"
