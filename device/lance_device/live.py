"""What a person sees while a run trains: one live line on a terminal, an occasional plain line elsewhere."""

import contextlib
import shutil
import time
from dataclasses import dataclass
from typing import Protocol, TextIO

from lance_edge.profiles import HistoryRow
from lance_edge.units import duration, percent

PLAIN_INTERVAL_S = 30.0  # between lines where the output is no terminal
REFRESH_INTERVAL_S = 0.1
CLEAR_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class StepView:
    """A training step as shown; `epoch` and `step` count from 1, `accuracy` is the running one."""

    epoch: int
    epochs: int
    step: int
    total_steps: int
    loss: float
    accuracy: float
    images_per_s: float
    rss_kib: int | None
    seconds_left: float


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
        self._is_terminal = stream.isatty()
        self._interval_s = REFRESH_INTERVAL_S if self._is_terminal else PLAIN_INTERVAL_S
        self._written_at = float("-inf")

    def note(self, text: str) -> None:
        """A line of its own."""
        self._write_line(text)

    def step(self, view: StepView) -> None:
        """Refresh the line, unless that was done a moment ago; the first and the last step always."""
        self.status(step_text(view), always=view.step in (1, view.total_steps))

    def status(self, text: str, always: bool = False) -> None:
        """How things stand: in place of the last such line on a terminal, now and then elsewhere."""
        if time.monotonic() - self._written_at < self._interval_s and not always:
            return
        self._written_at = time.monotonic()
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write(CLEAR_LINE + text[:width])
        else:
            self._write(text + "\n")

    def epoch(self, row: HistoryRow) -> None:
        """A line that stays."""
        self._write_line(epoch_text(row))

    def _write_line(self, text: str) -> None:
        self._write((CLEAR_LINE if self._is_terminal else "") + text + "\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody looks any more: a closed terminal is no reason to stop
            self._stream.write(text)
            self._stream.flush()


def step_text(view: StepView) -> str:
    """`epoch 3/50  step 120/2000  loss 0.532  accuracy 81.2 %  23.4 images/s  RSS 96 MiB  12 min left`."""
    memory = f"  RSS {view.rss_kib / 1024:.0f} MiB" if view.rss_kib is not None else ""
    return (
        f"epoch {view.epoch}/{view.epochs}  step {view.step}/{view.total_steps}  loss {view.loss:.3f}"
        f"  accuracy {percent(view.accuracy)}  {view.images_per_s:.1f} images/s{memory}"
        f"  {duration(view.seconds_left)} left"
    )


def epoch_text(row: HistoryRow) -> str:
    """`epoch 3  train loss 0.53, accuracy 81.2 %  validation 80.0 % (best)  test 79.1 %  4 min`."""
    validation = (
        f"  validation {percent(row.validation_accuracy)}" if row.validation_accuracy is not None else ""
    )
    test = f"  test {percent(row.test_accuracy)}" if row.test_accuracy is not None else ""
    best = " (best)" if row.best else ""
    return (
        f"epoch {row.epoch}  train loss {row.train_loss:.3f}, accuracy {percent(row.train_accuracy)}"
        f"{validation}{best}{test}  {duration(row.time_s)}"
    )
