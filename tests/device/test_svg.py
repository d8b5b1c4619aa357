"""Figures drawn without a plotting library: every point where its value says."""

import re
import xml.etree.ElementTree as ET

import pytest

from lance_device.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, number_text, svg
from lance_edge.report.plots import Bar, BarGroup, BarPlot, Line, LinePlot
from lance_edge.report.ticks import round_step


def line_plot(*lines, **changes):
    return LinePlot("name", "A & <title>", "Caption.", "x, s", "y, ms", tuple(lines), **changes)


def elements(text, tag):
    return [element for element in ET.fromstring(text).iter() if element.tag == tag]


def ticks(text, anchor):
    """`(place, number)` of the numbers along an axis, as a reader would measure them with a ruler."""
    axis = "y" if anchor == "end" else "x"
    return [
        (float(element.get(axis)), float(element.text.replace(",", "")))
        for element in elements(text, "text")
        if element.get("text-anchor") == anchor and re.fullmatch(r"[-\d.,e+]+", element.text or "")
    ]


def reader(marks, shift=0.0, is_log=False):
    """From places to values, by two numbers of the axis."""
    import math

    (a, low), (b, high) = marks[0], marks[-1]
    if is_log:
        return lambda place: low * math.exp((place - shift - a) / (b - a) * math.log(high / low))
    return lambda place: low + (place - shift - a) / (b - a) * (high - low)


@pytest.mark.parametrize("is_log", [False, True])
def test_points_are_where_the_axes_say(is_log):
    x, y = (10.0, 20.0, 50.0, 90.0), (3.0, 40.0, 700.0, 20.0)
    text = svg(line_plot(Line("a", "#123456", x, y), y_is_log=is_log))
    path = next(e.get("d") for e in elements(text, "path") if e.get("stroke") == "#123456")
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]
    across = reader(ticks(text, "middle"))
    up = reader(ticks(text, "end"), shift=-4.0, is_log=is_log)  # numbers stand 4 below their lines
    # A tenth of a unit is what is written: 0.1 of 290 across and of 200 up.
    assert [across(px) for px, _ in points] == pytest.approx(x, abs=0.1)
    assert [up(py) for _, py in points] == pytest.approx(y, rel=0.02, abs=0 if is_log else 1.0)


def test_bars_stand_on_each_other():
    bars = (
        Bar("a", (1.0, 3.0), ("#111111", "#222222"), (3.5, 5.0)),
        Bar("b", (2.0, 0.0), ("#333333", "#444444")),
    )
    plot = BarPlot("n", "T", "C.", "x", "y, ms", ("p", "q"), (BarGroup("1", bars),), ())
    text = svg(plot)
    unit = {e.get("fill"): e for e in elements(text, "rect")}
    height = {colour: float(e.get("height")) for colour, e in unit.items()}
    assert height["#222222"] == pytest.approx(3 * height["#111111"], abs=0.2)
    assert height["#333333"] == pytest.approx(2 * height["#111111"], abs=0.2)
    assert height["#444444"] == 0
    top, bottom = float(unit["#222222"].get("y")) + height["#222222"], float(unit["#111111"].get("y"))
    assert top == pytest.approx(bottom, abs=0.11)
    assert bottom + height["#111111"] == pytest.approx(HEIGHT - BOTTOM, abs=0.11)


DEGENERATE = [
    ((5.0,), (3.0,)),
    ((1.0, 1.0), (0.0, 0.0)),
    ((1e9, 1e9 + 1), (1e-9, 2e-9)),
    ((0.0, 1.0), (-5.0, 5.0)),
    ((1e6, 1e6 + 2), (1e12, 1e12 + 1)),
]


@pytest.mark.parametrize(("x", "y"), DEGENERATE)
@pytest.mark.parametrize("style", ["solid", "dashed", "dotted", "points"])
def test_any_values_give_a_picture_within_its_frame(x, y, style):
    for is_log in (False, True):
        plot = line_plot(
            Line("a", "#123456", x, y, style, y, y), y_is_log=is_log, x_is_log=is_log, rules=((y[0], "r"),)
        )
        text = svg(plot)
        ET.fromstring(text)
        assert "nan" not in text
        for px, py in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", text):
            assert LEFT <= float(px) <= WIDTH - RIGHT
            assert TOP <= float(py) <= HEIGHT - BOTTOM


def test_texts_are_escaped():
    text = svg(line_plot(Line("a", "#123456", (1.0,), (1.0,)), rules=((1.0, "<b>"),)))
    assert 'aria-label="A &amp; &lt;title&gt;"' in text
    assert "&lt;b&gt;" in text


def test_ticks_are_round():
    assert [round_step(rough) for rough in (0.9, 1.0, 1.1, 3.0, 7.0, 0.03)] == pytest.approx(
        [1, 1, 2, 5, 10, 0.05]
    )
    assert Scale(0, 9.3, 0, 1).ticks() == pytest.approx([0, 2, 4, 6, 8])
    assert Scale(2, 40, 0, 1, is_log=True).ticks() == pytest.approx([2, 5, 10, 20])
    assert number_text(12_500) == "12,500"


@pytest.mark.parametrize(("low", "high", "expected"), [
    (60.5, 80.0, [65, 70, 75, 80]),  # of a run alone: a seventh to both sides of 69.6
    (3.0, 9.0, [4, 6, 8]),
    (1100.0, 1200.0, [1100, 1120, 1140, 1160, 1180, 1200]),
    (0.011, 0.012, [0.011, 0.0112, 0.0114, 0.0116, 0.0118, 0.012]),
    (1.0, 1e6, [1, 10, 100, 1000, 10_000, 100_000, 1_000_000]),
])  # fmt: skip
def test_a_logarithmic_axis_has_numbers_however_little_it_spans(low, high, expected):
    assert Scale(low, high, 0, 1, is_log=True).ticks() == pytest.approx(expected)


def test_one_run_has_numbers_below_its_point():
    """As the page of `train --serve` shows it."""
    text = svg(line_plot(Line("run", "#123456", (69.6,), (80.0,), "points"), x_is_log=True))
    assert [number for _, number in ticks(text, "middle")] == [65, 70, 75, 80]
    assert "x, s (log scale)" in text


def test_hatching_stays_within_its_bar():
    bars = (Bar("a", (4.0,), ("#111111",), is_hatched=True), Bar("b", (2.0,), ("#222222",)))
    text = svg(BarPlot("n", "T", "C.", "x", "y", ("p",), (BarGroup("1", bars),), (), "computed"))
    (hatch,) = (e.get("d") for e in elements(text, "path") if e.get("stroke-width") == ".8")
    (bar,) = (e for e in elements(text, "rect") if e.get("fill") == "#111111")
    left, top, width, height = (float(bar.get(name)) for name in ("x", "y", "width", "height"))
    strokes = re.findall(r"M([-\d.]+) ([-\d.]+)L([-\d.]+) ([-\d.]+)", hatch)
    assert len(strokes) > height / 6
    for a, b, c, d in (map(float, stroke) for stroke in strokes):
        assert left - 0.11 <= a <= c <= left + width + 0.11
        assert top - 0.11 <= d <= b <= top + height + 0.11
        assert c - a == pytest.approx(b - d, abs=0.21)


def test_names_of_groups_are_shortened_where_there_is_no_room():
    bar = (Bar("a", (1.0,), ("#111111",)),)
    groups = tuple(BarGroup(f"a-very-long-name-of-a-run-{n}", bar) for n in range(6))
    text = svg(BarPlot("n", "T", "C.", "x", "y", ("p",), groups, ()))
    names = [e.text for e in elements(text, "text") if (e.text or "").endswith("…")]
    assert len(names) == 6
    many = tuple(BarGroup(str(n), bar) for n in range(30))
    shown = ticks(svg(BarPlot("n", "T", "C.", "x", "y", ("p",), many, ())), "middle")
    assert len(shown) <= 12
