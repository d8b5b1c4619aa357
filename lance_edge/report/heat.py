"""How the board fared: temperature, clock, throttling."""

from collections.abc import Sequence

from lance_edge.report.clock import TimeAxis, time_axis
from lance_edge.report.colours import run_colours
from lance_edge.report.names import runs_of
from lance_edge.report.plots import Line, LinePlot, Section
from lance_edge.report.thin import Thin
from lance_edge.report.views import View


def heat(views: Sequence[View]) -> Section:
    """Temperature and clock over time; stretches in which the firmware throttled are marked."""
    runs = runs_of(views)
    axis = time_axis(runs)
    stretches = [stretch for view in runs for stretch in _stretches(view.throttled)]
    shaded = tuple((start / axis.unit_s, end / axis.unit_s) for start, end in stretches)
    marked = " Marked: the firmware throttled the processor or saw too low a voltage." if shaded else ""
    plots = (
        LinePlot(
            "temperature-time",
            "Temperature",
            f"Of the processor, as the board says.{marked}",
            axis.label,
            "temperature, °C",
            _lines(runs, "temperature_c", axis),
            shaded=shaded,
        ),
        LinePlot(
            "clock-time",
            "Clock",
            f"Of the processor's cores; throttling lowers it.{marked}",
            axis.label,
            "clock, MHz",
            _lines(runs, "arm_mhz", axis),
            y_from_zero=True,
            shaded=shaded,
        ),
    )
    return Section(
        "Heat and throttling",
        "Whether the board grew too hot, or its power supply too weak, to keep its pace.",
        tuple(plot for plot in plots if not plot.is_empty),
        missing="The machine said neither its temperature nor its clock (a Raspberry Pi does), so throttling"
        " would not show here.",
    )


def _lines(runs: Sequence[View], series: str, axis: TimeAxis) -> tuple[Line, ...]:
    colours = run_colours([view.method for view in runs])
    lines = []
    for view, colour in zip(runs, colours, strict=True):
        points = getattr(view, series).points()
        if points:
            x, y = axis.values([point.x for point in points]), tuple(point.mean for point in points)
            lines.append(Line(view.name, colour, x, y))
    return tuple(lines)


def _stretches(flags: Thin) -> tuple[tuple[float, float], ...]:
    """Seconds from and to which the flag was up; a stretch begins where the point before it ended."""
    stretches: list[tuple[float, float]] = []
    before = 0.0
    for point in flags.points():
        if point.high > 0:
            joins = bool(stretches) and stretches[-1][1] == before
            start = stretches.pop()[0] if joins else before
            stretches.append((start, point.x))
        before = point.x
    return tuple(stretches)
