"""Logarithmic axes of all pictures that the host draws."""

from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from lance_edge.report.ticks import log_ticks


def plain_log(axis: Axis) -> None:
    """Numbers as they are, not as powers, and all of them major ticks: minor ones stand nearer to the axis."""
    axis.set_major_locator(FixedLocator(log_ticks(*sorted(axis.get_view_interval()))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
