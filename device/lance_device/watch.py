"""`lance-device watch`: what `train` shows, from another shell."""

import contextlib
import time
from collections.abc import Callable

from lance_device.following import Follower, Sight, is_held
from lance_device.live import Live
from lance_device.live_table import StepView, view_of_rows
from lance_edge.errors import Interrupted
from lance_edge.report.views import View
from lance_edge.units import duration, percent

EXIT_CODES = {"finished": 0, "interrupted": 10, "failed": 11, "lost": 12}


def watch(follower: Follower, live: Live, every_s: float, wait: Callable[[float], None] = time.sleep) -> str:
    """Show the run until it ends; gives how it ended: a key of `EXIT_CODES`.

    Raises:
        DataError: if what the run writes cannot be read.
        Interrupted: on Ctrl-C; a run goes on.
    """
    told: int | None = None
    sight: Sight | None = None
    try:
        while True:
            sight = follower.look()
            told = _show(follower, sight, live, told)
            if sight.has_ended:
                return sight.state
            wait(every_s)
    except KeyboardInterrupt:
        is_running = sight is not None and sight.state == "running" and is_held(follower.path) is not False
        goes_on = "; the run goes on" if is_running else ""
        raise Interrupted(f"no longer watching {follower.path}{goes_on}") from None


def until_ctrl_c() -> None:
    """Do nothing, so that what else goes on can go on."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600.0)


def _show(follower: Follower, sight: Sight, live: Live, told: int | None) -> int | None:
    """Gives the step of the last evaluation that was told."""
    view = follower.view
    evaluation = view.last_evaluation
    if evaluation is not None and evaluation.step != told:
        live.epoch(evaluation)
    if sight.state == "waiting":
        absent = "" if follower.path.is_dir() else ", a folder that is not there yet"
        live.status(f"waiting for a run in {follower.path}{absent}")
    elif "step" not in view.latest:
        live.status(f"{follower.path}: a run has begun, and made no step yet")
    elif sight.is_new or sight.has_ended:
        live.show(standing(view), [point.mean for point in view.loss.points()])
    return None if evaluation is None else evaluation.step


def standing(view: View) -> StepView:
    """How a run stands, from its files alone."""
    whole, total = view.latest["step"], view.total_steps
    left_s = None if total is None else whole.time_s / whole.step * (total - whole.step)
    best = max((row.validation_accuracy or 0.0 for row in view.evaluations if row.best), default=None)
    has_validation = any(row.validation_accuracy is not None for row in view.evaluations)
    return view_of_rows(
        view.latest,
        epochs=view.fact("options", "epochs") if view.fact("options", "steps") is None else None,
        total_steps=total,
        accuracy=None,
        seconds_left=left_s,
        evaluation=view.last_evaluation,
        best_accuracy=best if has_validation else None,
    )


def ending(follower: Follower, state: str) -> str:
    """How a run ended, in a line."""
    view = follower.view
    steps = f"{view.steps}" if view.total_steps is None else f"{view.steps} of {view.total_steps}"
    seconds = max((row.time_s for row in view.latest.values()), default=0.0)
    accuracy = "" if view.test_accuracy is None else f", test accuracy {percent(view.test_accuracy)}"
    message = view.fact("message")
    reasons = {
        "lost": ": no process on this machine is training into it; take it up with --resume",
        "interrupted": "; take it up with --resume",
        "failed": f": {message}" if message else "",
    }
    return (
        f"{follower.path}: {state} after {steps} steps in {duration(seconds)}{accuracy}{reasons.get(state, '')}"
    )
