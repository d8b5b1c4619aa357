"""Keeping a run's state on disk: when, and in which order, so that a power cut leaves a state that is whole."""

import contextlib
import copy
import math
import time
from collections.abc import Iterator

from lance_device.checkpoint import Best, Checkpoint, write_checkpoint
from lance_device.measure import PhaseMeter
from lance_device.run_log import RunLog
from lance_device.run_setup import CheckpointEvery, Run, make_checkpoint
from lance_edge.bundle import Bundle
from lance_edge.profiles import HistoryRow


class Keeper:
    """Writes `last.npz`, `previous.npz` and `best.npz` of one run."""

    def __init__(
        self, run: Run, bundle: Bundle, log: RunLog, meter: PhaseMeter, every: CheckpointEvery
    ) -> None:
        self._run, self._bundle, self._log, self._meter, self._every = run, bundle, log, meter, every
        self._unwritten_best: Checkpoint | None = None
        self._is_saved, self._is_torn = True, False
        self._saved_step, self._saved_at = run.progress.step, time.monotonic()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Weights, progress and rows go on together: if that breaks off, they are no state and never saved."""
        self._is_saved, self._is_torn = False, True
        yield
        self._is_torn = False

    @property
    def lost(self) -> str:
        """What a user must know if the state broke off halfway, and so could not be saved; else nothing."""
        if not self._is_torn:
            return ""
        return f"; what came after step {self._saved_step}, the last that was saved, is lost"

    def remember_best(self, row: HistoryRow) -> None:
        """Keep a copy of the state; it reaches the disk with the next `last.npz`, to spare an SD card."""
        self._run.progress.best = Best(
            row.epoch, row.step, row.train_loss, row.validation_accuracy, row.validation_loss, row.test_accuracy
        )
        self._log.mark()
        self._unwritten_best = copy.deepcopy(make_checkpoint(self._run, self._bundle))

    def save_if_due(self) -> None:
        """Save if the last time is so many steps, or so long, ago."""
        every = self._every
        by_steps = every.steps is not None and self._run.progress.step - self._saved_step >= every.steps
        by_time = every.seconds is not None and time.monotonic() - self._saved_at >= every.seconds
        if by_steps or by_time:
            self.save()

    def keep_copy_if_due(self) -> None:
        """Write a checkpoint that no later one replaces, after the epochs that `--keep-every` counts.

        Raises:
            StorageError: if it cannot be written.
        """
        every, progress, stream = self._every.kept_epochs, self._run.progress, self._run.stream
        if every and stream.ends_epoch(progress.step) and progress.epoch % every == 0:
            kept = self._run.folder.kept(progress.epoch)
            write_checkpoint(kept, make_checkpoint(self._run, self._bundle))

    def save(self) -> None:
        """Make the state durable, if it is one; `recover.py` relies on the order.

        Raises:
            StorageError: if it cannot be written; what was saved before still stands.
        """
        if self._is_saved or self._is_torn:
            return
        folder = self._run.folder
        with self._meter.phase("checkpoint"):
            self._log.keep()
            if self._unwritten_best is not None:
                write_checkpoint(folder.best, self._unwritten_best)
                self._unwritten_best = None
            write_checkpoint(folder.last, make_checkpoint(self._run, self._bundle), folder.previous)
        self._is_saved = True
        self._saved_step, self._saved_at = self._run.progress.step, time.monotonic()
        self._log.checkpoint(self._meter.take("checkpoint"))


def is_better(row: HistoryRow, best: Best | None, by_loss: bool = False) -> bool:
    """Whether an evaluation beats the best so far.

    By validation accuracy, ties by validation loss; without validation images by training loss.  Never by
    the test images: they would no longer tell how the chosen weights do on images never seen.

    Args:
        by_loss: by validation loss alone, as the schedule `plateau` judges.
    """
    if best is None:
        return True
    if row.validation_accuracy is None or best.validation_accuracy is None:
        return _is_lower(row.train_loss, best.train_loss)
    if by_loss and best.validation_loss is not None and row.validation_loss is not None:
        return _is_lower(row.validation_loss, best.validation_loss)
    if row.validation_accuracy != best.validation_accuracy:
        return row.validation_accuracy > best.validation_accuracy
    return _is_lower(row.validation_loss or 0.0, best.validation_loss or 0.0)


def _is_lower(loss: float, other: float) -> bool:
    """Any number is better than none."""
    return loss < other or (math.isnan(other) and not math.isnan(loss))
