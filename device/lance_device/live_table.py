"""How a run stands, as text: a compact table for a terminal, one line for a log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lance_edge.profiles import STEP_PHASES, HistoryRow, StepRow, finite
from lance_edge.throttling import flags_of, troubles
from lance_edge.units import duration, percent, size

BAR_COLUMNS = 24
CURVE_COLUMNS = 32
LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class StepView:
    """A training step as shown; `epoch` and `step` count from 1, `accuracy` is the running one.

    What is not known is `None`.

    Attributes:
        phases_ms: latencies of the phases of this step.
        evaluation: the last one.
        best_accuracy: on validation images, of the best evaluation so far.
    """

    epoch: int
    epochs: int | None
    step: int
    total_steps: int | None
    loss: float | None
    accuracy: float | None
    images_per_s: float
    rss_kib: int | None
    seconds_left: float | None
    phases_ms: Mapping[str, float] | None = None
    peak_rss_kib: int | None = None
    activation_bytes: int | None = None
    saved_bytes: int | None = None
    temperature_c: float | None = None
    arm_mhz: float | None = None
    troubles: tuple[str, ...] = ()
    evaluation: HistoryRow | None = None
    best_accuracy: float | None = None


def view_of_rows(
    latest: Mapping[str, StepRow],
    epochs: int | None,
    total_steps: int | None,
    accuracy: float | None,
    seconds_left: float | None,
    evaluation: HistoryRow | None,
    best_accuracy: float | None,
) -> StepView:
    """Of the newest row of each phase; there must be one of `step`."""
    whole = latest["step"]
    own = {phase: row for phase, row in latest.items() if row.step == whole.step}
    return StepView(
        epoch=whole.epoch,
        epochs=epochs,
        step=whole.step,
        total_steps=total_steps,
        loss=finite(whole.loss),
        accuracy=accuracy,
        images_per_s=1e3 * whole.samples / whole.latency_ms if whole.latency_ms else 0.0,
        rss_kib=whole.rss_kib,
        seconds_left=seconds_left,
        phases_ms={phase: own[phase].latency_ms for phase in (*STEP_PHASES, "step") if phase in own},
        peak_rss_kib=whole.peak_rss_kib,
        activation_bytes=whole.activation_bytes,
        saved_bytes=whole.saved_bytes,
        temperature_c=whole.temperature_c,
        arm_mhz=whole.arm_mhz,
        troubles=troubles(flags_of(whole.throttled)),
        evaluation=evaluation,
        best_accuracy=best_accuracy,
    )


def table_lines(view: StepView, losses: Sequence[float], is_unicode: bool) -> list[str]:
    """The table; lines of which nothing is known are left out.

    Args:
        losses: those of the steps so far, for the curve.
    """
    lines = [
        ("step", _progress(view, is_unicode)),
        ("loss", _loss(view, losses, is_unicode)),
        ("accuracy", _accuracy(view)),
        ("time", _time(view)),
        ("memory", _memory(view)),
        ("board", _board(view)),
    ]
    return [f"{name:<9}{text}" for name, text in lines if text]


def step_text(view: StepView) -> str:
    """`epoch 3/50  step 120/2000  loss 0.532  accuracy 81.2 %  23.4 images/s  RSS 96 MiB  12 min left`."""
    parts = [
        f"epoch {view.epoch}{_of(view.epochs)}",
        f"step {view.step}{_of(view.total_steps)}",
        "" if view.loss is None else f"loss {view.loss:.3f}",
        "" if view.accuracy is None else f"accuracy {percent(view.accuracy)}",
        f"{view.images_per_s:.1f} images/s",
        "" if view.rss_kib is None else f"RSS {view.rss_kib / 1024:.0f} MiB",
        "" if view.seconds_left is None else f"{duration(view.seconds_left)} left",
    ]
    return "  ".join(part for part in parts if part)


def epoch_text(row: HistoryRow) -> str:
    """`epoch 3  train loss 0.53, accuracy 81.2 %  validation 80.0 % (best)  test 79.1 %  4 min`."""
    validation = (
        f"  validation {percent(row.validation_accuracy)}" if row.validation_accuracy is not None else ""
    )
    test = f"  test {percent(row.test_accuracy)}" if row.test_accuracy is not None else ""
    best = " (best)" if row.best else ""
    loss = "-" if finite(row.train_loss) is None else f"{row.train_loss:.3f}"
    return (
        f"epoch {row.epoch}  train loss {loss}, accuracy {percent(row.train_accuracy)}"
        f"{validation}{best}{test}  {duration(row.time_s)}"
    )


def _of(total: int | None) -> str:
    return "" if total is None else f"/{total}"


def _progress(view: StepView, is_unicode: bool) -> str:
    epoch = f"epoch {view.epoch}" + ("" if view.epochs is None else f" of {view.epochs}")
    left = "" if view.seconds_left is None else f"   {duration(view.seconds_left)} left"
    if not view.total_steps:
        return f"{view.step}   {epoch}{left}"
    share = min(view.step / view.total_steps, 1.0)
    done, todo = ("━", "─") if is_unicode else ("#", "-")
    filled = round(BAR_COLUMNS * share)
    bar = done * filled + todo * (BAR_COLUMNS - filled)
    return f"{view.step} of {view.total_steps}  {bar}  {100 * share:.0f} %   {epoch}{left}"


def _loss(view: StepView, losses: Sequence[float], is_unicode: bool) -> str:
    if view.loss is None:
        return ""
    return f"{view.loss:.3f}   {curve(losses) if is_unicode else ''}".rstrip()


def curve(values: Sequence[float]) -> str:
    """Means of neighbours as bars of eight heights, from the lowest to the highest of them."""
    columns = min(len(values), CURVE_COLUMNS)
    if columns < 2:
        return ""
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(LEVELS[round((mean - low) / span * 7) if span else 0] for mean in means)


def _accuracy(view: StepView) -> str:
    row = view.evaluation
    parts = [("running", view.accuracy)]
    if row is not None:
        parts += [("validation", row.validation_accuracy), ("test", row.test_accuracy)]
    parts.append(("best validation", view.best_accuracy))
    texts = [f"{name} {percent(value)}" for name, value in parts if value is not None]
    return ", ".join(texts) + (f" (epoch {row.epoch})" if row is not None else "")


def _time(view: StepView) -> str:
    phases = dict(view.phases_ms or {})
    whole = phases.pop("step", None)
    if whole is None:
        return f"{view.images_per_s:.1f} images/s"
    parts = ", ".join(f"{phase} {latency:.1f}" for phase, latency in phases.items())
    return f"{whole:.1f} ms a step: {parts}   {view.images_per_s:.1f} images/s"


def _memory(view: StepView) -> str:
    parts = [
        ("RSS", None if view.rss_kib is None else view.rss_kib * 1024),
        ("peak", None if view.peak_rss_kib is None else view.peak_rss_kib * 1024),
        ("activations", view.activation_bytes),
        ("saved", view.saved_bytes),
    ]
    return ", ".join(f"{name} {size(value)}" for name, value in parts if value is not None)


def _board(view: StepView) -> str:
    parts = [
        "" if view.temperature_c is None else f"{view.temperature_c:.0f} °C",
        "" if view.arm_mhz is None else f"{view.arm_mhz:.0f} MHz",
        *(f"{trouble.upper()}" for trouble in view.troubles),
    ]
    return ", ".join(part for part in parts if part)
