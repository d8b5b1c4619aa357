"""Memory: of the process over time, and of benchmarks by layers."""

from collections.abc import Callable, Sequence

from lance_edge.report.clock import TimeAxis, time_axis
from lance_edge.report.colours import method_colour, run_colours, shade
from lance_edge.report.costs import Costs, Setting
from lance_edge.report.names import benchmarks_of, distinct, method_name, runs_of
from lance_edge.report.plots import Line, LinePlot, Section, Style, slug
from lance_edge.report.thin import Thin
from lance_edge.report.views import View

KIB, MIB = 1024, 1 << 20
RSS_STRENGTH = 0.5


def memory_use(views: Sequence[View]) -> Section:
    """Resident memory and its high-water marks."""
    plots = [_over_time(runs_of(views))]
    for view in benchmarks_of(views):
        plots += [
            _by_layers(view, "peak-rss", "peak resident memory", _peak_mib, "peak RSS (VmHWM), MiB", False),
            _by_layers(
                view, "activation-bytes", "activation bytes", _activation_kib, "activation bytes, KiB", True
            ),
        ]
    return Section(
        "Memory",
        "What the process takes of the board's memory, the Python interpreter and the runtime included.",
        tuple(plot for plot in plots if not plot.is_empty),
        missing="This machine does not tell the memory of a process.",
    )


def _over_time(runs: Sequence[View]) -> LinePlot:
    colours, axis = run_colours([view.method for view in runs]), time_axis(runs)
    lines = []
    for view, colour in zip(runs, colours, strict=True):
        lines.append(_line(f"{view.name}, peak (VmHWM)", colour, view.peak_mib, "high", axis))
        lines.append(_line(f"{view.name}, at the end", shade(colour, RSS_STRENGTH), view.rss_mib, "mean", axis))
    rises = any("only rises" in view.fact_text("peak_rss_source") for view in runs)
    reset = (
        "the highest since the process began, since this system lets nobody reset it"
        if rises
        else "reset before each phase, so it falls again"
    )
    return LinePlot(
        "memory-time",
        "Memory over time",
        f"Strong: the kernel's high-water mark during a step or evaluation ({reset}). Pale: resident memory at"
        " its end.",
        axis.label,
        "resident memory, MiB",
        tuple(line for line in lines if line.x),
        y_from_zero=True,
        x_from_zero=True,
    )


def _line(label: str, colour: str, series: Thin, which: str, axis: TimeAxis) -> Line:
    points = series.points()
    x = axis.values([point.x for point in points])
    return Line(label, colour, x, tuple(getattr(point, which) for point in points))


def _peak_mib(costs: Costs) -> float | None:
    return None if costs.peak_rss_kib is None else costs.peak_rss_kib / KIB


def _activation_kib(costs: Costs) -> float | None:
    return costs.activation_bytes / KIB if costs.activation_bytes else None


def _by_layers(
    view: View, name: str, title: str, figure: Callable[[Costs], float | None], y_label: str, y_is_log: bool
) -> LinePlot:
    """Of each method the largest over micro-batches, by number of layers; else by micro-batch."""
    has_layers = len({setting.layers for setting in view.measured()}) > 1

    def place(setting: Setting) -> int:
        return setting.layers if has_layers else setting.micro_batch

    lines: list[Line] = []
    for method in distinct([setting.method for setting in view.measured()]):
        highest: dict[int, float] = {}
        for setting, costs in view.measured().items():
            value = figure(costs)
            if setting.method == method and value is not None:
                highest[place(setting)] = max(highest.get(place(setting), 0.0), value)
        if highest:
            x = tuple(float(number) for number in sorted(highest))
            y = tuple(highest[number] for number in sorted(highest))
            hides_another = any((line.x, line.y) == (x, y) for line in lines)
            style: Style = "dashed" if hides_another else "solid"
            lines.append(Line(method_name(method), method_colour(method), x, y, style))
    return LinePlot(
        f"{name}-{slug(view.name)}",
        f"{view.name}: {title}",
        "Each setting ran in a process of its own."
        if name == "peak-rss"
        else "What a method keeps of the trained layers' inputs for a whole batch.",
        "trained layers" if has_layers else "micro-batch, images",
        y_label,
        tuple(lines),
        y_from_zero=not y_is_log,
        y_is_log=y_is_log,
    )
