"""The pictures of a reproduction, as PNG."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lance_edge.errors import PlatformError
from lance_edge.files import atomic_writer
from lance_edge.report.colours import METHODS, PLAIN

# A method has the colour of the reports; phases and what else there is: Okabe and Ito 2008.
PHASES = {
    "data": "#cc79a7",
    "prefix": "#bbbbbb",
    "forward": "#56b4e9",
    "backward": "#e69f00",
    "update": "#009e73",
}
COLOURS = {**METHODS, **PHASES, "head only": PLAIN}
OTHERS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

Point = tuple[float, float]


@dataclass(frozen=True)
class Axes:
    """What a picture shows.

    Attributes:
        bound: a dashed line at this height, with its name.
    """

    title: str
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    bound: tuple[float, str] | None = None


@dataclass(frozen=True)
class Panel:
    """One of the planes of a picture."""

    axes: Axes
    series: Mapping[str, Sequence[Point]]
    joined: bool = True


def draw_lines(path: Path, *panels: Panel) -> None:
    """Points `(x, y)` of each series, joined by lines or not; panels stand above each other.

    Raises:
        PlatformError: if matplotlib is not installed.
    """
    figure = _figure(len(panels))
    for plane, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for number, (name, points) in enumerate(panel.series.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            style = {"linestyle": "-" if panel.joined else "", "color": _colour(name, number)}
            hollow = {"markerfacecolor": "none"} if "published" in name else {}
            marker = "s" if "within" in name else "o"
            plane.plot(xs, ys, marker=marker, label=name, **style, **hollow)
        _dress(plane, panel.axes)
    _save(path, figure)


def draw_stacks(path: Path, axes: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    """A stacked bar for each name: heights by part.

    Raises:
        PlatformError: if matplotlib is not installed.
    """
    figure = _figure(1)
    plane = figure.add_subplot()
    names = list(bars)
    bottoms = [0.0] * len(names)
    for number, part in enumerate(dict.fromkeys(part for heights in bars.values() for part in heights)):
        heights = [bars[name].get(part, 0.0) for name in names]
        plane.bar(names, heights, bottom=bottoms, label=part, color=_colour(part, number))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    plane.tick_params(axis="x", rotation=90, labelsize=7)
    _dress(plane, axes)
    _save(path, figure)


def _colour(name: str, number: int) -> str:
    known = [
        colour for key, colour in COLOURS.items() if name == key or name.startswith((f"{key},", f"{key} "))
    ]
    return known[0] if known else OTHERS[number % len(OTHERS)]


def require_matplotlib() -> None:
    """Ask for it before hours of work.

    Raises:
        PlatformError: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlatformError(
            "matplotlib is not installed, which draws the pictures; pip install 'lance-edge[host]', then run"
            " the same command again: finished cells are kept"
        )


def _figure(panels: int) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(7.0, 4.2 if panels == 1 else 2.4 * panels), dpi=130, layout="constrained")


def _dress(plane: Any, axes: Axes) -> None:
    plane.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    plane.grid(alpha=0.3)
    if axes.log_x:
        plane.set_xscale("log")
    if axes.log_y:
        plane.set_yscale("log")
    if axes.bound is not None:
        plane.axhline(axes.bound[0], linestyle="--", color="#777777", label=axes.bound[1])
    if plane.get_legend_handles_labels()[0]:
        plane.legend(fontsize=8)


def _save(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same points, the same bytes
    with atomic_writer(path) as file:
        file.write(buffer.getvalue())
