"""How well a run learns: loss and accuracy, and what accuracy costs in memory."""

from collections.abc import Callable, Sequence

from lance_edge.profiles import HistoryRow, finite
from lance_edge.report.colours import run_colours
from lance_edge.report.names import runs_of
from lance_edge.report.plots import Line, LinePlot, Section, Style
from lance_edge.report.views import View

KIB = 1024
Figure = Callable[[HistoryRow], float | None]
Kind = tuple[str, Style, Figure]

ACCURACIES: tuple[Kind, ...] = (
    ("test", "solid", lambda row: row.test_accuracy),
    ("validation", "dashed", lambda row: row.validation_accuracy),
    ("training", "dotted", lambda row: row.train_accuracy),
)
LOSSES: tuple[Kind, ...] = (
    ("test", "solid", lambda row: row.test_loss),
    ("validation", "dashed", lambda row: row.validation_loss),
    ("training", "dotted", lambda row: row.train_loss),
)
MOST_RUNS_WITH_TRAINING = 2  # of more, the dotted lines hide the others


def learning(views: Sequence[View]) -> Section:
    """Loss and accuracy."""
    runs = runs_of(views)
    plots = (_step_loss(runs), _evaluations(runs, "accuracy"), _evaluations(runs, "loss"))
    return Section(
        "Learning",
        "How the loss falls and the accuracy rises while a run trains.",
        tuple(plot for plot in plots if not plot.is_empty),
        missing="No training run is in this report: benchmarks measure steps, and learn nothing.",
    )


def tradeoff(views: Sequence[View]) -> Section:
    """Activation bytes against accuracy."""
    known = [view for view in runs_of(views) if view.test_accuracy is not None and view.costs]
    runs = [view for view in known if _activation_kib(view) > 0]
    heads = [view for view in known if _activation_kib(view) == 0]
    colours = run_colours([view.method for view in runs])
    lines = tuple(
        Line(
            view.name,
            colour,
            (_activation_kib(view),),
            (100 * (view.test_accuracy or 0.0),),
            "points",
        )
        for view, colour in zip(runs, colours, strict=True)
    )
    plot = LinePlot(
        "activation-bytes-accuracy",
        "Accuracy against activation memory",
        "Each point is a run. Up is more accurate, left is smaller: activation bytes are what the method keeps"
        " of the trained layers' inputs for a whole batch."
        + (" Dashed: a head alone, which keeps none." if heads else ""),
        "activation bytes, KiB",
        "test accuracy, %",
        lines,
        x_is_log=True,
        rules=tuple((100 * (view.test_accuracy or 0.0), view.name) for view in heads),
    )
    return Section(
        "Accuracy and memory",
        "What a method keeps of the activations, and how accurate the network becomes with it.",
        () if plot.is_empty else (plot,),
        missing="No run in this report was evaluated on test images yet.",
    )


def _activation_kib(view: View) -> float:
    return max(costs.activation_bytes for costs in view.measured().values()) / KIB


def _step_loss(runs: Sequence[View]) -> LinePlot:
    colours = run_colours([view.method for view in runs])
    return LinePlot(
        "loss-steps",
        "Training loss, step by step",
        "Cross-entropy of the batches. A pale band spans the lowest and the highest where a point stands for"
        " several steps.",
        "training step",
        "loss",
        tuple(_loss_line(view, colour) for view, colour in zip(runs, colours, strict=True) if len(view.loss)),
        y_from_zero=True,
        x_from_zero=True,
    )


def _loss_line(view: View, colour: str) -> Line:
    points = view.loss.points()
    return Line(
        view.name,
        colour,
        tuple(point.x for point in points),
        tuple(point.mean for point in points),
        low=tuple(point.low for point in points),
        high=tuple(point.high for point in points),
    )


def _evaluations(runs: Sequence[View], what: str) -> LinePlot:
    kinds, scale = (ACCURACIES, 100.0) if what == "accuracy" else (LOSSES, 1.0)
    if len(runs) > MOST_RUNS_WITH_TRAINING:
        kinds = kinds[:-1]
    colours = run_colours([view.method for view in runs])
    lines = tuple(
        line
        for view, colour in zip(runs, colours, strict=True)
        for kind in kinds
        if (line := _evaluation_line(view, colour, kind, scale)).x
    )
    return LinePlot(
        f"{what}-evaluations",
        "Accuracy at each evaluation" if what == "accuracy" else "Loss at each evaluation",
        "Test images choose nothing; validation images choose best.npz; the training figure runs over the steps"
        " since the evaluation before.",
        "training step",
        "accuracy, %" if what == "accuracy" else "loss",
        lines,
        y_from_zero=what == "loss",
        x_from_zero=True,
    )


def _evaluation_line(view: View, colour: str, kind: Kind, scale: float) -> Line:
    name, style, figure = kind
    found = [(row.step, value) for row in view.evaluations if (value := finite(figure(row))) is not None]
    return Line(
        f"{view.name}, {name}",
        colour,
        tuple(float(step) for step, _ in found),
        tuple(scale * value for _, value in found),
        style,
    )
