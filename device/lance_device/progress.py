"""How far a run is: the row of an evaluation, and what is shown after a step."""

import dataclasses
import math
from collections.abc import Mapping

from lance_device.checkpoint import Progress
from lance_device.evaluate import Evaluation
from lance_device.keeper import is_better
from lance_device.live_table import StepView, view_of_rows
from lance_device.numerics import Array, is_blown_up
from lance_device.options import TrainOptions
from lance_device.run_log import RunLog
from lance_device.run_setup import Run
from lance_device.schedule import PLATEAU
from lance_edge.profiles import HistoryRow
from lance_edge.units import count


def history_row(
    run: Run, log: RunLog, learning_rate: float, validation: Evaluation | None, test: Evaluation | None
) -> HistoryRow:
    """The evaluation after the present step, and whether it is the best so far."""
    progress = run.progress
    row = HistoryRow(
        epoch=log.epoch_of(progress.step),
        step=progress.step,
        learning_rate=learning_rate,
        train_loss=progress.loss_sum / progress.samples if progress.samples else math.nan,
        train_accuracy=progress.correct / max(progress.samples, 1),
        validation_accuracy=validation.accuracy if validation else None,
        validation_loss=validation.loss if validation else None,
        test_accuracy=test.accuracy if test else None,
        test_loss=test.loss if test else None,
        best=False,
        time_s=log.seconds(),
    )
    return dataclasses.replace(row, best=is_better(row, progress.best, run.options.schedule == PLATEAU))


def ruin_of(progress: Progress, last: HistoryRow | None) -> str:
    """Why a run that went to its end has failed all the same; nothing if it has not.

    One step that was left out at the very end may be a bad batch; two in a row, with nothing good after them,
    and weights whose evaluation is no number are a network that is lost.
    """
    skipped = f"{count(progress.skipped, 'step')} of {progress.step} not applied"
    if last is not None and not all(math.isfinite(loss) for loss in _losses(last)):
        return f"the run ended with an evaluation whose loss is no number ({skipped})"
    if progress.skipped_in_a_row > 1:
        return (
            f"the run ended with {progress.skipped_in_a_row} steps in a row that were not applied ({skipped})"
        )
    return ""


def remedy(parameters: Mapping[str, Array], options: TrainOptions, is_over: bool) -> str:
    """What may help; going on does not where the weights are lost, or where leaving steps out did not."""
    anew = f"start again with a lower --lr (this run: {options.lr:g})"
    anew += "" if options.clip else " or with --clip 2"
    if is_blown_up(parameters):
        return f"its weights have blown up, so --resume cannot help: {anew}"
    return anew if is_over else f"go on with --resume --on-nan halve-lr, or {anew}"


def _losses(row: HistoryRow) -> list[float]:
    """Of the evaluated images; the training loss leaves out what was no number."""
    return [loss for loss in (row.validation_loss, row.test_loss) if loss is not None]


def step_view(run: Run, log: RunLog) -> StepView:
    """The step that was just made, and written down."""
    progress, best = run.progress, run.progress.best
    return view_of_rows(
        log.latest,
        epochs=log.epoch_of(run.total_steps),
        total_steps=run.total_steps,
        accuracy=progress.correct / max(progress.samples, 1),
        seconds_left=log.seconds_left(),
        evaluation=log.last_evaluation,
        best_accuracy=best.validation_accuracy if best else None,
    )
