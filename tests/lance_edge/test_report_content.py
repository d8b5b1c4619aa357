"""What a report says: figures against literal medians, ratios, warnings, findings, and the page's text."""

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_rows import PHASES, RECORD, on_machine, step_rows, write_benchmark, write_rows, write_run

import lance_edge
from lance_edge.bench_rows import summarise_bench
from lance_edge.profiles import StepRow
from lance_edge.recordings import read_recording
from lance_edge.report.colours import METHODS, method_colour, run_colours, shade
from lance_edge.report.content import compose
from lance_edge.report.findings import findings_of
from lance_edge.report.folders import open_views
from lance_edge.report.notices import notices_of
from lance_edge.report.page import render
from lance_edge.report.plots import BarPlot
from lance_edge.report.results import result_tables, results_of
from lance_edge.report.time_use import time_use

RECORDED = Path(lance_edge.__file__).parent.parent / "profiles" / "recorded"


def plots_of(folders):
    report = compose(open_views(folders), "now")
    return {plot.name: plot for section in report.sections for plot in section.plots}


def test_bars_of_a_benchmark_are_medians_of_phases(tmp_path):
    plot = plots_of([write_benchmark(tmp_path / "bench")])["step-time-bench"]
    assert isinstance(plot, BarPlot)
    assert [group.label for group in plot.groups] == ["1", "2", "3"]
    scales = [(1.0, 1.02)[step % 2] for step in range(2, 8)]  # step 1 is a warm-up
    for layers, group in enumerate(plot.groups, start=1):
        for place, bar in enumerate(group.bars, start=1):
            expected = [
                statistics.median(latency * layers * place * s for s in scales) for latency in PHASES.values()
            ]
            assert bar.parts == pytest.approx(expected)
            assert bar.spread is not None
            assert bar.spread[0] == pytest.approx(10.5 * layers * place)
    labels = [f"{name}, features kept" for name in ("LANCE", "BP", "ASI", "HOSVD")]
    assert [bar.label for bar in plot.groups[0].bars] == labels


def test_a_recorded_profile_gives_the_ratios_of_its_own_summary():
    """`summary.csv` was made by other code on the board; `results_of` reads `steps.csv` alone."""
    folder = next(path for path in RECORDED.iterdir() if path.is_dir())
    recording = read_recording(folder)
    expected = {
        (row.method, row.layers): row.ratio_to_lance
        for row in summarise_bench(recording.steps)
        if row.phase == "step"
    }
    found = {(r.setting.method, r.setting.layers): r.ratio for r in results_of(open_views([folder]))}
    assert found.keys() == expected.keys()
    for key, ratio in found.items():
        assert ratio == pytest.approx(expected[key])


def test_ratios_stay_within_a_machine_and_a_setting(tmp_path):
    lance = write_run(tmp_path / "lance")
    bp = write_run(tmp_path / "bp", "bp", scales=(2.0, 2.04))
    elsewhere = write_run(tmp_path / "elsewhere", "bp", record=on_machine(board="Raspberry Pi 5"))
    threads = write_run(tmp_path / "threads", "bp", threads=4)
    unknown = write_run(tmp_path / "unknown", "bp", record=None)
    views = open_views([lance, bp, elsewhere, threads, unknown])
    ratios = {result.view.name: result.ratio for result in results_of(views)}
    assert ratios == {
        "lance": 1.0,
        "bp": pytest.approx(2.0),
        "elsewhere": None,
        "threads": None,
        "unknown": None,
    }
    (table,) = result_tables(views)
    column = table.header.index("to LANCE")
    assert [row[column] for row in table.rows] == ["1.00×", "2.00×", "-", "-", "-"]
    # Two LANCE runs of the same setting: a ratio to either would be a choice that nobody made.
    again = write_run(tmp_path / "again")
    ratios = {result.view.name: result.ratio for result in results_of(open_views([lance, again, bp]))}
    assert ratios["bp"] is None


def test_two_boards_are_said_and_their_bars_kept_apart(tmp_path):
    here, there = write_run(tmp_path / "a"), write_run(tmp_path / "b", "bp", record=on_machine(cores=2))
    views = open_views([here, there])
    (notice,) = notices_of(views)
    assert notice == (
        "Measured on 2 machines (Raspberry Pi 4 Model B Rev 1.5, 4 cores, 4 GiB, aarch64; Raspberry Pi 4 Model"
        " B Rev 1.5, 2 cores, 4 GiB, aarch64): times of one say nothing of another, so ratios are taken within"
        " each of them only."
    )
    bars = time_use(views).plots
    assert [[group.label for group in plot.groups] for plot in bars] == [["a"], ["b"]]
    assert "4 cores" in bars[0].title
    assert "2 cores" in bars[1].title
    assert findings_of(views) == ()


NOTICES = [
    # Ten steps of 1.0 and nine of 1.5: a deviation of 0.257 around 1.237.
    (
        {"scales": (1.0, 1.5)},
        {},
        r"vary by more than 10% .* in run: LANCE, 2 layers \(21%\): other programs ran",
    ),
    (
        {"throttled": "0x4"},
        {},
        r"The board complained during run \(throttled\): its times are those of a slowed",
    ),
    ({"steps": 4}, {}, r"Medians of fewer than 5 steps say little: run: LANCE, 2 layers \(3 steps\)\."),
    ({}, {"status": "running"}, r"run had not ended when this was made\."),
    ({}, {"status": "interrupted"}, r"run was stopped before its end\."),
    ({}, {"status": "failed"}, r"run failed\."),
]


@pytest.mark.parametrize(("changes", "record", "expected"), NOTICES)
def test_what_makes_figures_doubtful_is_said(tmp_path, changes, record, expected):
    views = open_views([write_run(tmp_path / "run", record={**RECORD, **record}, **changes)])
    (notice,) = notices_of(views)
    assert re.search(expected, notice)


def test_a_good_run_needs_no_warning(tmp_path):
    assert notices_of(open_views([write_run(tmp_path / "run")])) == ()


def test_runs_without_record_other_images_and_torn_rows_are_said(tmp_path):
    one = write_run(tmp_path / "one", record=None)
    with (one / "steps.csv").open("a") as file:
        file.write("a,lan")
    data = {**RECORD["data"], "train_sha256": "2" * 64}
    two, three = write_run(tmp_path / "two"), write_run(tmp_path / "three", record={**RECORD, "data": data})
    said = "\n".join(notices_of(open_views([one, two, three])))
    assert "The runs trained on different images: their accuracies are not to be compared." in said
    assert "The last row of one is cut off, and was left out." in said
    assert "one came without run.json: machine, versions and arguments are not known." in said
    assert "unknown machine of one (no run.json)" in said


def test_findings_compare_like_with_like(tmp_path):
    lance = write_run(tmp_path / "lance", accuracies=(0.7,))
    bp = write_run(tmp_path / "bp", "bp", scales=(2.0, 2.04), accuracies=(0.75,))
    assert findings_of(open_views([lance, bp])) == (
        "lance beside bp: LANCE keeps 100 times fewer activation bytes than BP, peaks at 100.02 MiB of RSS"
        " against 100.02 MiB, is 2.00 times as fast, is 5.0 points less accurate (70.0 % against 75.0 %).",
    )
    noisy = write_run(tmp_path / "noisy", "bp", scales=(0.8, 1.0, 1.5), accuracies=(0.7,))
    (finding,) = findings_of(open_views([lance, noisy]))
    taken = [(0.8, 1.0, 1.5)[step % 3] for step in range(2, 21)]
    spread = statistics.stdev(taken) / statistics.mean(taken)
    assert f"takes as long (to within the spread, {spread:.0%}), is as accurate (70.0 %)" in finding


def test_a_finding_has_the_peak_of_each_run_where_both_are_known(tmp_path):
    lance = write_run(tmp_path / "lance", peak_rss_kib=114_514)
    evaluation = step_rows(step=20, phase="eval", peak_rss_kib=120 * 1024)[-1]
    write_rows(lance / "steps.csv", StepRow, [evaluation], mode="a")
    bp = write_run(tmp_path / "bp", "bp", peak_rss_kib=109 * 1024)
    (finding,) = findings_of(open_views([lance, bp]))
    assert ", peaks at 120.00 MiB of RSS against 109.00 MiB, " in finding
    unknown = write_run(tmp_path / "unknown", "bp", peak_rss_kib=None)
    assert "RSS" not in findings_of(open_views([lance, unknown]))[0]
    (bench,) = findings_of(open_views([write_benchmark(tmp_path / "bench", ("lance", "bp"))]))
    assert ", peaks at 100.01 MiB of RSS against 100.01 MiB, " in bench


def of_test_images(images, accuracy, folder, method="lance", **changes):
    record = {**RECORD, "data": {**RECORD["data"], "test": images}, **changes}
    return write_run(folder, method, accuracies=(accuracy,), record=record)


# Two standard errors of 0.8 are 2 * sqrt(0.16 / n): 0.253 of 10, 0.040 of 400, 0.008 of 10,000 images.
TEST_IMAGES = [
    (10, 0.8, 0.7, "10 test images each: one image is 10 points, and two standard errors are 29.0 points."),
    (10, 1.0, 1.0, "10 test images each: one image is 10 points."),
    (160, 0.8, 0.2, "160 test images each: one image is 0.625 points, and two standard errors are 6.3 points."),
    (400, 0.8, 0.77, "400 test images each: one image is 0.25 points, and two standard errors are 4.2 points."),
    (400, 0.8, 0.8, None),
    (400, 0.8, 0.75, None),
    (10_000, 0.8, 0.795, "10000 test images each: one image is 0.01 points, and two standard errors are 0.8"
     " points."),
    (10_000, 0.8, 0.79, None),
    (None, 0.8, 0.7, None),
    (0, 0.8, 0.7, None),
]  # fmt: skip


@pytest.mark.parametrize(("images", "lance", "bp", "expected"), TEST_IMAGES)
def test_accuracies_of_few_test_images_are_doubted(tmp_path, images, lance, bp, expected):
    folders = [
        of_test_images(images, lance, tmp_path / "lance"),
        of_test_images(images, bp, tmp_path / "bp", "bp"),
    ]
    said = () if expected is None else (f"Accuracies of lance and bp are of {expected}",)
    assert notices_of(open_views(folders)) == said


def test_accuracies_that_nobody_compares_are_not_doubted(tmp_path):
    lance = of_test_images(10, 0.8, tmp_path / "lance")
    assert notices_of(open_views([lance])) == ()
    running = of_test_images(10, 0.7, tmp_path / "running", "bp", status="running")
    assert not any("test images" in text for text in notices_of(open_views([lance, running])))


def test_doubted_accuracies_of_many_runs_and_of_unlike_test_images(tmp_path):
    methods = ("lance", "asi", "hosvd", "bp")
    folders = [of_test_images(10, 0.8, tmp_path / method, method) for method in methods]
    (notice,) = notices_of(open_views(folders))
    assert notice.startswith("Accuracies of lance, bp, asi and 1 more are of 10 test images each:")
    other = of_test_images(20, 0.9, tmp_path / "other", "bp")
    (notice,) = notices_of(open_views([folders[0], other]))
    assert notice == (
        "The accuracy of lance is of 10 test images: one image is 10 points, and two standard errors are 25.3"
        " points. The accuracy of other is of 20 test images: one image is 5 points, and two standard errors"
        " are 13.4 points."
    )


def computed_and_kept(folder, method="lance", scales=(1.0, 1.02)):
    """A run that computed features in its first ten steps, and read them later."""
    run = write_run(folder, method, steps=10, scales=scales)
    later = [
        row for step in range(11, 31) for row in step_rows(method, step, scales[step % 2] / 2, cached=True)
    ]
    write_rows(run / "steps.csv", StepRow, later, mode="a")
    return run


def test_a_warning_names_what_tells_settings_apart(tmp_path):
    views = open_views([computed_and_kept(tmp_path / "run", scales=(1.0, 1.5))])
    (notice,) = notices_of(views)
    assert "run: LANCE, 2 layers, features computed (22%); run: LANCE, 2 layers, features kept (21%)" in notice
    run = write_run(tmp_path / "other", scales=(1.0, 1.5))
    for changes in ({"micro_batch": 4}, {"threads": 4}, {"batch_size": 32}):
        rows = [
            row for step in range(21, 41) for row in step_rows(step=step, scale=(1, 1.5)[step % 2], **changes)
        ]
        write_rows(run / "steps.csv", StepRow, rows, mode="a")
    (notice,) = notices_of(open_views([run]))
    assert "other: LANCE, 2 layers, batch 16, micro-batch 4, 1 thread (" in notice


def test_bars_of_a_run_say_whether_features_were_computed(tmp_path):
    both, plain = computed_and_kept(tmp_path / "both"), write_run(tmp_path / "plain")
    plot = plots_of([both, plain])["step-time-runs"]
    assert [[bar.is_hatched for bar in group.bars] for group in plot.groups] == [[True, False], [True]]
    assert plot.hatched == "features computed"
    assert "Hatched: the frozen part computed the features; plain:" in plot.caption
    text = render(compose(open_views([both]), "now"), lambda plot: "<svg></svg>")
    assert "</svg><span>features computed</span></li>" in text
    alone = plots_of([plain])["step-time-runs"]  # nothing to tell apart
    assert not alone.groups[0].bars[0].is_hatched
    assert alone.hatched == ""
    assert "Hatched" not in alone.caption


def test_an_accuracy_is_compared_only_where_both_runs_have_ended(tmp_path):
    lance = write_run(tmp_path / "lance", accuracies=(0.7,))
    for status in ("running", "interrupted", "failed", None):
        record = None if status is None else {**RECORD, "status": status}
        bp = write_run(tmp_path / f"{status}", "bp", accuracies=(0.75,), record=record)
        assert "accurate" not in " ".join(findings_of(open_views([lance, bp])))
    assert (
        "less accurate"
        in findings_of(open_views([lance, write_run(tmp_path / "bp", "bp", accuracies=(0.9,))]))[0]
    )


def test_what_else_differs_within_a_ratio_is_said(tmp_path):
    shape = {**RECORD, "artifact": {**RECORD["artifact"], "input_shape": [3, 64, 64]}}
    small = {**shape, "artifact": {**RECORD["artifact"], "input_shape": [3, 32, 32]}}
    older = {**shape, "versions": {"onnxruntime": "1.20.0"}}
    lance = write_run(tmp_path / "lance", record=shape)
    said = notices_of(open_views([lance, write_run(tmp_path / "bp", "bp", record=small)]))
    text = "Ratios do not compare the methods alone: lance and bp have inputs of [3, 64, 64] and [3, 32, 32]"
    assert said == (f"{text}.",)
    (notice,) = notices_of(open_views([lance, write_run(tmp_path / "old", "bp", record=older)]))
    assert "lance and old have onnxruntime 1.31.1 and 1.20.0." in notice
    bp, asi = write_run(tmp_path / "a", "bp", record=shape), write_run(tmp_path / "b", "asi", record=older)
    (notice,) = notices_of(open_views([bp, asi]))  # a finding without LANCE
    assert "a and b have onnxruntime 1.31.1 and 1.20.0." in notice
    assert notices_of(open_views([lance, write_run(tmp_path / "same", "bp", record=shape)])) == ()
    assert notices_of(open_views([lance, write_run(tmp_path / "unknown", "bp")])) == ()  # says no shape


def test_ratios_are_plain_numbers(tmp_path):
    lance = write_run(tmp_path / "lance", accuracies=(0.7,), activation_bytes=320)
    bp = write_run(tmp_path / "bp", "bp", accuracies=(0.7,))
    (finding,) = findings_of(open_views([lance, bp]))
    assert "keeps 1,280 times fewer activation bytes than BP" in finding


def test_a_head_alone_is_a_line_beside_the_points(tmp_path):
    """It keeps no activations, so a logarithmic axis has no place for it."""
    head = write_run(tmp_path / "head", "bp", accuracies=(0.6,), layers=0, activation_bytes=0)
    plot = plots_of([head, write_run(tmp_path / "lance", accuracies=(0.7,))])["activation-bytes-accuracy"]
    assert [(line.label, line.x, line.y) for line in plot.lines] == [("lance", (4.0,), (70.0,))]
    assert plot.rules == ((60.0, "head"),)
    assert plot.caption.endswith("Dashed: a head alone, which keeps none.")
    alone = plots_of([write_run(tmp_path / "alone")])["activation-bytes-accuracy"]
    assert "head" not in alone.caption
    assert plot.x_is_log


def test_the_peak_of_a_run_is_that_of_its_evaluations_too(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    evaluation = step_rows(step=3, phase="eval", peak_rss_kib=300 * 1024)[-1]
    write_rows(run / "steps.csv", StepRow, [evaluation], mode="a")
    page = render(compose(open_views([run]), "now"), lambda plot: "<svg></svg>")
    assert re.search(r"peak RSS</dt><dd[^>]*>300.00 MiB", page), page[:5000]


def test_heat_marks_throttled_stretches(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "steps.csv").read_text().splitlines(keepends=True)
    for number in range(1 + 6 * 4, 1 + 6 * 9):  # steps 5 to 9, which end at 10, 12, ..., 18 seconds
        lines[number] = lines[number].replace(",0x0,", ",0x4,")
    (run / "steps.csv").write_text("".join(lines))
    plot = plots_of([run])["temperature-time"]
    assert plot.shaded == ((8.0, 18.0),)
    assert plot.x_label == "seconds of training"
    assert plot.lines[0].y[0] == 51.0


def test_times_are_in_a_unit_that_suits(tmp_path):
    label = {}
    for name, time_s in (("short", 60.0), ("middle", 3000.0), ("long", 90_000.0)):
        label[name] = plots_of([write_run(tmp_path / name, time_s=time_s)])["memory-time"].x_label
    assert label == {
        "short": "seconds of training", "middle": "minutes of training", "long": "hours of training",
    }  # fmt: skip


def test_every_axis_has_its_name(tmp_path):
    for plot in plots_of([write_run(tmp_path / "run"), write_benchmark(tmp_path / "bench")]).values():
        assert plot.x_label
        assert plot.y_label
        assert plot.title
        assert plot.caption.endswith(".")


def test_a_method_keeps_its_colour_and_runs_of_it_their_shades():
    assert run_colours(["bp", "lance", "bp"])[:2] == (METHODS["bp"], METHODS["lance"])
    assert len(set(run_colours(["bp"] * 5))) == 5
    assert method_colour("unheard-of") == method_colour("unheard-of")
    assert shade("#000000", 0.0) == "#ffffff"
    assert shade("#ffffff", 2.0) == "#000000"


class _Checker(HTMLParser):
    """Tags are closed in order, ids are unique, and nothing is asked of a network."""

    VOID = ("meta", "link", "wbr")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page):
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith(("#", "data:")) for link in checker.links)
    assert "<script" not in page
    return checker


def test_the_page_is_well_formed_and_escapes_what_it_was_given(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    record = {**RECORD, "arguments": [evil], "machine": {**RECORD["machine"], "board": evil}}
    views = open_views([write_run(tmp_path / "run <b>", record=record), write_benchmark(tmp_path / "bench")])
    page = render(compose(views, "now"), lambda plot: "<svg></svg>")
    checked(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "run &lt;b&gt;" in page


def test_names_break_after_dots_and_underscores_and_numbers_nowhere(tmp_path):
    page = render(
        compose(open_views([write_run(tmp_path / "blocks.16.point_linear&0.5")]), "now"),
        lambda plot: "<svg></svg>",
    )
    name = "blocks.16.<wbr>point_<wbr>linear&amp;0.5"
    assert f"<h3>{name}</h3>" in page
    assert f'<td data-label="run"><span>{name}</span></td>' in page
    assert re.search(r'<td data-label="peak RSS"><span>100\.02 MiB</span>', page)
    assert page.count("<wbr>") == 2 * page.count(name)


def test_the_page_says_where_and_with_what_it_was_measured(tmp_path):
    page = render(compose(open_views([write_run(tmp_path / "run")]), "now"), lambda plot: "<svg></svg>")
    found = dict(re.findall(r"<tr><td[^>]*><span>([^<]*)</span></td><td[^>]*><span>([^<]*)</span>", page))
    assert found["machine"] == "Raspberry Pi 4 Model B Rev 1.5, 4 cores, 4 GiB, aarch64"
    assert found["system"] == "Linux 6.12"
    assert found["command"] == "lance-device train --artifact pkg.tar --out run"
    assert found["package"] == "pkg.tar"
    assert found["package identity (SHA-256)"] == "0" * 64
    assert found["data"] == "photos"
    assert found["images"] == "160 train, 20 validation, 400 test"
    assert found["versions"] == "onnxruntime 1.31.1"
    assert found["options"] == "method lance, epochs 2, lr 0.05"
    assert found["peak memory is"] == "VmHWM, reset per phase"


def test_the_figure_of_memory_has_the_peak_and_the_end_of_each_step(tmp_path):
    plot = plots_of([write_run(tmp_path / "run", steps=3)])["memory-time"]
    assert [(line.label, line.x, line.y) for line in plot.lines] == [
        ("run, peak (VmHWM)", (2.0, 4.0, 6.0), tuple((102_400 + step) / 1024 for step in (1, 2, 3))),
        ("run, at the end", (2.0, 4.0, 6.0), (96.0, 96.0, 96.0)),
    ]
    assert "(reset before each phase, so it falls again)" in plot.caption
    rising = write_run(
        tmp_path / "rising", steps=3, record={**RECORD, "peak_rss_source": "ru_maxrss, only rises"}
    )
    assert "the highest since the process began" in plots_of([rising])["memory-time"].caption
    unknown = plots_of([write_run(tmp_path / "unknown", steps=3, rss_kib=None, peak_rss_kib=None)])
    assert "memory-time" not in unknown


def test_empty_parts_say_how_they_would_be_filled(tmp_path):
    bench = render(
        compose(open_views([write_benchmark(tmp_path / "bench")]), "now"), lambda plot: "<svg></svg>"
    )
    assert "No training run is in this report: benchmarks measure steps, and learn nothing." in bench
    record = json.loads(json.dumps(RECORD))
    run = write_run(tmp_path / "run", steps=1, accuracies=(), record=record, temperature_c=None, arm_mhz=None)
    page = render(compose(open_views([run]), "now"), lambda plot: "<svg></svg>")
    assert "The machine said neither its temperature nor its clock" in page
    assert "No step was measured yet, apart from warm-ups." in page
    assert "No run in this report was evaluated on test images yet." in page
