import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_edge.errors import DataError
from lance_edge.profiles import (
    MOST_KEPT,
    HistoryRow,
    LatencyCollector,
    StepRow,
    SummaryRow,
    cells,
    columns,
    read_intact_rows,
    read_rows,
    summarise,
)

PUBLISHED = [
    "run_id",
    "method",
    "model",
    "layers",
    "energy",
    "batch_size",
    "micro_batch",
    "threads",
    "epoch",
    "step",
    "warmup",
    "phase",
    "latency_ms",
    "rss_kib",
    "peak_rss_kib",
    "loss",
    "temperature_c",
    "arm_mhz",
    "throttled",
    "time_s",
    "samples",
    "cached",
    "activation_bytes",
    "saved_bytes",
]

ROW = StepRow(
    run_id="r",
    method="lance",
    model="mcunet",
    layers=4,
    energy=0.7,
    batch_size=128,
    micro_batch=8,
    threads=4,
    epoch=1,
    step=2,
    warmup=False,
    phase="forward",
    latency_ms=12.5,
    rss_kib=1000,
    peak_rss_kib=1100,
    loss=1.25,
    temperature_c=None,
    arm_mhz=1400.0,
    throttled="0x0",
    time_s=3.5,
    samples=128,
    cached=True,
    activation_bytes=4096,
    saved_bytes=8192,
)


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([",".join(PUBLISHED), *lines]) + "\n")
    return path


def _line(**changes) -> str:
    return ",".join(cells(dataclasses.replace(ROW, **changes)))


def test_the_columns_are_the_published_ones_in_order():
    assert list(columns(StepRow)) == PUBLISHED
    assert columns(SummaryRow)[:2] == ("phase", "n")
    assert len(columns(HistoryRow)) == 11


def test_cells():
    assert _line() == (
        "r,lance,mcunet,4,0.7,128,8,4,1,2,0,forward,12.5,1000,1100,1.25,,1400,0x0,3.5,128,1,4096,8192"
    )


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=50, deadline=None)
@given(
    loss=st.none() | finite,
    clock=st.none() | finite,
    warmup=st.booleans(),
    throttled=st.none() | st.just("0x5"),
)
def test_rows_come_back_as_they_were(tmp_path_factory, loss, clock, warmup, throttled):
    row = dataclasses.replace(ROW, loss=loss, arm_mhz=clock, warmup=warmup, throttled=throttled)
    path = _write(tmp_path_factory.mktemp("csv") / "steps.csv", ",".join(cells(row)))
    [found] = read_rows(path, StepRow)
    for name in ("loss", "arm_mhz"):  # nine digits bring back a float32, not the float64 that Python holds
        value, expected = getattr(found, name), getattr(row, name)
        assert value == expected or math.isclose(value, expected, rel_tol=1e-8)
    assert dataclasses.replace(found, loss=None, arm_mhz=None) == dataclasses.replace(
        row, loss=None, arm_mhz=None
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (_line().replace("12.5", "fast"), "line 2, column 13 (latency_ms): expected a number, found 'fast'"),
        (
            _line().replace(",128,", ",x,", 1),
            "line 2, column 6 (batch_size): expected a whole number, found 'x'",
        ),
        (_line().replace(",1,4096", ",yes,4096"), "line 2, column 22 (cached): expected 0 or 1, found 'yes'"),
        (_line().replace("12.5", "1_2.5"), "line 2, column 13 (latency_ms): expected a number, found '1_2.5'"),
        (_line().replace("12.5", " 12.5"), "line 2, column 13 (latency_ms): expected a number, found ' 12.5'"),
        (_line().replace("12.5", ""), "line 2, column 13 (latency_ms): expected a number, found ''"),
        (_line()[:40], "line 2: expected 24 cells, found"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, line, words):
    with pytest.raises(DataError, match=r"steps\.csv") as caught:
        list(read_rows(_write(tmp_path / "steps.csv", line), StepRow))
    assert words in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_may_be_no_number_and_nothing_else_may(tmp_path, value):
    [found] = read_rows(_write(tmp_path / "steps.csv", _line(loss=value)), StepRow)
    assert found.loss == value or (math.isnan(found.loss) and math.isnan(value))
    with pytest.raises(DataError, match=r"column 17 \(temperature_c\): expected a number, found '-?(nan|inf)'"):
        list(read_rows(_write(tmp_path / "steps.csv", _line(temperature_c=value)), StepRow))


def test_other_columns_and_missing_files_are_named(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("phase,speed\n")
    with pytest.raises(DataError, match=r"missing \['run_id'.*unknown \['speed'\]"):
        list(read_rows(other, StepRow))
    with pytest.raises(DataError, match=r"missing.csv: cannot read \(No such file"):
        list(read_rows(tmp_path / "missing.csv", StepRow))
    other.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"other.csv: not a readable CSV"):
        list(read_rows(other, StepRow))


def test_intact_rows_end_at_a_torn_one(tmp_path):
    path = _write(tmp_path / "steps.csv", _line(step=1), _line(step=2), _line(step=3)[:30])
    assert [row.step for row in read_intact_rows(path, StepRow)] == [1, 2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40))
def test_summaries_equal_the_standard_library(latencies_ms):
    rows = [dataclasses.replace(ROW, latency_ms=value) for value in latencies_ms]
    rows.append(dataclasses.replace(ROW, latency_ms=1e9, warmup=True))
    [found] = summarise(rows)
    assert found.n == len(latencies_ms)
    assert found.mean_ms == pytest.approx(statistics.mean(latencies_ms))
    assert found.p50_ms == pytest.approx(statistics.median(latencies_ms))
    assert (found.min_ms, found.max_ms) == (min(latencies_ms), max(latencies_ms))
    expected_std = statistics.stdev(latencies_ms) if len(latencies_ms) > 1 else 0.0
    assert found.std_ms == pytest.approx(expected_std, rel=1e-6, abs=1e-6)
    assert found.p50_ms <= found.p90_ms <= found.p99_ms


@pytest.mark.parametrize("count", [MOST_KEPT, MOST_KEPT + 1, 3 * MOST_KEPT, 10 * MOST_KEPT + 7])
def test_a_long_run_is_summarised_in_a_bounded_memory(count):
    """Percentiles from an even sample of at least half of `MOST_KEPT`."""
    latencies_ms = np.random.default_rng(count).permutation(np.linspace(0, 100, count))
    collector = LatencyCollector()
    for latency_ms in latencies_ms:
        collector.add(dataclasses.replace(ROW, latency_ms=float(latency_ms)))
    assert MOST_KEPT // 2 < len(collector._phases[ROW.phase]._kept) <= MOST_KEPT
    [found] = collector.rows()
    assert (found.n, found.min_ms, found.max_ms) == (count, 0.0, 100.0)
    assert found.mean_ms == pytest.approx(np.mean(latencies_ms), rel=1e-9)
    assert found.std_ms == pytest.approx(np.std(latencies_ms, ddof=1), rel=1e-9)
    # Standard error of a quantile q of n of them: 100 sqrt(q (1 - q) / n), at most 1.1 for n = 2048; 3 of it.
    for share, percentile_ms in ((0.5, found.p50_ms), (0.9, found.p90_ms), (0.99, found.p99_ms)):
        assert abs(percentile_ms - 100 * share) < 300 * math.sqrt(share * (1 - share) / (MOST_KEPT // 2))


def test_summaries_stand_in_the_order_of_the_phases():
    rows = [dataclasses.replace(ROW, phase=phase) for phase in ("step", "update", "data", "eval")]
    assert [row.phase for row in summarise(rows)] == ["data", "update", "step", "eval"]


def test_a_whole_file_of_other_columns_is_not_taken_for_a_torn_one(tmp_path):
    """Resuming drops torn rows; it must not drop a file that another version wrote."""
    path = tmp_path / "steps.csv"
    path.write_text("run_id,method,colour\nrun,bp,red\n")
    with pytest.raises(DataError, match="unknown \\['colour'\\]; read it with the version"):
        list(read_intact_rows(path, StepRow))


def test_a_torn_header_is_an_empty_file(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("run_id,meth")
    assert list(read_intact_rows(path, StepRow)) == []
    with pytest.raises(DataError, match="its header is cut off"):
        list(read_rows(path, StepRow))
    path.write_text("run_id,method,model\n")  # with its end: an older version had no more
    with pytest.raises(DataError, match=r"expected the columns .*; missing \['layers', 'energy'"):
        list(read_intact_rows(path, StepRow))
