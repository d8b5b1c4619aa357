"""Figures as data: what is drawn, whoever draws it.  Every axis says its unit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float | None
Style = Literal["solid", "dashed", "dotted", "points"]
LOG_SCALE = " (log scale)"


def slug(text: str) -> str:
    """Any text as part of a figure's name; `unnamed` where nothing is left of it.

    Examples:
        >>> slug("Bench 9/a"), slug("?")
        ('bench-9-a', 'unnamed')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def check_name(name: str) -> None:
    """See that the name of a figure is good for files and for ids: it stands in a page as it is.

    Raises:
        ValueError: if not.
    """
    if re.fullmatch("[a-z0-9-]+", name) is None:
        raise ValueError(f"name of a figure: expected letters a to z, digits and '-', found {name!r}")


@dataclass(frozen=True)
class Line:
    """Points of one colour, joined or not.

    Attributes:
        label: for the legend; empty for a line that belongs to the one before it.
        low, high: of a band, or (where points are not joined) of a range; empty, or as many as `x`.
    """

    label: str
    colour: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Style = "solid"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class LinePlot:
    """Lines over an axis.

    Attributes:
        name: of the files with its data and its picture, and of its ids on a page: see `slug`.
        caption: what there is to see, in a sentence or two.
        x_label, y_label: of the axes (see `x_title`, `y_title`) and of columns.
        rules: dashed horizontal lines, `(y, label)`.
        shaded: stretches of x that are marked.
    """

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    y_from_zero: bool = False
    x_from_zero: bool = False
    x_is_log: bool = False
    y_is_log: bool = False
    rules: tuple[tuple[float, str], ...] = ()
    shaded: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        """Check: see `check_name`."""
        check_name(self.name)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(line.x for line in self.lines)

    @property
    def x_title(self) -> str:
        """What stands at the axis."""
        return self.x_label + LOG_SCALE * self.x_is_log

    @property
    def y_title(self) -> str:
        """What stands at the axis."""
        return self.y_label + LOG_SCALE * self.y_is_log


@dataclass(frozen=True)
class Bar:
    """Parts that stand on each other, each in its colour; `spread` is the band around their sum."""

    label: str
    parts: tuple[float, ...]
    colours: tuple[str, ...]
    spread: tuple[float, float] | None = None
    is_hatched: bool = False


@dataclass(frozen=True)
class BarGroup:
    """Bars side by side over one label."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class BarPlot:
    """Groups of stacked bars.

    Attributes:
        part_names: of every bar's parts, from the bottom.
        keys: `(label, colour)` of the legend.
        hatched: what hatched bars are, for the legend; empty where there are none.
    """

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    part_names: tuple[str, ...]
    groups: tuple[BarGroup, ...]
    keys: tuple[tuple[str, str], ...]
    hatched: str = ""

    def __post_init__(self) -> None:
        """Check: see `check_name`."""
        check_name(self.name)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(group.bars for group in self.groups)

    @property
    def x_title(self) -> str:
        """What stands at the axis."""
        return self.x_label

    @property
    def y_title(self) -> str:
        """What stands at the axis."""
        return self.y_label


Plot = LinePlot | BarPlot


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Attributes:
        name: of a file with its data.
        data: the same for programs: columns with their units, of plain values; `None` where nothing is known.
    """

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data: Mapping[str, Sequence[Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        missing: what stands where there is nothing to show, and how one would get it.
    """

    title: str
    text: str
    plots: tuple[Plot, ...]
    tables: tuple[Table, ...] = ()
    missing: str = ""
