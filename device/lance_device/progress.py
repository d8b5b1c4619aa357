"""How far a run is: the row of an evaluation, and what is shown after a step."""

import dataclasses
import math

from lance_device.evaluate import Evaluation
from lance_device.keeper import is_better
from lance_device.live import StepView
from lance_device.measure import PhaseCost
from lance_device.run_log import RunLog
from lance_device.run_setup import Run
from lance_device.schedule import PLATEAU
from lance_device.step_graphs import StepOutcome
from lance_edge.profiles import HistoryRow


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


def step_view(run: Run, log: RunLog, outcome: StepOutcome, cost: PhaseCost) -> StepView:
    """The step that was just made.

    Args:
        cost: of all its phases.
    """
    progress = run.progress
    return StepView(
        epoch=log.epoch_of(progress.step),
        epochs=log.epoch_of(run.total_steps),
        step=progress.step,
        total_steps=run.total_steps,
        loss=outcome.loss,
        accuracy=progress.correct / max(progress.samples, 1),
        images_per_s=run.stream.batch_size / (cost.latency_ns * 1e-9),
        rss_kib=cost.rss_kib,
        seconds_left=log.seconds_left(),
    )
