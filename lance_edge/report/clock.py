"""Axes of time in a unit that suits a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from lance_edge.report.views import View

UNITS = (("seconds", 1.0, 300.0), ("minutes", 60.0, 18_000.0), ("hours", 3600.0, float("inf")))


@dataclass(frozen=True)
class TimeAxis:
    """`label` names the unit, of which one has so many seconds."""

    label: str
    unit_s: float

    def values(self, seconds: Sequence[float]) -> tuple[float, ...]:
        """In this unit."""
        return tuple(second / self.unit_s for second in seconds)


def time_axis(runs: Sequence[View]) -> TimeAxis:
    """For the longest of these runs."""
    longest = max((row.time_s for view in runs for row in view.latest.values()), default=0.0)
    name, unit_s = next((name, unit_s) for name, unit_s, most_s in UNITS if longest <= most_s)
    return TimeAxis(f"{name} of training", unit_s)
