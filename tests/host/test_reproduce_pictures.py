"""The pictures of a reproduction."""

from dataclasses import replace

import pytest

from lance_edge.errors import PlatformError
from lance_edge.profiles import STEP_PHASES
from lance_edge.report.colours import METHODS, PHASES, PLAIN, shade
from lance_host.reproduce import plots
from lance_host.reproduce.claims import reproduce
from lance_host.reproduce.fig5 import draw_phases
from lance_host.reproduce.findings import Cell
from lance_host.reproduce.plots import Axes, Panel, Stacks, draw_lines, draw_stacks
from lance_host.reproduce.study import Study
from lance_host.reproduce.table2 import draw_accuracy


def test_pictures_have_what_they_are_given(tmp_path):
    pytest.importorskip("matplotlib")
    axes = Axes("title", "x", "y", log_x=True, log_y=True, bound=(3.0, "bound"))
    draw_lines(tmp_path / "a.png", Panel(axes, {"lance": [(1, 2), (2, 3)], "lance, published": [(1, 1)]}))
    draw_lines(tmp_path / "b.png", Panel(axes, {"lance": [(1, 2), (2, 9)], "lance, published": [(1, 1)]}))
    draw_stacks(tmp_path / "c.png", Stacks(Axes("t", "x", "y"), {("bp", 2): {"data": 1.0, "update": 2.0}}))
    draw_lines(tmp_path / "again.png", Panel(axes, {"lance": [(1, 2), (2, 3)], "lance, published": [(1, 1)]}))
    images = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert images["a"] == images["again"] != images["b"]
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in images.values())


@pytest.fixture
def drawn(monkeypatch):
    """The figure of each picture, instead of a file."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plots, "_save", lambda path, figure: figures.append(figure))
    return figures


def test_a_dollar_in_a_name_is_a_dollar(tmp_path, drawn):
    draw_lines(tmp_path / "a.png", Panel(Axes("$a_1$", "x$", "$y$"), {"lance, $5_$": [(1, 2)]}))
    (plane,) = drawn[0].axes
    texts = [plane.title, plane.xaxis.label, plane.yaxis.label, *plane.get_legend().get_texts()]
    assert not any(text.get_parse_math() for text in texts)


def test_each_data_set_has_a_plane_of_its_own(tmp_path, drawn):
    findings, times = [], []
    for dataset, value in (("c10", 1.0), ("c100", 2.0)):
        cell = Cell("table2", "net", dataset, "lance", 2)
        findings += [cell.found("accuracy_percent", [value]), cell.found("activation_mib", [value])]
        times += [replace(cell, setting="phase data").found("step_ms", [value])]
    draw_accuracy(tmp_path / "a.png", findings)
    draw_phases(tmp_path / "b.png", times)
    draw_phases(tmp_path / "c.png", times[:1])
    accuracies, phases, alone = drawn
    assert [list(plane.lines[0].get_ydata()) for plane in accuracies.axes] == [[1.0], [2.0]]
    assert [plane.patches[0].get_height() for plane in phases.axes] == [1.0, 2.0]
    titles = [plane.get_title() for figure in drawn for plane in figure.axes]
    assert [title.partition(", net, ")[2] for title in titles] == ["c10", "c100", "c10", "c100", ""]
    assert len(alone.axes) == 1


def test_a_phase_has_the_colour_of_the_reports(tmp_path, drawn):
    """Colour is the method, strength the phase."""
    bars = {("lance", 2): dict.fromkeys(STEP_PHASES, 1.0), ("head only", 0): dict.fromkeys(STEP_PHASES, 1.0)}
    draw_stacks(tmp_path / "a.png", Stacks(Axes("", "", ""), bars))
    from matplotlib.colors import to_hex

    found = [to_hex(patch.get_facecolor()) for patch in drawn[0].axes[0].patches]
    for number, phase in enumerate(STEP_PHASES):
        expected = [shade(colour, PHASES[phase]) for colour in (METHODS["lance"], PLAIN)]
        assert found[2 * number : 2 * number + 2] == expected
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == list(STEP_PHASES)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    """And says it before any cell is made."""
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    message = r"pip install 'lance-edge\[host\]', then run the same command again"
    for ask in (
        lambda: reproduce("theory", Study(out=tmp_path / "out")),
        lambda: draw_lines(tmp_path / "a.png", Panel(Axes("", "", ""), {})),
    ):
        with pytest.raises(PlatformError, match=message):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_logarithmic_axis_are_plain(tmp_path, drawn):
    draw_lines(tmp_path / "a.png", Panel(Axes("", "", "", log_x=True, log_y=True), {"a": [(0.01, 2), (1, 5)]}))
    (plane,) = drawn[0].axes
    drawn[0].canvas.draw()
    for axis in (plane.xaxis, plane.yaxis):
        texts = [label.get_text() for label in axis.get_ticklabels(which="both")]
        numbers = [float(text) for text in texts if text]
        assert numbers, "no other text"
    assert "0.01" in [label.get_text() for label in plane.get_xticklabels()]


def test_settings_have_markers_and_points_their_layers(tmp_path, drawn):
    findings = []
    for number, setting in enumerate(("batch 4", "batch 8"), 1):
        for layers in (2, 4):
            cell = Cell("table8", "net", "c10", "lance", layers, setting)
            findings += [cell.found(name, [layers * number]) for name in ("accuracy_percent", "activation_mib")]
    absent = Cell("table8", "net", "c100", "lance", 2).found("accuracy_percent", (), "no images")
    draw_accuracy(tmp_path / "a.png", [*findings, absent])
    (plane,) = drawn[0].axes  # none for what is absent
    assert [line.get_label() for line in plane.lines] == ["lance, batch 4", "lance, batch 8"]
    assert len({line.get_marker() for line in plane.lines}) == 2
    assert [(text.get_text(), *text.xy) for text in plane.texts] == [
        ("2", 2, 2),
        ("4", 4, 4),
        ("2", 4, 4),
        ("4", 8, 8),
    ]
