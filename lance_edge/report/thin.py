"""Series of any length in a bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

MOST_POINTS = 200  # of a figure on a phone, every second pixel


@dataclass(frozen=True)
class Point:
    """Neighbouring values of a series: at `x` (the last of theirs) their mean, the lowest and the highest."""

    x: float
    mean: float
    low: float
    high: float


@dataclass
class _Bucket:
    x: float
    total: float
    count: int
    low: float
    high: float

    def merge(self, later: "_Bucket") -> None:
        self.x = later.x
        self.total += later.total
        self.count += later.count
        self.low, self.high = min(self.low, later.low), max(self.high, later.high)

    @property
    def point(self) -> Point:
        return Point(self.x, self.total / self.count, self.low, self.high)


class Thin:
    """Keeps all values up to `most`; of more, means and extremes of every two, then every four, and so on."""

    def __init__(self, most: int = MOST_POINTS) -> None:
        """`most`: points that are kept, an even number."""
        self._most, self._stride = most, 1
        self._buckets: list[_Bucket] = []

    def __len__(self) -> int:
        return len(self._buckets)

    def add(self, x: float, y: float | None) -> None:
        """One more value; unknown ones leave no trace."""
        if y is None:
            return
        value = _Bucket(x, y, 1, y, y)
        if self._buckets and self._buckets[-1].count < self._stride:
            self._buckets[-1].merge(value)
            return
        if len(self._buckets) == self._most:
            self._halve()
        self._buckets.append(value)

    def points(self) -> tuple[Point, ...]:
        """What is kept, in the order in which it came."""
        return tuple(bucket.point for bucket in self._buckets)

    def _halve(self) -> None:
        pairs: Iterator[tuple[_Bucket, _Bucket]] = zip(self._buckets[::2], self._buckets[1::2], strict=True)
        merged = []
        for first, second in pairs:
            first.merge(second)
            merged.append(first)
        self._buckets, self._stride = merged, 2 * self._stride
