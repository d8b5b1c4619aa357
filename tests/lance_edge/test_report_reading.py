"""Reading runs for a report: bounded series, files that grow, folders in every state."""

import json
import statistics

import pytest
from report_rows import RECORD, history_rows, step_rows, write_benchmark, write_rows, write_run

from lance_edge.errors import DataError
from lance_edge.profiles import HistoryRow, StepRow, columns
from lance_edge.report import tail as tail_module
from lance_edge.report.folders import find_files, open_views
from lance_edge.report.tail import StartedOver, Tail
from lance_edge.report.thin import Thin
from lance_edge.report.views import MOST_HISTORY


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 1001])
def test_a_thin_series_is_bounded_and_loses_no_extreme(count):
    series = Thin(most=8)
    values = [(7 * number) % 101 for number in range(count)]
    for x, y in enumerate(values):
        series.add(x, float(y))
    points = series.points()
    assert len(points) <= 8
    assert len(points) == count if count <= 8 else len(points) > 4
    if count:
        assert points[-1].x == count - 1
        assert max(point.high for point in points) == max(values)
        assert min(point.low for point in points) == min(values)
        edges = [
            -1,
            *(int(point.x) for point in points),
        ]  # each point stands for what lies since the one before
        for point, start, end in zip(points, edges, edges[1:], strict=False):
            assert point.mean == pytest.approx(statistics.mean(values[start + 1 : end + 1]))


def test_unknown_values_leave_no_trace():
    series = Thin()
    series.add(1.0, None)
    assert series.points() == ()


def rows_of(tail):
    return [row.step for row in tail.rows()]


def test_a_tail_gives_whole_new_rows(tmp_path):
    path = tmp_path / "steps.csv"
    tail = Tail(path, (StepRow,))
    assert rows_of(tail) == []  # no file yet
    write_rows(path, StepRow, step_rows(step=1)[-1:])
    assert rows_of(tail) == [1]
    assert rows_of(tail) == []
    with path.open("a") as file:
        file.write("a,lance,tiny,2")  # a row that is being written
    assert rows_of(tail) == []
    assert tail.is_torn
    with path.open("r+") as file:
        file.truncate(path.stat().st_size - len("a,lance,tiny,2"))
    write_rows(path, StepRow, step_rows(step=2)[-1:], mode="a")
    assert rows_of(tail) == [2]
    assert not tail.is_torn


def test_a_tail_sees_that_rows_were_taken_back(tmp_path):
    """As a resumed run does: back to the checkpoint, then on, so that the file may even be longer again."""
    path = tmp_path / "steps.csv"
    write_rows(path, StepRow, [row for step in (1, 2, 3) for row in step_rows(step=step)[-1:]])
    tail = Tail(path, (StepRow,))
    assert rows_of(tail) == [1, 2, 3]
    again = [row for step in (1, 2, 4, 5) for row in step_rows(step=step)[-1:]]
    write_rows(path, StepRow, again)
    with pytest.raises(StartedOver):
        rows_of(tail)
    assert rows_of(tail) == [1, 2, 4, 5]
    path.unlink()
    with pytest.raises(StartedOver):
        rows_of(tail)
    assert rows_of(tail) == []


def test_large_files_are_read_in_pieces(tmp_path):
    path = tmp_path / "steps.csv"
    write_rows(path, StepRow, [row for step in range(1, 301) for row in step_rows(step=step)])
    assert path.stat().st_size > 2 << 16
    assert rows_of(Tail(path, (StepRow,))) == [step for step in range(1, 301) for _ in range(6)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"epoch,step\n1,2\n", "expected the columns run_id,method"),
        (b"\xff\xfe\n", "line 1: not a readable CSV file"),
        (
            ",".join(columns(StepRow)[:20]).encode() + b"\n",
            r"missing \['samples', 'cached', 'activation_bytes'",
        ),
        (b"x" * 200_000, "steps.csv line 1: longer than 65536 bytes; expected a CSV file of a training run"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(tmp_path, data, expected):
    path = tmp_path / "steps.csv"
    path.write_bytes(data)
    with pytest.raises(DataError, match=expected):
        rows_of(Tail(path, (StepRow,)))


def test_a_damaged_row_is_met_again_and_costs_no_other(tmp_path):
    """A page asks again and again: it must not find, the second time, that all is well."""
    path = tmp_path / "steps.csv"
    write_rows(path, StepRow, [row for step in range(1, 6) for row in step_rows(step=step)[-1:]])
    whole = path.read_bytes()
    damages = {
        "eight": whole.replace(b",1,3,0,step,", b",1,drei,0,step,"),
        "bytes": whole.replace(b",1,3,0,step,", b",1,\xff,0,step,"),
        "zeros": whole.replace(b",1,3,0,step,", b",1,\0\0\0\0,0,step,"),
    }
    for data in damages.values():
        path.write_bytes(data)
        tail, found = Tail(path, (StepRow,)), []
        for _ in range(3):
            with pytest.raises(DataError, match=r"steps.csv line 4"):
                found += (row.step for row in tail.rows())
        assert found == [1, 2]
        path.write_bytes(whole)  # copied again
        assert rows_of(tail) == [3, 4, 5]


ZEROS = [
    b"\0" * 200_000,
    b"\0\0\0\n",
    b"a,lance,\0\0\0",
    b"a,lance,\0\0,5\n" + b"\0" * 100_000 + b"\r\n",
    b"a,l\0",
]


@pytest.mark.parametrize("zeros", ZEROS)
def test_zeros_at_the_end_are_a_torn_row(tmp_path, zeros):
    """What a file system puts where a power cut kept rows from the disk."""
    run = write_run(tmp_path / "run", steps=3)
    with (run / "steps.csv").open("ab") as file:
        file.write(zeros)
    (view,) = open_views([run])
    assert view.is_torn
    assert view.steps == 3
    assert not view.update()


def test_zeros_that_fill_a_piece_to_its_end_are_torn_too(tmp_path, monkeypatch):
    path = tmp_path / "steps.csv"
    write_rows(path, StepRow, step_rows(step=1)[-1:])
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\0\0\n")
    for piece in range(1, size + 4):
        monkeypatch.setattr(tail_module, "CHUNK_BYTES", piece)
        tail = Tail(path, (StepRow,))
        assert rows_of(tail) == [1]
        assert tail.is_torn


def test_a_bad_cell_is_named_by_line_and_column(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "steps.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines[8] = lines[8].replace("lance", "lance", 1).replace(",16,8,1,", ",16,eight,1,", 1)
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"steps.csv line 9, column 7 \(micro_batch\): expected a whole number"):
        open_views([run])


def test_a_mark_at_the_beginning_and_ends_of_windows_lines_are_taken(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    text = (run / "steps.csv").read_text()
    (run / "steps.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert open_views([run])[0].steps == 3


def test_a_view_holds_what_the_rows_say(tmp_path):
    (view,) = open_views([write_run(tmp_path / "run", scales=(1.0, 2.0, 3.0))])
    ((setting, costs),) = view.measured().items()
    assert (setting.method, setting.layers, setting.cached) == ("lance", 2, False)
    latencies = [10.5 * (1.0, 2.0, 3.0)[step % 3] for step in range(2, 21)]  # the first step is a warm-up
    step = costs.phases()["step"]
    assert step.n == 19
    assert step.p50_ms == pytest.approx(statistics.median(latencies))
    assert costs.peak_rss_kib == 102_420
    assert view.steps == 20
    assert view.test_accuracy == 0.75
    assert view.loss.points()[-1].mean == pytest.approx(0.1)
    assert view.machine.label == "Raspberry Pi 4 Model B Rev 1.5, 4 cores, 4 GiB, aarch64"


def test_a_view_follows_a_run(tmp_path):
    run = write_run(tmp_path / "run", steps=5, accuracies=(0.5,))
    (view,) = open_views([run])
    assert not view.update()
    write_rows(run / "steps.csv", StepRow, step_rows(step=6), mode="a")
    write_rows(run / "history.csv", HistoryRow, history_rows((0.1, 0.9))[1:], mode="a")
    (run / "run.json").write_text(json.dumps({**RECORD, "status": "interrupted"}))
    assert view.update()
    assert (view.steps, view.test_accuracy, view.status) == (6, 0.9, "interrupted")
    write_run(run, steps=2)  # another run in its place
    assert view.update()
    assert view.steps == 2
    assert len(view.loss.points()) == 2


def test_a_long_history_is_thinned_but_keeps_its_end(tmp_path):
    run = write_run(tmp_path / "run", steps=2, accuracies=[0.5] * (2 * MOST_HISTORY + 5))
    (view,) = open_views([run])
    assert len(view.evaluations) <= MOST_HISTORY + 1
    assert view.evaluations[-1].epoch == 2 * MOST_HISTORY + 5


def test_folders_of_folders_and_csv_files_of_any_name(tmp_path):
    both = tmp_path / "both"
    write_run(both / "one")
    write_benchmark(both / "two")
    assert [view.is_benchmark for view in open_views([both])] == [False, True]

    copied = tmp_path / "copied"
    source = write_run(tmp_path / "source", "bp", record=None)
    copied.mkdir()
    for name in ("steps", "history"):
        text = (source / f"{name}.csv").read_text()
        (copied / f"{name}-bp.csv").write_text(text)
        (copied / f"{name}-lance.csv").write_text(text.replace(",bp,", ",lance,"))
    (copied / "notes.csv").write_text("what,when\nnothing,never\n")
    views = open_views([copied])
    assert [(view.name, view.method, len(view.evaluations)) for view in views] == [
        ("bp", "bp", 2),
        ("lance", "lance", 2),
    ]


def test_files_of_an_older_version_are_known_by_their_first_columns(tmp_path):
    folder = tmp_path / "copied"
    folder.mkdir()
    (folder / "pi-steps.csv").write_text(",".join(columns(StepRow)[:-2]) + "\n")
    with pytest.raises(
        DataError, match=r"pi-steps.csv: expected the columns .*; missing \['activation_bytes', 'saved_bytes'\]"
    ):
        open_views([folder])


def test_hidden_folders_and_files_are_no_runs(tmp_path):
    write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / ".Trash-1000")
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "a.csv").write_bytes((tmp_path / "runs" / "one" / "steps.csv").read_bytes())
    (copied / "._a.csv").write_bytes((copied / "a.csv").read_bytes())
    assert [view.name for view in open_views([tmp_path / "runs", copied])] == ["one", "copied"]


def test_what_is_left_out_of_many_is_said(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "good")
    failed = {**RECORD, "status": "failed", "message": "disk full"}
    write_run(runs / "early", steps=0, accuracies=(), record=failed)
    (runs / "earlier").mkdir()
    (runs / "earlier" / "run.json").write_text(json.dumps({**RECORD, "status": "running"}))
    write_run(runs / "plain", steps=0, accuracies=(), record=None)
    write_run(runs / "worse")
    path = runs / "worse" / "steps.csv"
    path.write_text(path.read_text().replace(",16,8,1,", ",16,eight,1,", 3))
    told = []
    assert [view.name for view in open_views([runs], told.append)] == ["good"]
    assert told[:3] == [
        "earlier holds no rows (status running) and was left out.",
        "early holds no rows (status failed: disk full) and was left out.",
        "plain holds no rows and was left out.",
    ]
    assert told[3].startswith(
        f"worse was left out, as it cannot be read: {path} line 2, column 7 (micro_batch): ex"
    )
    with pytest.raises(DataError, match=r"run.json: holds no rows yet"):
        open_views([runs / "earlier"])


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / board / "run") for board in ("pi4", "pi5")]
    assert [view.name for view in open_views(folders)] == ["pi4/run", "pi5/run"]
    assert [view.name for view in open_views([folders[0], folders[0]])] == ["pi4/run", "pi4/run (2)"]


def test_a_torn_last_row_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    with (run / "steps.csv").open("a") as file:
        file.write("a,lance,ti")
    (view,) = open_views([run])
    assert view.is_torn
    assert view.steps == 3


def test_what_is_no_run_is_refused_with_what_was_expected(tmp_path):
    expected = r"expected the --out folder of lance-device train or bench"
    with pytest.raises(DataError, match=rf"absent: found nothing; {expected}"):
        find_files(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=rf"file: found a file; {expected}"):
        find_files(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"empty: no run and no benchmark in it; {expected}"):
        find_files(tmp_path / "empty")
    new = write_run(tmp_path / "new", steps=0, accuracies=())
    with pytest.raises(DataError, match=r"steps.csv: holds no rows yet; let the run make some steps"):
        open_views([new])
    damaged = write_run(tmp_path / "damaged")
    (damaged / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json line 1, column 2: not JSON"):
        open_views([damaged])
