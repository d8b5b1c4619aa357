"""The live table, on a terminal that a few lines of Python imitate."""

import io
import os
import pty
import re
import threading

import pytest
from device_harness import spawn, train_words

from lance_device.live import MOST_LOSSES, Live, Losses
from lance_device.live_table import StepView, curve, epoch_text, step_text, table_lines
from lance_device.terminal import Block
from lance_edge.profiles import HistoryRow

ROW = HistoryRow(1, 3, 0.05, 1.5, 0.25, 0.5, 1.25, 0.75, None, True, 250.0)
VIEW = StepView(
    3, 50, 120, 2000, 0.5321, 0.812, 23.44, 98304, 720.0,
    phases_ms={"data": 1.1, "forward": 7.2, "backward": 6.3, "step": 14.6}, peak_rss_kib=114688,
    activation_bytes=264_192, saved_bytes=1 << 20, temperature_c=61.4, arm_mhz=1400.0, troubles=("throttled",),
    evaluation=ROW, best_accuracy=0.5,
)  # fmt: skip


class Screen(io.StringIO):
    """What a person sees: text, cursor up, erase to the end of the line or of the screen (ECMA-48)."""

    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.lines, self.row, self.column = [""], 0, 0

    def isatty(self):
        return True

    def write(self, text):
        for up, erase, other in re.findall(r"\x1b\[(?:(\d+)A|([JK]))|(\r|\n|[^\x1b\r\n]+)", text):
            if up:
                assert int(up) <= self.row, "above the top of the screen"
                self.row -= int(up)
            elif erase:
                self.lines[self.row] = self.lines[self.row][: self.column]
                self.lines = self.lines[: self.row + 1] if erase == "J" else self.lines
            elif other == "\r":
                self.column = 0
            elif other == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            else:
                line = self.lines[self.row]
                self.lines[self.row] = line[: self.column] + other + line[self.column + len(other) :]
                self.column += len(other)
        return len(text)


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


def test_the_table():
    assert table_lines(VIEW, [3.0, 2.0, 1.0], is_unicode=True) == [
        "step     120 of 2000  ━───────────────────────  6 %   epoch 3 of 50   12 min left",
        "loss     0.532   █▅▁",
        "accuracy running 81.2 %, validation 50.0 %, test 75.0 %, best validation 50.0 % (epoch 1)",
        "time     14.6 ms a step: data 1.1, forward 7.2, backward 6.3   23.4 images/s",
        "memory   RSS 96.00 MiB, peak 112.00 MiB, activations 258.0 KiB, saved 1.00 MiB",
        "board    61 °C, 1400 MHz, THROTTLED",
    ]


def test_what_is_not_known_is_left_out():
    bare = StepView(1, None, 7, None, None, None, 5.0, None, None)
    assert table_lines(bare, [], is_unicode=True) == ["step     7   epoch 1", "time     5.0 images/s"]
    assert step_text(bare) == "epoch 1  step 7  5.0 images/s"
    assert epoch_text(HistoryRow(1, 3, 0.05, None, 0.0, None, None, None, None, False, 5.0)) == (
        "epoch 1  train loss -, accuracy 0.0 %  5 s"
    )


def test_an_old_terminal_gets_ascii():
    assert all(line.isascii() for line in table_lines(VIEW, [3.0, 1.0], is_unicode=False)[:-1])


def test_the_curve_shows_means_of_neighbours():
    assert curve([]) == curve([1.0]) == ""
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([float(number) for number in range(64)]) == "".join(
        "▁▂▃▄▅▆▇█"[round(number / 31 * 7)] for number in range(32)
    )


def test_losses_stay_few_and_even():
    losses = Losses()
    for step in range(1, 10 * MOST_LOSSES):
        losses.add(step, float(step))
    losses.add(1, float("nan"))
    assert MOST_LOSSES / 2 <= len(losses.values) < MOST_LOSSES
    gaps = {b - a for a, b in zip(losses.values, losses.values[1:], strict=False)}
    assert len(gaps) == 1


def test_the_table_is_written_over_and_remarks_scroll_above_it(screen, monkeypatch):
    live = Live(screen)
    live.note("a remark")
    live.step(StepView(1, 50, 1, 2000, 2.0, 0.1, 5.0, None, None))
    live.epoch(ROW)
    live.step(VIEW)
    monkeypatch.setattr("lance_device.live.REFRESH_INTERVAL_S", 0)
    live.note("another")
    live.step(VIEW)
    expected = ["a remark", epoch_text(ROW), "another", *table_lines(VIEW, [2.0, 0.5321, 0.5321], True), ""]
    assert screen.lines == expected


def test_a_status_takes_the_place_of_the_table(screen):
    live = Live(screen)
    live.step(StepView(1, 50, 1, 2000, 2.0, 0.1, 5.0, None, None))
    live.status("reading", always=True)
    assert screen.lines == ["reading", ""]


def test_nothing_wraps_and_nothing_scrolls_away_in_a_small_terminal(screen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "4")
    block = Block(screen)
    for _ in range(3):
        block.show(table_lines(VIEW, [], is_unicode=True))
    assert screen.lines == [*(line[:39] for line in table_lines(VIEW, [], True)[:3]), ""]
    block.clear()
    assert screen.lines == [""]


@pytest.mark.parametrize("term", ["dumb", None])
def test_without_a_terminal_there_are_plain_lines(monkeypatch, term):
    class File(io.StringIO):
        def isatty(self):
            return term is not None

    if term is not None:
        monkeypatch.setenv("TERM", term)
    file = File()
    live = Live(file)
    live.step(VIEW)
    live.step(VIEW)  # a moment later: not again
    live.epoch(ROW)
    assert file.getvalue().splitlines() == [step_text(VIEW), epoch_text(ROW)]


def test_a_closed_terminal_stops_no_run(screen, monkeypatch):
    def closed(text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen, "write", closed)
    live = Live(screen)
    live.note("nobody")
    live.step(VIEW)


def test_a_real_run_on_a_real_terminal(package, images, tmp_path):
    """Through a pseudo-terminal, where only the program decides that there is one."""
    leader, follower = pty.openpty()
    heard = bytearray()

    def listen():
        try:
            while data := os.read(leader, 4096):
                heard.extend(data)
        except OSError:
            return  # the other end is closed

    prelude = (
        f"import os, sys; os.dup2({follower}, 2); os.environ.update(TERM='xterm', COLUMNS='90', LINES='30');"
        " sys.stderr = open(2, 'w', encoding='utf-8', closefd=False)"
    )
    os.set_inheritable(follower, True)
    process = spawn(
        *train_words(package, images, tmp_path / "run"), "--steps", 6, prelude=prelude, close_fds=False
    )
    os.close(follower)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    out, _ = process.communicate(timeout=120)
    listener.join(timeout=10)
    os.close(leader)
    assert process.returncode == 0, heard.decode()
    screen = Screen()
    screen.write(heard.decode().replace("\r\n", "\n"))
    table = "\n".join(screen.lines)
    assert re.search(r"^step     6 of 6  ━{24}  100 %", table, re.MULTILINE) or "validation" in table
    assert b"\x1b[" in heard
    assert "test accuracy" in out
    rows = [line for line in screen.lines if re.match(r"(step|loss|accuracy|time|memory|board)  ", line)]
    assert all(len(line) < 90 for line in rows)  # remarks may wrap: nothing is written over them
