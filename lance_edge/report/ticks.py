"""Round numbers for axes, the same whoever draws."""

import math
from collections.abc import Iterable

TICKS = 5
FEWEST_TICKS = 3  # of 1, 2 and 5 times powers of ten, before linear ones are looked for


def ticks(low: float, high: float) -> list[float]:
    """Some five numbers within."""
    step = round_step((high - low) / TICKS)
    first = math.ceil(low / step - 1e-9)
    return _within(low, high, (step * number for number in range(first, first + 2 * TICKS)))


def log_ticks(low: float, high: float) -> list[float]:
    """Of a logarithmic axis, `low < high`: those of a linear one where 1, 2 and 5 hardly are within."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    found = _within(low, high, (step * 10.0**exponent for exponent in exponents for step in steps))
    return found if len(found) >= FEWEST_TICKS else max(found, ticks(low, high), key=len)


def round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _within(low: float, high: float, values: Iterable[float]) -> list[float]:
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
