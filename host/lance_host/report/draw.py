"""Figures drawn by matplotlib: SVG to stand in a page, PNG to stand alone."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lance_edge.report.colours import INK, RULE, SOFT, hatched_key
from lance_edge.report.plots import Bar, BarPlot, Line, LinePlot, Plot
from lance_host.log_axis import plain_log

# Inches at 72 points each: 302 points become some 340 pixels on a phone, so text of 9.5 points is 10.7 there.
WIDTH, HEIGHT = 4.2, 3.0
PNG_DPI = 220
STYLES: dict[str, Any] = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1, 1.5)), "points": ""}
MARKS: dict[str, dict[str, Any]] = {
    "solid": {"marker": "o", "markersize": 3.6},
    "dashed": {"marker": "o", "markersize": 4.4, "markerfacecolor": "white"},
    "dotted": {"marker": "x", "markersize": 4},
}
MOST_MARKED = 12  # points of a line
BAND_STRENGTH = 0.16
HEADROOM = 1.04  # above the highest value: a level line has no range that margins could be part of
BAR_WIDTH = 0.84  # of a group, that its bars fill
HATCH = "////"
MOST_NAMED_GROUPS = 12  # more names do not fit side by side
LETTERS_ACROSS = 42  # of names side by side
TURNED_LETTERS = 14  # of a name that is turned, as those of several groups are where they are long

SETTINGS: dict[Any, Any] = {  # matplotlib's own type is a list of every setting there is
    "svg.fonttype": "none",  # text stays text: small, and the reader's own font
    "svg.hashsalt": "lance-edge",  # the same figure gives the same bytes
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a name may have a $
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def svg(plot: Plot) -> str:
    """The figure as an `<svg>` element without title and legend, which the page has in text of its own."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        _draw(figure.subplots(), plot)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _embeddable(buffer.getvalue().decode(), plot)


def png(plot: Plot) -> bytes:
    """The figure as a picture with title and legend, on white."""
    buffer = io.BytesIO()
    keys = _legend_keys(plot)
    rows = -(-len(keys) // 3)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH + 1, HEIGHT + 0.6 + 0.18 * rows), layout="constrained")
        axes = figure.subplots()
        _draw(axes, plot)
        axes.set_title(plot.title, fontsize=9.5, loc="left")
        figure.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=7.5)
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, plot: Plot) -> None:
    axes.set_xlabel(plot.x_title)
    axes.set_ylabel(plot.y_title)
    if isinstance(plot, LinePlot):
        _draw_lines(axes, plot)
    else:
        _draw_bars(axes, plot)


def _draw_lines(axes: Axes, plot: LinePlot) -> None:
    for start, end in plot.shaded:
        axes.axvspan(start, end, color="#f6c9b3", linewidth=0)
    for line in plot.lines:
        _draw_line(axes, line)
    for height, _ in plot.rules:
        axes.axhline(height, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
    if plot.x_is_log:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for line in plot.lines for x in line.x):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if plot.y_is_log:
        axes.set_yscale("log")
    elif plot.y_from_zero:
        axes.set_ylim(0, HEADROOM * axes.get_ylim()[1])
    axes.margins(x=0.03)
    if plot.x_from_zero:
        axes.set_xlim(left=0)
    for axis, is_log in ((axes.xaxis, plot.x_is_log), (axes.yaxis, plot.y_is_log)):
        if is_log:
            plain_log(axis)
    for height, label in plot.rules:
        _name_rule(axes, height, label)


def _name_rule(axes: Axes, height: float, label: str) -> None:
    """At the right end, where curves have levelled off, on the roomier side of the line, on white."""
    low, high = axes.get_ylim()
    is_low = height - low < high - height
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "xytext": (0, 4 if is_low else -4),
        "textcoords": "offset points",
        "ha": "right",
        "va": "bottom" if is_low else "top",
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
    }
    axes.annotate(label, (0.99, height), fontsize=8.5, color=SOFT, **place)


def _draw_line(axes: Axes, line: Line) -> None:
    if line.style == "points":
        axes.plot(line.x, line.y, "o", color=line.colour, markersize=7, markeredgecolor="white")
        return
    marks: dict[str, Any] = MARKS[line.style] if len(line.x) <= MOST_MARKED else {}
    axes.plot(line.x, line.y, linestyle=STYLES[line.style], color=line.colour, **marks)
    if line.low:
        axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=BAND_STRENGTH, linewidth=0)


def _draw_bars(axes: Axes, plot: BarPlot) -> None:
    for place, group in enumerate(plot.groups):
        width = BAR_WIDTH / max(len(group.bars), 2)
        for number, bar in enumerate(group.bars):
            _draw_bar(axes, bar, place + (number - (len(group.bars) - 1) / 2) * width, width)
    _name_places(axes, [group.label for group in plot.groups])
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.6, len(plot.groups) - 0.4)
    axes.set_ylim(bottom=0)


def _draw_bar(axes: Axes, bar: Bar, middle: float, width: float) -> None:
    bottom = 0.0
    for height, colour in zip(bar.parts, bar.colours, strict=True):
        axes.bar(middle, height, width * 0.9, bottom, color=colour, linewidth=0)
        bottom += height
    if bar.is_hatched:
        axes.bar(middle, bottom, width * 0.9, fill=False, edgecolor=INK, linewidth=0, hatch=HATCH)
    if bar.spread is not None:
        axes.plot([middle, middle], bar.spread, color=INK, linewidth=0.8, alpha=0.75)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // MOST_NAMED_GROUPS)
    places = range(0, len(names), step)
    letters = int(LETTERS_ACROSS / len(places))
    is_turned = max(len(names[place]) for place in places) > letters and len(places) > 2
    shown = [_shortened(names[place], TURNED_LETTERS if is_turned else letters) for place in places]
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if is_turned else {}
    axes.set_xticks(list(places), shown, **turned)


def _shortened(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"


def _legend_keys(plot: Plot) -> list[Any]:
    if isinstance(plot, BarPlot):
        keys = [Patch(color=colour, label=label) for label, colour in plot.keys]
        hatched: dict[str, Any] = {
            "facecolor": hatched_key(),
            "edgecolor": INK,
            "linewidth": 0,
        }
        return [*keys, Patch(label=plot.hatched, hatch=HATCH, **hatched)] if plot.hatched else keys
    return [
        Line2D([], [], color=line.colour, linestyle=STYLES[line.style], label=line.label,
               marker="o" if line.style == "points" else "")
        for line in plot.lines
        if line.label
    ]  # fmt: skip


def _with_own_ids(tag: str, name: str, used: set[str]) -> str:
    """A tag of a figure; its texts, which may look like ids, are left alone."""
    tag = re.sub(r' id="([^"]+)"', lambda own: f' id="{name}-{own[1]}"' if own[1] in used else "", tag)
    return re.sub(r"url\(#|href=\"#", lambda reference: f"{reference[0]}{name}-", tag)


def _embeddable(text: str, plot: Plot) -> str:
    """The element alone; ids that are referred to become the figure's own, others go."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r"<[^>]+>", lambda tag: _with_own_ids(tag[0], plot.name, used), text)
    head, rest = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]+"', head)
    opening = f'<svg {view_box[0] if view_box else ""} role="img" aria-label="{escape(plot.title)}"'
    return f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">{rest.strip()}'
