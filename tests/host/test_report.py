"""`lance-host report`: the page, the data and the pictures, from runs, benchmarks, copies and packages."""

import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from report_rows import RECORD, on_machine, write_benchmark, write_run

from lance_edge.bundle import Bundle
from lance_edge.report.colours import METHODS
from lance_edge.report.folders import open_views
from lance_edge.report.plots import Bar, BarGroup, BarPlot, Line, LinePlot
from lance_host import cli_report
from lance_host.cli import cli

pytest.importorskip("matplotlib", reason="lance-host report needs matplotlib: pip install 'lance-edge[host]'")

from lance_host.report.draw import png, svg
from lance_host.report.package import package_section


def report(*words):
    return CliRunner().invoke(cli, ["report", *map(str, words)])


def written(*words):
    result = report(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words):
    result = report(*words)
    (line,) = result.output.splitlines()
    return result.exit_code, line


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return write_run(root / "lance"), write_run(root / "bp", "bp"), write_benchmark(root / "bench")


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert re.fullmatch(rf"wrote {path} \([\d.]+ \w+\)\n", written(*folders, "-o", path))
    return path


def test_the_page_holds_all_figures_and_asks_no_network(page):
    text = page.read_text()
    for title in (
        "Learning",
        "Time",
        "Memory",
        "Accuracy and memory",
        "Ranks and spectra",
        "Heat and throttling",
    ):
        assert f"<h2>{title}</h2>" in text
    assert len(re.findall(r"<figure ", text)) == 12
    # Namespaces are names; everything else that looks like an address would be a request.
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|@import|url\((?!#)", text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert page.stat().st_size < 1 << 20


def test_the_same_figure_gives_the_same_bytes():
    line = Line("a", METHODS["lance"], (1.0, 2.0), (3.0, 4.0))
    plot = LinePlot("name", "Title & <more>", "Caption.", "x, s", "y, ms", (line,))
    assert svg(plot) == svg(plot)
    assert 'aria-label="Title &amp; &lt;more&gt;"' in svg(plot)
    assert "x, s" in svg(plot)


def test_a_line_stands_where_its_points_say():
    """From the path that matplotlib wrote back to the values, by the two outer points."""
    x, y = (0.0, 10.0, 30.0, 40.0), (1.0, 5.0, 2.0, 9.0)
    plot = LinePlot("name", "Title", "Caption.", "x", "y", (Line("a", "#123456", x, y, "dashed"),))
    path = re.search(r'<path d="([^"]+)"[^>]*stroke: #123456', svg(plot))
    points = np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path[1]), dtype=float)
    for found, expected in zip(points.T, (x, y), strict=True):
        scale = (found - found[0]) / (found[-1] - found[0])
        values = np.array(expected)
        # Six decimals of a picture 300 points wide.
        np.testing.assert_allclose(scale, (values - values[0]) / (values[-1] - values[0]), atol=1e-4)


def texts_of(picture):
    """`(x, y, text)` of every text, from matplotlib's `translate(...)` or from its attributes."""
    found = []
    for attributes, text in re.findall(r"<text([^>]*)>([^<]*)</text>", picture):
        moved = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", attributes)
        placed = re.search(r'x="([-\d.]+)" y="([-\d.]+)"', attributes)
        found.append((*map(float, (moved or placed).groups()), text))
    return found


@pytest.mark.parametrize(("x", "expected"), [
    ((70.0, 1100.0), ["100", "200", "500", "1,000"]),
    ((1.0, 384.0), ["1", "2", "5", "10", "20", "50", "100", "200"]),
    ((60.0, 80.0), ["60", "65", "70", "75", "80"]),
])  # fmt: skip
def test_numbers_of_a_logarithmic_axis_stand_in_a_line(x, expected):
    plot = LinePlot("n", "T", "C.", "x, s", "y", (Line("a", "#123456", x, (-5.0, -4.0)),), x_is_log=True)
    picture = svg(plot)
    heights = {text: height for _, height, text in texts_of(picture) if re.fullmatch(r"[\d,]+", text)}
    assert list(heights) == expected
    assert len(set(heights.values())) == 1
    assert ">x, s (log scale)</text>" in picture


@pytest.mark.parametrize(("height", "is_below"), [(70.0, True), (10.0, False)])
def test_a_rule_is_named_at_its_right_end_where_there_is_room(height, is_below):
    line = Line("a", "#123456", (1.0, 10.0, 100.0), (0.0, 60.0, 100.0))
    picture = svg(LinePlot("n", "T", "C.", "x", "y", (line,), x_is_log=True, rules=((height, "ε = 0.7"),)))
    ((x, y, _),) = [place for place in texts_of(picture) if place[2] == "ε = 0.7"]
    rule = float(re.search(r"M [\d.]+ ([\d.]+) \nL [\d.]+ \1 \n\"[^>]*stroke-dasharray", picture)[1])
    assert (y > rule) == is_below
    assert x > 302.4 / 2
    assert picture.count("fill: #ffffff") == 1  # its ground


def test_hatched_bars_are_drawn_and_explained():
    colour = METHODS["lance"]
    bars = (Bar("a", (2.0,), (colour,), is_hatched=True), Bar("b", (1.0,), (colour,)))
    plot = BarPlot("b", "T", "C.", "x", "y", ("p",), (BarGroup("1", bars),), (("LANCE", colour),), "computed")
    assert len(re.findall(r"fill: url\(#b-", svg(plot))) == 1
    plain = BarPlot("b", "T", "C.", "x", "y", ("p",), (BarGroup("1", bars[1:]),), (("LANCE", colour),))
    assert "<pattern" not in svg(plain)
    assert png(plot)


def test_pictures_are_png_with_colours_of_their_methods(tmp_path):
    bars = (Bar("LANCE", (2.0,), (METHODS["lance"],)), Bar("BP", (4.0,), (METHODS["bp"],), (3.0, 5.0)))
    plot = BarPlot("b", "T", "C.", "x", "y", ("p",), (BarGroup("1", bars),), (("LANCE", METHODS["lance"]),))
    image = Image.open(io.BytesIO(png(plot))).convert("RGB")
    assert image.width > 1000
    counts = {colour: count for count, colour in image.getcolors(1 << 24)}
    lance, bp = (tuple(int(METHODS[name][i : i + 2], 16) for i in (1, 3, 5)) for name in ("lance", "bp"))
    # Twice as high, but for the line of the spread and LANCE's key in the legend.
    assert 1.6 < counts[bp] / counts[lance] < 2.1


def test_csv_alone_gives_the_data_of_each_figure(folders, tmp_path):
    output = written(*folders, "--csv", tmp_path / "data")
    assert "report.html" not in output
    accuracy = rows_of(tmp_path / "data" / "accuracy-evaluations.csv")
    assert accuracy[0] == ["series", "training step", "accuracy, %", "band from", "band to"]
    assert ["lance, test", "20", "75", "", ""] in accuracy
    for name, column in (("activation-bytes-accuracy", 1), ("activation-bytes-bench", 2)):
        assert rows_of(tmp_path / "data" / f"{name}.csv")[0][column] == "activation bytes, KiB"
    times = rows_of(tmp_path / "data" / "step-time-bench.csv")
    assert times[0][:3] == ["trained layers", "bar", "data: time, ms a step"]
    assert len(times) == 1 + 3 * 4
    header, lance, bp = rows_of(tmp_path / "data" / "runs.csv")
    assert dict(zip(header, lance, strict=True)) == {
        "run": "lance", "model": "tiny", "method": "lance", "layers": "2", "batch_size": "16",
        "micro_batch": "8", "threads": "1", "cached": "0", "test_accuracy": "0.75", "steps": "19",
        "step_p50_ms": "10.5",
        "step_spread": lance[header.index("step_spread")], "step_ratio_to_lance": "1", "peak_rss_kib": "102420",
        "activation_bytes": "4096", "saved_bytes": "8192",
    }  # fmt: skip
    taken = [(1.0, 1.02)[step % 2] for step in range(2, 21)]
    spread = statistics.stdev(taken) / statistics.mean(taken)
    assert float(lance[header.index("step_spread")]) == pytest.approx(spread)
    assert dict(zip(header, bp, strict=True))["activation_bytes"] == "409600"
    assert len(rows_of(tmp_path / "data" / "benchmarks.csv")) == 1 + 3 * 4


def test_png_alone_gives_a_picture_of_each_figure(folders, tmp_path):
    written(folders[0], "--png", tmp_path / "pictures")
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"loss-steps.png", "accuracy-evaluations.png", "step-time-runs.png", "memory-time.png"} <= names


def test_a_copy_without_run_json(tmp_path):
    run = write_run(tmp_path / "copied", record=None)
    written(run, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "copied came without run.json: machine, versions and arguments are not known." in text
    assert "unknown machine of copied (no run.json)" in text


def test_a_run_without_rows_and_a_damaged_one_are_said(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "good")
    record = {**RECORD, "status": "failed", "message": "disk full"}
    write_run(runs / "early", steps=0, accuracies=(), record=record)
    path = write_run(runs / "worse") / "history.csv"
    path.write_text(path.read_text() + "1,2\n")
    written(runs, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "early holds no rows (status failed: disk full) and was left out." in text
    assert f"worse was left out, as it cannot be read: {path} line 4: expected 11 cells, found 2;" in text


def test_boards_are_not_mixed_silently(tmp_path):
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", "bp", record=on_machine(board="Raspberry Pi 5"))
    written(*runs, "-o", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Measured on 2 machines" in text
    assert "ratios are taken within each of them only" in text


def with_package(folder, package, **changes):
    with Bundle(package) as bundle:
        artifact = {"path": str(changes.pop("path", package)), "identity_sha256": bundle.sha256, **changes}
    return write_run(folder, record={**RECORD, "artifact": artifact})


EVIL = 'b"><img\tsrc=x\tonerror=document.title=9>'
# What a template of a regular expression would read, and what mathematics would; two that look alike in a file.
ODD_NAMES = (EVIL, "bench\\9", "c\\qx", "a b", "a-b", "runs", "été")


class Tags(HTMLParser):
    """Tags, ids and references of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.names, self.ids, self.references = set(), set(), [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        for name, value in attributes:
            self.ids += [value] if name == "id" else []
            found = re.findall(r"url\(#([^)]*)\)", value or "")
            self.references |= {
                *found,
                *([value[1:]] if name in ("href", "xlink:href") and value[0] == "#" else []),
            }


def tags_of(page):
    parser = Tags()
    parser.feed(page)
    return parser


def test_names_of_folders_are_names_and_nothing_else(tmp_path):
    folders = [write_benchmark(tmp_path / name, ("lance",), (1, 2)) for name in ODD_NAMES]
    plain = write_benchmark(tmp_path / "plain", ("lance",), (1, 2))
    written(plain, write_run(tmp_path / "run"), "-o", tmp_path / "plain.html")
    written(*folders, write_run(tmp_path / "$x_{"), "-o", tmp_path / "odd.html", "--csv", tmp_path / "csv")
    found, expected = (tags_of((tmp_path / name).read_text()) for name in ("odd.html", "plain.html"))
    assert (
        found.tags - {"details", "summary", "wbr"} == expected.tags
    )  # many settings are folded, `$x_{` breaks
    assert found.names == expected.names
    assert len(found.ids) == len(set(found.ids))
    assert found.references <= set(found.ids)
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name in found.ids)
    names = {path.stem for path in (tmp_path / "csv").iterdir()}
    assert {"peak-rss-a-b", "peak-rss-a-b-2", "step-time-runs", "step-time-runs-2"} <= names
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)
    assert len([name for name in names if name.startswith("peak-rss-")]) == len(ODD_NAMES)


def test_what_looks_like_an_id_in_a_name_stays_as_it_is():
    line = Line("a", "#123456", (1.0, 2.0), (3.0, 4.0))
    text = svg(LinePlot("name", "Title", "Caption.", ' id="p" url(#p', "$y", (line,)))
    assert '> id="p" url(#p</text>' in text
    assert ">$y</text>" in text


@pytest.mark.parametrize("name", ["", "a b", 'a"', "A", "a\n", "é"])
def test_a_figure_is_called_by_letters_digits_and_dashes(name):
    with pytest.raises(ValueError, match="name of a figure: expected letters a to z, digits and '-', found"):
        LinePlot(name, "Title", "Caption.", "x", "y", ())
    with pytest.raises(ValueError, match="name of a figure"):
        BarPlot(name, "Title", "Caption.", "x", "y", (), (), ())


def test_ranks_and_spectra_are_those_of_the_package(photo_package, tmp_path):
    (view,) = _views(with_package(tmp_path / "run", photo_package))
    section, notices = package_section([view], None)
    assert notices == ()
    with Bundle(photo_package) as bundle:
        variant = bundle.manifest.variant("lance")
        spectra = bundle.arrays("spectra.npz")
        plan = variant.layers[0]
        eigenvalues = spectra[f"{plan.layer}/eigenvalues1"]
    (table,) = section.tables
    assert [row[0] for row in table.rows] == [plan.layer for plan in variant.layers]
    assert table.rows[0][2].startswith(f"{plan.ranks[1]} of ")
    assert table.data["channels_rank"][0] == plan.ranks[1]
    assert table.data["activation_bytes"][0] == plan.activation_bytes
    assert table.data["least_energy_kept"][0] == min(plan.energy_kept)
    assert {len(values) for values in table.data.values()} == {len(variant.layers)}
    curve = next(line for line in section.plots[1].lines if line.label.startswith("channels"))
    assert curve.y[-1] == pytest.approx(100)
    rank = plan.ranks[1]
    # The rule of the rank, literally: the fewest directions that hold the energy.
    assert curve.y[rank - 1] == pytest.approx(100 * eigenvalues[:rank].sum() / eigenvalues.sum())
    assert curve.y[rank - 1] >= 100 * variant.energy > (curve.y[rank - 2] if rank > 1 else 0)


def _views(*folders):
    return open_views(folders)


def test_a_package_beside_the_run_is_found(photo_package, tmp_path):
    (tmp_path / "pkg.tar").write_bytes(photo_package.read_bytes())
    run = with_package(tmp_path / "runs" / "run", photo_package, path="/elsewhere/pkg.tar")
    assert package_section(_views(run), None)[0].plots


def test_another_package_is_not_taken_for_the_runs_own(photo_package, tmp_path):
    run = with_package(tmp_path / "run", photo_package, identity_sha256="0" * 64)
    section, _ = package_section(_views(run), None)
    assert not section.plots
    assert f"{photo_package} is there, but is not the package of these runs." in section.missing
    section, (notice,) = package_section(_views(run), photo_package)
    assert section.plots
    assert notice == f"{photo_package} is not the package that run used: its ranks may be others."


def test_a_damaged_package_is_told(photo_package, tmp_path):
    damaged = tmp_path / "pkg.tar"
    damaged.write_bytes(photo_package.read_bytes()[:-5000])
    run = with_package(tmp_path / "run", photo_package, path=damaged)
    assert str(damaged) in package_section(_views(run), None)[0].missing
    code, line = refused(run, "--artifact", damaged, "-o", tmp_path / "report.html")
    assert code == 3
    assert line.startswith(f"error: {damaged}")
    assert not (tmp_path / "report.html").exists()


def test_bad_input_is_one_line(tmp_path):
    assert refused(tmp_path / "absent") == (
        5,
        f"error: {tmp_path / 'absent'}: found nothing; expected the --out folder of lance-device train or"
        " bench, a folder of such folders, or CSV files copied from one (steps.csv, history.csv)",
    )
    run = write_run(tmp_path / "run")
    code, line = refused(run, "--csv", run)
    assert (code, line) == (5, f"error: --csv {run}: is the folder of a run; choose one for the report alone")
    (tmp_path / "file").write_text("")
    code, line = refused(run, "-o", tmp_path / "file" / "report.html")
    assert code == 8
    assert "cannot write" in line
    (run / "run.json").write_text(json.dumps({**RECORD, "schema_version": 9}))
    code, line = refused(run)
    assert code == 5
    assert "expected a record of schema 1, found 9" in line


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(cli_report.importlib.util, "find_spec", lambda name: None)
    assert refused(tmp_path) == (
        9,
        "error: matplotlib not installed; lance-host report needs it: pip install 'lance-edge[host]'",
    )
