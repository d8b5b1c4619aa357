"""The pictures of a reproduction, as PNG."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lance_edge.errors import PlatformError
from lance_edge.files import atomic_writer
from lance_edge.report.colours import METHODS, PHASES, PLAIN, shade

# Methods and phases have the colours of the reports; what else there is: Okabe and Ito 2008.
COLOURS = {**METHODS, "head only": PLAIN}
MARKERS = "osD^v"
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
    """One of the planes of a picture.

    Attributes:
        series: points by name; what stands behind a comma in it tells the marker.
        texts: what is written beside the points of a series.
    """

    axes: Axes
    series: Mapping[str, Sequence[Point]]
    joined: bool = True
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stacks:
    """A plane of stacked bars.

    Attributes:
        bars: `(method, number of layers)` to heights by phase.
    """

    axes: Axes
    bars: Mapping[tuple[str, int], Mapping[str, float]]


def draw_lines(path: Path, *panels: Panel) -> None:
    """Points `(x, y)` of each series, joined by lines or not; panels stand above each other.

    Raises:
        PlatformError: if matplotlib is not installed.
    """
    with _drawing(path, len(panels)) as planes:
        _draw_lines(planes, panels)


def _draw_lines(planes: Sequence[Any], panels: Sequence[Panel]) -> None:
    for plane, panel in zip(planes, panels, strict=True):
        kinds = list(dict.fromkeys(map(_kind, panel.series)))
        for number, (name, points) in enumerate(panel.series.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            style = {"linestyle": "-" if panel.joined else "", "color": _colour(name, number)}
            hollow = {"markerfacecolor": "none"} if "published" in name else {}
            marker = MARKERS[kinds.index(_kind(name)) % len(MARKERS)]
            plane.plot(xs, ys, marker=marker, label=name, **style, **hollow)
            for point, text in zip(points, panel.texts.get(name, [""] * len(points)), strict=True):
                plane.annotate(text, point, xytext=(5, 4), textcoords="offset points", fontsize=7)
        _dress(plane, panel.axes)


def _kind(name: str) -> str:
    """`batch 4` of `lance, batch 4`; published points have the marker of their series."""
    return name.partition(", ")[2].removesuffix("published").rstrip(", ")


def draw_stacks(path: Path, *stacks: Stacks) -> None:
    """A bar for each method and number of layers, its phases stacked; planes stand above each other.

    As in a report, colour is the method and strength the phase.

    Raises:
        PlatformError: if matplotlib is not installed.
    """
    with _drawing(path, len(stacks)) as planes:
        for plane, one in zip(planes, stacks, strict=True):
            _draw_stack(plane, one)


def _draw_stack(plane: Any, stacks: Stacks) -> None:
    names = [f"{layers} {method}" for method, layers in stacks.bars]
    bottoms = [0.0] * len(names)
    for phase, strength in PHASES.items():
        heights = [heights.get(phase, 0.0) for heights in stacks.bars.values()]
        colours = [shade(_colour(method, 0), strength) for method, _ in stacks.bars]
        plane.bar(names, heights, bottom=bottoms, color=colours)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        plane.bar([], [], label=phase, color=shade(PLAIN, strength))  # a key for every method
    plane.tick_params(axis="x", rotation=90, labelsize=7)
    _dress(plane, stacks.axes)


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


@contextlib.contextmanager
def _drawing(path: Path, panels: int) -> Iterator[Sequence[Any]]:
    """Planes above each other, saved when the block ends; a `$` in a name is a `$`."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        height = 4.2 if panels == 1 else 2.4 * max(panels, 1)
        figure = Figure(figsize=(7.0, height), dpi=130, layout="constrained")
        yield list(figure.subplots(max(panels, 1), squeeze=False)[:panels, 0])
        _save(path, figure)


def _dress(plane: Any, axes: Axes) -> None:
    from lance_host.log_axis import plain_log

    plane.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    plane.grid(alpha=0.3)
    if axes.bound is not None:
        plane.axhline(axes.bound[0], linestyle="--", color="#777777", label=axes.bound[1])
    if axes.log_x:
        plane.set_xscale("log")
        plain_log(plane.xaxis)
    if axes.log_y:
        plane.set_yscale("log")
        plain_log(plane.yaxis)
    if plane.get_legend_handles_labels()[0]:
        plane.legend(fontsize=8)


def _save(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same points, the same bytes
    with atomic_writer(path) as file:
        file.write(buffer.getvalue())
