"""Results as text for people."""

import os
from pathlib import Path

from lance_device.evaluate import Evaluation
from lance_device.next_task import NextTask
from lance_device.predict import Prediction
from lance_device.run_log import TrainResult
from lance_edge.accuracy_matrix import AccuracyMatrix
from lance_edge.units import count, duration, percent, size


def result_table(result: TrainResult) -> str:
    """What a run came to: accuracy, memory, time."""
    rows = [
        ("steps", f"{result.step} of {result.total_steps} in {duration(result.seconds)}"),
        ("test accuracy", f"{percent(result.test_accuracy)} (last.npz)"),
        ("validation accuracy", percent(result.validation_accuracy)),
        ("best epoch", _best_text(result)),
        (
            "activation bytes",
            f"{size(result.activation_bytes)} (what the method keeps of the layers' inputs, per batch)",
        ),
        ("saved bytes", f"{size(result.saved_bytes)} (all that crosses, per micro-batch)"),
        ("peak RSS", size(None if result.peak_rss_kib is None else result.peak_rss_kib * 1024)),
    ]
    if result.steps_not_applied:
        rows.insert(1, ("not applied", f"{count(result.steps_not_applied, 'step')} (--on-nan)"))
    if result.max_temperature_c is not None:
        rows.append(("highest temperature", f"{result.max_temperature_c:.0f} °C"))
    if result.throttled:
        rows.append(("board", ", ".join(result.throttled)))
    if result.paused_s:
        rows.append(("paused", duration(result.paused_s)))
    rows += [(f"median {phase}", f"{median_ms:.1f} ms") for phase, median_ms in result.median_ms.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _best_text(result: TrainResult) -> str:
    if result.best_epoch is None:
        return "-"
    validation, test = percent(result.best_validation_accuracy), percent(result.best_test_accuracy)
    chosen = f"{result.best_epoch} by {result.best_chosen_by}"
    return f"{chosen}: validation {validation}, test {test} (best.npz)"


def evaluation_table(evaluation: Evaluation, classes: tuple[str, ...], part: str) -> str:
    """Accuracy overall and per class, and loss."""
    width = max(len(name) for name in classes)
    per_class = zip(
        classes, evaluation.class_accuracy, evaluation.class_correct, evaluation.class_counts, strict=True
    )
    lines = [
        f"  {name:<{width}}  {percent(share):>7}  {correct} of {count}"
        for name, share, correct, count in per_class
    ]
    accuracy = percent(evaluation.accuracy)
    head = f"{part}: accuracy {accuracy} of {evaluation.count} images, loss {evaluation.loss:.4f}"
    return "\n".join([head, *lines])


def evaluation_json(evaluation: Evaluation, classes: tuple[str, ...], part: str) -> dict[str, object]:
    """The same as data."""
    per_class = zip(
        classes, evaluation.class_accuracy, evaluation.class_correct, evaluation.class_counts, strict=True
    )
    return {
        "part": part,
        "images": evaluation.count,
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "classes": {
            name: {"accuracy": accuracy, "correct": correct, "images": count}
            for name, accuracy, correct, count in per_class
        },
    }


def next_task_table(made: NextTask) -> str:
    """By layer: how much of its inputs is protected now, and the ranks that the next task trains with."""
    learned = made.memory.tasks[-1]
    width = max(len(plan.layer) for plan in made.plans)
    lines = [f"{learned.name} is protected to {percent(learned.threshold)} of its energy"]
    for plan in made.plans:
        layer = made.memory.layers[plan.layer]
        of = f"{sum(layer.ranks)} of {layer.groups * layer.dimension} dimensions"
        ranks = "none left" if plan.layer in made.used_up else f"ranks {' x '.join(map(str, plan.ranks))}"
        lines.append(f"  {plan.layer:<{width}}  {of} ({percent(layer.used)}), {ranks}")
    return "\n".join(lines)


FIGURE_NAMES = {
    "acc": "ACC",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "learning_accuracy": "learning accuracy",
}


def matrix_table(matrix: AccuracyMatrix) -> str:
    """What is still known of each task, and the figures of `accuracy_matrix.csv`."""
    if not matrix.rows:
        return "accuracy matrix: nothing measured yet"
    known = zip(matrix.tasks, matrix.rows[-1].accuracies, strict=True)
    figures = [f"{FIGURE_NAMES[name]} {percent(value)}" for name, value in matrix.figures.items()]
    tasks = ", ".join(f"{task} {percent(accuracy)}" for task, accuracy in known)
    return f"after {matrix.tasks[-1]}: {tasks}\n{', '.join(figures)}"


def prediction_line(prediction: Prediction) -> str:
    """`photos/a.jpg  cat 97.3 %  dog 2.1 %`."""
    ranking = "  ".join(f"{name} {percent(probability)}" for name, probability in prediction.ranking)
    task = "" if prediction.task is None else f"{prediction.task}: "
    return f"{_printable(prediction.file)}  {task}{ranking}"


def prediction_json(prediction: Prediction) -> dict[str, object]:
    """The same as data."""
    ranking = [{"class": name, "probability": probability} for name, probability in prediction.ranking]
    task = {} if prediction.task is None else {"task": prediction.task}
    return {"file": _printable(prediction.file), **task, "predictions": ranking}


def _printable(file: Path) -> str:
    """The name of a file as UTF-8 can write it: what is no UTF-8 in it becomes a question mark."""
    return os.fsencode(file).decode("utf-8", "replace")
