"""Where the time of a step goes: a stacked bar for each method and number of layers (the paper's figure 5)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from lance_edge.profiles import STEP_PHASES
from lance_edge.report.colours import METHODS, PHASES, PLAIN, method_colour, shade
from lance_edge.report.costs import Costs, Setting
from lance_edge.report.names import COMPUTED, benchmarks_of, distinct, features, method_name, runs_of
from lance_edge.report.plots import Bar, BarGroup, BarPlot, Line, LinePlot, Plot, Section, slug
from lance_edge.report.views import View

STACKED = (
    "Medians of the phases, stacked, which need not add up to the median of the step; the thin line spans the"
    " fastest step and the 90th percentile."
)
FEWEST_FOR_A_LINE = 3


def time_use(views: Sequence[View]) -> Section:
    """Bars of all runs of a machine, and of every benchmark."""
    runs = runs_of(views)
    machines = dict.fromkeys(view.machine for view in runs)
    several = len({view.machine.key for view in views}) > 1
    plots: list[Plot] = []
    for number, machine in enumerate(machines):
        title = "Time of a step" + (f", {machine.label}" if several else "")
        own = [view for view in runs if view.machine == machine]
        plots.append(_run_bars(own, "step-time-runs" + (f"-{number + 1}" if number else ""), title))
    for view in benchmarks_of(views):
        plots.extend(_benchmark_plots(view))
    return Section(
        "Time",
        "What a training step takes, and which phase takes it. Colour is the method, strength the phase.",
        tuple(plot for plot in plots if not plot.is_empty),
        missing="No step was measured yet, apart from warm-ups.",
    )


def _run_bars(runs: Sequence[View], name: str, title: str) -> BarPlot:
    """Hatched are bars of which others, plain, say what the cache saved."""
    names = {features(setting) for view in runs for setting in view.measured()}
    hatched = COMPUTED if len(names) > 1 else ""
    groups = []
    for view in runs:
        measured = [(setting, costs) for setting, costs in view.measured().items() if "step" in costs.phases()]
        bars = [_bar(setting, costs, bool(hatched) and not setting.cached) for setting, costs in measured]
        if bars:
            groups.append(BarGroup(view.name, tuple(bars)))
    note = " Hatched: the frozen part computed the features; plain: they were read from the cache."
    return BarPlot(
        name,
        title,
        STACKED + note * bool(hatched),
        "run",
        "time, ms a step",
        STEP_PHASES,
        tuple(groups),
        _keys(view.method for view in runs),
        hatched,
    )


def _bar(setting: Setting, costs: Costs, is_hatched: bool = False) -> Bar:
    phases = costs.phases()
    colour = method_colour(setting.method)
    step = phases["step"]
    return Bar(
        f"{method_name(setting.method)}, {features(setting)}",
        tuple(phases[phase].p50_ms if phase in phases else 0.0 for phase in STEP_PHASES),
        tuple(shade(colour, PHASES[phase]) for phase in STEP_PHASES),
        (step.min_ms, step.p90_ms) if step.n > 1 else None,
        is_hatched,
    )


def _keys(methods: Iterable[str]) -> tuple[tuple[str, str], ...]:
    names = distinct(list(methods))
    ordered = [method for method in METHODS if method in names]
    ordered += [method for method in names if method not in METHODS]
    return (
        *((method_name(method), method_colour(method)) for method in ordered),
        *((phase, shade(PLAIN, PHASES[phase])) for phase in STEP_PHASES),
    )


def _benchmark_plots(view: View) -> list[Plot]:
    """For each way to measure, over numbers of layers; over micro-batches if there is but one number."""
    axis = "layers" if len({setting.layers for setting in view.measured()}) > 1 else "micro_batch"
    families: dict[Setting, dict[Setting, Costs]] = {}
    for setting, costs in view.measured().items():
        family = replace(setting, method="")
        family = replace(family, layers=0) if axis == "layers" else replace(family, micro_batch=0)
        families.setdefault(family, {})[setting] = costs
    several = len(families) > 1
    plots: list[Plot] = []
    for number, members in enumerate(families.values(), start=1):
        title = _family_title(view, next(iter(members)), axis, several)
        name = f"step-time-{slug(view.name)}" + (f"-{number}" if several else "")
        plots += [
            _family_bars(members, axis, name, title),
            _family_lines(members, axis, f"{name}-lines", title),
        ]
    return plots


def _family_title(view: View, setting: Setting, axis: str, several: bool) -> str:
    parts = [features(setting)]
    if several and axis == "layers":
        parts.append(f"micro-batch {setting.micro_batch}")
    return f"{view.name}: time of a step, {', '.join(parts)}"


def _axis_of(axis: str) -> tuple[str, Callable[[Setting], int]]:
    if axis == "layers":
        return "trained layers", lambda setting: setting.layers
    return "micro-batch, images", lambda setting: setting.micro_batch


def _family_bars(members: dict[Setting, Costs], axis: str, name: str, title: str) -> BarPlot:
    label, place = _axis_of(axis)
    groups = []
    for number in sorted({place(setting) for setting in members}):
        own = {setting: costs for setting, costs in members.items() if place(setting) == number}
        bars = [_bar(setting, costs) for setting, costs in _by_method(own) if "step" in costs.phases()]
        groups.append(BarGroup(str(number), tuple(bars)))
    keys = _keys(setting.method for setting in members)
    return BarPlot(name, title, STACKED, label, "time, ms a step", STEP_PHASES, tuple(groups), keys)


def _by_method(members: dict[Setting, Costs]) -> list[tuple[Setting, Costs]]:
    order = [*METHODS, *(setting.method for setting in members)]
    return sorted(members.items(), key=lambda item: order.index(item[0].method))


def _family_lines(members: dict[Setting, Costs], axis: str, name: str, title: str) -> LinePlot:
    label, place = _axis_of(axis)
    lines = []
    for method in distinct([setting.method for setting, _ in _by_method(members)]):
        own = sorted(
            (place(setting), step)
            for setting, costs in members.items()
            if setting.method == method and (step := costs.phases().get("step")) is not None
        )
        if len(own) >= FEWEST_FOR_A_LINE:
            x = tuple(float(number) for number, _ in own)
            low, high = tuple(step.min_ms for _, step in own), tuple(step.p90_ms for _, step in own)
            y = tuple(step.p50_ms for _, step in own)
            lines.append(Line(method_name(method), method_colour(method), x, y, low=low, high=high))
    return LinePlot(
        name,
        f"{title}, by method",
        "Median of the whole step; a pale band spans the fastest step and the 90th percentile.",
        label,
        "time, ms a step",
        tuple(lines),
        y_from_zero=True,
    )
