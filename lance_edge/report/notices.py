"""What a reader must know before believing a figure."""

import math
from collections.abc import Callable, Mapping, Sequence

from lance_edge.bench_rows import LARGE_SPREAD
from lance_edge.report.findings import compared_accuracies, yardstick_of
from lance_edge.report.names import distinct, runs_of, setting_name
from lance_edge.report.results import Result, results_of
from lance_edge.report.views import View
from lance_edge.units import count

MOST_NAMED = 3
FEWEST_STEPS = 5
FEW_TEST_IMAGES = 200  # of fewer, one image is more than half a point
ALIKE_IN_RATIOS = {"inputs of": ("artifact", "input_shape"), "onnxruntime": ("versions", "onnxruntime")}

Notice = Callable[[Sequence[View]], str | None]


def notices_of(views: Sequence[View]) -> tuple[str, ...]:
    """In the order of their weight; none where there is nothing to say."""
    return tuple(text for notice in NOTICES if (text := notice(views)) is not None)


def _about_machines(views: Sequence[View]) -> str | None:
    labels = distinct([view.machine.label for view in views if not view.is_empty])
    if len({view.machine.key for view in views if not view.is_empty}) < 2:
        return None
    return (
        f"Measured on {len(labels)} machines ({'; '.join(labels)}): times of one say nothing of another, so"
        " ratios are taken within each of them only."
    )


def _about_ratios(views: Sequence[View]) -> str | None:
    results = results_of(views)
    pairs = [(result.view, result.baseline) for result in results if result.baseline is not None]
    pairs += [(r.view, other.view) for r in results if (other := yardstick_of(r, results)) is not None]
    texts = [
        f"{view.name} and {other.name} have {name} {view.fact_text(*path)} and {other.fact_text(*path)}"
        for view, other in (sorted(pair, key=views.index) for pair in pairs)
        for name, path in ALIKE_IN_RATIOS.items()
        if None not in (mine := view.fact(*path), theirs := other.fact(*path)) and mine != theirs
    ]
    if not texts:
        return None
    return f"Ratios do not compare the methods alone: {_listed(distinct(texts))}."


def _about_status(views: Sequence[View]) -> str | None:
    texts = {
        "running": "{} had not ended when this was made",
        "interrupted": "{} was stopped before its end",
        "failed": "{} failed",
        "lost": "{} is lost, no process on this machine is training into it: take it up with --resume",
    }
    found = [texts[view.status].format(view.name) for view in views if view.status in texts]
    return f"{_listed(found)}." if found else None


def _about_torn_rows(views: Sequence[View]) -> str | None:
    torn = [view.name for view in views if view.is_torn]
    return f"The last row of {_listed(torn)} is cut off, and was left out." if torn else None


def _about_missing_records(views: Sequence[View]) -> str | None:
    missing = [view.name for view in views if view.record is None]
    if not missing:
        return None
    return f"{_listed(missing)} came without run.json: machine, versions and arguments are not known."


def _about_spread(views: Sequence[View]) -> str | None:
    wide = [result for result in results_of(views) if (result.spread or 0.0) > LARGE_SPREAD]
    if not wide:
        return None
    worst = sorted(wide, key=lambda result: -(result.spread or 0.0))
    names = [f"{_named(result)} ({result.spread:.0%})" for result in worst]
    return (
        f"Times of a step vary by more than {LARGE_SPREAD:.0%} (standard deviation over mean) in"
        f" {_listed(names)}: other programs ran, or the clock changed. Small differences mean nothing here;"
        " measure on a quiet machine."
    )


def _about_few_steps(views: Sequence[View]) -> str | None:
    few = [r for r in results_of(views) if r.step is not None and r.step.n < FEWEST_STEPS]
    if not few:
        return None
    names = [f"{_named(result)} ({count(result.step.n if result.step else 0, 'step')})" for result in few]
    return f"Medians of fewer than {FEWEST_STEPS} steps say little: {_listed(names)}."


def _about_throttling(views: Sequence[View]) -> str | None:
    found = [f"{view.name} ({', '.join(sorted(view.troubles))})" for view in views if view.troubles]
    if not found:
        return None
    return f"The board complained during {_listed(found)}: its times are those of a slowed-down processor."


def _about_data(views: Sequence[View]) -> str | None:
    digests = {digest for view in runs_of(views) if (digest := view.fact("data", "train_sha256"))}
    if len(digests) < 2:
        return None
    return "The runs trained on different images: their accuracies are not to be compared."


def _about_test_images(views: Sequence[View]) -> str | None:
    """Where the difference of two accuracies may well be chance."""
    results = results_of(views)
    doubtful: dict[int, dict[str, float]] = {}  # by number of test images: runs and their accuracies
    for result in results:
        yardstick = yardstick_of(result, results)
        accuracies = None if yardstick is None else compared_accuracies(result, yardstick)
        if yardstick is None or accuracies is None:
            continue
        runs = (result.view, yardstick.view)
        images = [view.fact("data", "test") for view in runs]
        if not all(isinstance(number, int) and number > 0 for number in images):
            continue
        if _may_be_chance(*accuracies, min(images)):
            for view, number, accuracy in zip(runs, images, accuracies, strict=True):
                doubtful.setdefault(number, {})[view.name] = accuracy
    return " ".join(_of_images(number, doubtful[number]) for number in sorted(doubtful)) or None


def _may_be_chance(own: float, other: float, images: int) -> bool:
    """A difference within two standard errors of an accuracy, `sqrt(p (1 - p) / n)`, or of few images.

    Both networks see the same images, so their errors go together: that of the difference is less than that of
    two independent accuracies, which is 1.4 times as large.
    Equal accuracies of many images claim no difference; those of few are equal by chance.
    """
    errors = 2 * max(_standard_error(accuracy, images) for accuracy in (own, other))
    return images < FEW_TEST_IMAGES or 0 < abs(own - other) < errors


def _standard_error(accuracy: float, images: int) -> float:
    """Of the share of `images` independent ones that are right."""
    return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / images)


def _of_images(images: int, accuracies: Mapping[str, float]) -> str:
    names = list(accuracies)
    whose = f"Accuracies of {_joined(names)} are" if len(names) > 1 else f"The accuracy of {names[0]} is"
    each = " each" if len(names) > 1 else ""
    errors = 200 * max(_standard_error(accuracy, images) for accuracy in accuracies.values())
    chance = f", and two standard errors are {errors:.1f} points" if errors else ""
    return f"{whose} of {count(images, 'test image')}{each}: one image is {100 / images:.3g} points{chance}."


def _joined(names: Sequence[str]) -> str:
    """`a, b and c`; of many, `a, b, c and 4 more`."""
    shown = list(names[:MOST_NAMED])
    more = len(names) - len(shown)
    last = f"{more} more" if more else shown.pop()
    return f"{', '.join(shown)} and {last}"


def _named(result: Result) -> str:
    return f"{result.view.name}: {setting_name(result.setting, result.view.measured())}"


def _listed(names: Sequence[str]) -> str:
    """`a; b; c and 4 more`."""
    more = len(names) - MOST_NAMED
    return "; ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


NOTICES: tuple[Notice, ...] = (
    _about_machines,
    _about_ratios,
    _about_throttling,
    _about_spread,
    _about_few_steps,
    _about_test_images,
    _about_data,
    _about_status,
    _about_torn_rows,
    _about_missing_records,
)
