"""Numbers as people write them on a command line: counts `1-10` and `1,2,4,8`, sizes `256KiB` and `2GB`."""

import math
import re

MOST = 3  # digits
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_counts(text: str) -> tuple[int, ...]:
    """`2,4,6-8` to `(2, 4, 6, 7, 8)`, ascending, each once; empty for what is not understood.

    Examples:
        >>> parse_counts("8,2-4,3")
        (2, 3, 4, 8)
        >>> parse_counts("4-2")
        ()
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(rf"(\d{{1,{MOST}}})(?:-(\d{{1,{MOST}}}))?", part.strip(), re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            return ()
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def parse_bytes(text: str) -> int | None:
    """`512MiB`, `1.5 GB` or `4096` in bytes, rounded down; `None` for what is not understood.

    Examples:
        >>> parse_bytes("1.5 KiB"), parse_bytes("2GB")
        (1536, 2000000000)
    """
    match = re.fullmatch(r"([0-9.]+) ?([KMG]?i?B|)", text.strip(), re.ASCII)
    try:
        number = float(match[1]) if match is not None else math.nan
    except ValueError:
        return None
    if match is None or match[2] not in UNITS or not math.isfinite(number):
        return None
    return int(number * UNITS[match[2]])
