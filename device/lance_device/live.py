"""What a person sees while a run trains: a live table on a terminal, an occasional plain line elsewhere."""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Protocol, TextIO

from lance_device.live_table import StepView, epoch_text, step_text, table_lines
from lance_device.terminal import Block, is_terminal, speaks_unicode
from lance_edge.profiles import HistoryRow

PLAIN_INTERVAL_S = 30.0  # between lines where the output is no terminal
REFRESH_INTERVAL_S = 0.1
MOST_LOSSES = 1024  # for the curve; of more, every second


class Reporter(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None:
        """A remark."""

    def status(self, text: str, always: bool = False) -> None:
        """How things stand."""

    def step(self, view: StepView) -> None:
        """A step is complete."""

    def epoch(self, row: HistoryRow) -> None:
        """An evaluation is complete."""


class Silent:
    """Tells nobody (`--quiet`)."""

    def note(self, text: str) -> None:
        """Nothing."""

    def status(self, text: str, always: bool = False) -> None:
        """Nothing."""

    def step(self, view: StepView) -> None:
        """Nothing."""

    def epoch(self, row: HistoryRow) -> None:
        """Nothing."""


class Live:
    """Writes to a stream that is, or is not, a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._block = Block(stream) if is_terminal(stream) else None
        self._is_unicode = speaks_unicode(stream)
        self._interval_s = PLAIN_INTERVAL_S if self._block is None else REFRESH_INTERVAL_S
        self._written_at = float("-inf")
        self._losses = Losses()

    def note(self, text: str) -> None:
        """A line of its own."""
        self._write_line(text)

    def step(self, view: StepView) -> None:
        """Refresh the table, unless that was done a moment ago; the first and the last step always."""
        self._losses.add(view.step, view.loss)
        self.show(view, self._losses.values)

    def show(self, view: StepView, losses: Sequence[float]) -> None:
        """The same with losses that somebody else has gathered."""
        if not self._is_due(view.step in (1, view.total_steps)):
            return
        if self._block is None:
            self._write(step_text(view) + "\n")
        else:
            self._block.show(table_lines(view, losses, self._is_unicode))

    def status(self, text: str, always: bool = False) -> None:
        """How things stand: in place of the last such line on a terminal, now and then elsewhere."""
        if not self._is_due(always):
            return
        if self._block is None:
            self._write(text + "\n")
        else:
            self._block.show([text])

    def epoch(self, row: HistoryRow) -> None:
        """A line that stays."""
        self._write_line(epoch_text(row))

    def _is_due(self, always: bool) -> bool:
        if time.monotonic() - self._written_at < self._interval_s and not always:
            return False
        self._written_at = time.monotonic()
        return True

    def _write_line(self, text: str) -> None:
        if self._block is None:
            self._write(text + "\n")
        else:
            self._block.print(text)
            self._written_at = float("-inf")  # the table comes back with the next step

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody looks any more: a closed pipe is no reason to stop
            self._stream.write(text)
            self._stream.flush()


class Losses:
    """Losses for the curve, evenly over the run."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._stride = 1

    def add(self, step: int, loss: float | None) -> None:
        """Of a step, counted from 1."""
        if loss is None or not math.isfinite(loss) or step % self._stride:
            return
        self.values.append(loss)
        if len(self.values) == MOST_LOSSES:
            self.values, self._stride = self.values[1::2], 2 * self._stride
