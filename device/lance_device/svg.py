"""Figures as SVG, drawn without a plotting library: the board has none."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from lance_edge.report.colours import INK, RULE, SOFT
from lance_edge.report.plots import Bar, BarPlot, Line, LinePlot, Plot
from lance_edge.report.ticks import log_ticks, ticks

WIDTH, HEIGHT = 360, 250  # units of the picture, of which a phone shows one as about one pixel
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
FONT = 11
DASHES = {"solid": "", "dashed": ' stroke-dasharray="5 3"', "dotted": ' stroke-dasharray="1.5 2.5"'}
MOST_MARKED = 12  # points of a line
BAR_SHARE = 0.84  # of a group, that its bars fill
MOST_NAMES = 12
HATCH_GAP = 6


@dataclass(frozen=True)
class Scale:
    """From values to units of the picture: `start` and `end` are where the lowest and the highest stand."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies outside is put on the edge."""
        low, high, value = (self._measure(number) for number in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def _measure(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.is_log else value

    def ticks(self) -> list[float]:
        """Round numbers within."""
        return log_ticks(self.low, self.high) if self.is_log else ticks(self.low, self.high)


def svg(plot: Plot) -> str:
    """The figure as an `<svg>` element, without title and legend."""
    body = _bars(plot) if isinstance(plot, BarPlot) else _lines(plot)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}"'
        f' font-size="{FONT}" fill="{INK}">{"".join(body)}{_labels(plot)}</svg>'
    )


def _lines(plot: LinePlot) -> list[str]:
    xs = [x for line in plot.lines for x in line.x]
    ys = [y for line in plot.lines for y in (*line.y, *line.low, *line.high)]
    across = _scale(xs, LEFT, WIDTH - RIGHT, plot.x_from_zero, plot.x_is_log)
    up = _scale([*ys, *(y for y, _ in plot.rules)], HEIGHT - BOTTOM, TOP, plot.y_from_zero, plot.y_is_log)
    parts = [
        f'<rect x="{across(a):.1f}" y="{TOP}" width="{max(across(b) - across(a), 1):.1f}"'
        f' height="{HEIGHT - BOTTOM - TOP}" fill="#f6c9b3"/>'
        for a, b in plot.shaded
    ]
    parts += _grid(up) + _x_axis(across, [(tick, number_text(tick)) for tick in across.ticks()])
    for line in plot.lines:
        parts += _line(line, across, up)
    for height, label in plot.rules:
        y = up(height)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{SOFT}" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{LEFT + 3}" y="{y - 3:.1f}" fill="{SOFT}">{escape(label)}</text>')
    return parts


def _line(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> list[str]:
    points = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True)]
    if line.style == "points":
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{line.colour}"/>' for x, y in points]
    parts = []
    if line.low:
        edge = [*zip(line.x, line.high, strict=True), *reversed(list(zip(line.x, line.low, strict=True)))]
        outline = _path((across(x), up(y)) for x, y in edge)
        parts.append(f'<path d="{outline}Z" fill="{line.colour}" fill-opacity=".16"/>')
    if len(points) <= MOST_MARKED:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.colour}"/>' for x, y in points]
    style = f'fill="none" stroke="{line.colour}" stroke-width="2" stroke-linejoin="round"{DASHES[line.style]}'
    return [*parts, f'<path d="{_path(points)}" {style}/>']


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _bars(plot: BarPlot) -> list[str]:
    tops = [max(sum(bar.parts), *(bar.spread or (0.0,))) for group in plot.groups for bar in group.bars]
    up = _scale(tops, HEIGHT - BOTTOM, TOP, from_zero=True)
    across = Scale(-0.6, len(plot.groups) - 0.4, LEFT, WIDTH - RIGHT)
    step = -(-len(plot.groups) // MOST_NAMES)
    names = [(float(place), group.label) for place, group in enumerate(plot.groups) if place % step == 0]
    parts = _grid(up) + _x_axis(across, names)
    for place, group in enumerate(plot.groups):
        width = BAR_SHARE / max(len(group.bars), 2)
        for number, bar in enumerate(group.bars):
            middle = place + (number - (len(group.bars) - 1) / 2) * width
            edges = across(middle - 0.45 * width), across(middle + 0.45 * width)
            parts += _bar(bar, *edges, up)
            if bar.is_hatched:
                parts.append(_hatch(*edges, up(sum(bar.parts)), up(0.0)))
    return parts


def _hatch(left: float, right: float, top: float, bottom: float) -> str:
    """Strokes that rise to the right, cut off at the edges: a `<pattern>` would need an id of its own."""
    strokes, rise = [], right - left
    foot = bottom + rise
    while foot > top:
        low, high = min(foot, bottom), max(foot - rise, top)
        strokes.append(f"M{left + foot - low:.1f} {low:.1f}L{left + foot - high:.1f} {high:.1f}")
        foot -= HATCH_GAP
    return f'<path d="{"".join(strokes)}" stroke="{INK}" stroke-width=".8"/>' if strokes else ""


def _bar(bar: Bar, left: float, right: float, up: Callable[[float], float]) -> list[str]:
    parts, bottom = [], 0.0
    for height, colour in zip(bar.parts, bar.colours, strict=True):
        top = up(bottom + height)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{up(bottom) - top:.1f}"'
            f' fill="{colour}"/>'
        )
        bottom += height
    if bar.spread is not None:
        low, high = bar.spread
        middle = (left + right) / 2
        parts.append(f'<path d="M{middle:.1f} {up(low):.1f}V{up(high):.1f}" stroke="{INK}"/>')
    return parts


def _scale(
    values: Sequence[float], start: float, end: float, from_zero: bool = False, is_log: bool = False
) -> Scale:
    """With a little air; never of no length."""
    low, high = min(values), max(values)
    if is_log and low > 0:
        return Scale(low / 1.15, high * 1.15, start, end, is_log=True)
    air = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(0.0 if from_zero and low >= 0 else low - air, high + air, start, end)


def _grid(up: Scale) -> list[str]:
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{RULE}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{number_text(tick)}</text>')
    return parts


def _x_axis(across: Scale, names: Sequence[tuple[float, str]]) -> list[str]:
    y = HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{SOFT}"/>']
    room = int((WIDTH - LEFT - RIGHT) / max(len(names), 1) / (0.6 * FONT))  # letters for each name
    for place, name in names:
        short = name if len(name) <= room else name[: max(room - 1, 1)] + "…"
        parts.append(f'<text x="{across(place):.1f}" y="{y + 15}" text-anchor="middle">{escape(short)}</text>')
    return parts


def _labels(plot: Plot) -> str:
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    style = f'text-anchor="middle" fill="{SOFT}"'
    return (
        f'<text x="{middle_x}" y="{HEIGHT - 6}" {style}>{escape(plot.x_title)}</text>'
        f'<text transform="translate(11 {middle_y}) rotate(-90)" {style}>{escape(plot.y_title)}</text>'
    )


def number_text(value: float) -> str:
    """`1,500`, `0.25`."""
    return f"{value:,.6g}"
