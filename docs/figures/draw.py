"""The picture of the README, from the runs that its table is made of: python docs/figures/draw.py."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from lance_edge.report.colours import METHODS, PLAIN

HERE = Path(__file__).parent
COLOURS = {"head only": PLAIN, "LANCE": METHODS["lance"], "BP": METHODS["bp"]}


def main() -> None:
    with (HERE / "cifar10.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["method"] for row in rows]
    colours = [COLOURS[name] for name in names]
    figure = Figure(figsize=(7.2, 2.5), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracies = [float(row["test_accuracy_percent"]) for row in rows]
    left.barh(names, accuracies, color=colours)
    left.set(title="CIFAR-10, test accuracy", xlabel="%", xlim=(0, 100))
    kept = [float(row["activation_kib"]) for row in rows]
    right.barh(names, kept, color=colours)
    right.set(title="activations kept for it", xlabel="KiB, logarithmic", xscale="log", xlim=(10, 200_000))
    for plane, values, text in ((left, accuracies, "{:.1f}"), (right, kept, "{:,.0f}")):
        plane.invert_yaxis()
        for place, value in enumerate(values):
            plane.text(max(value, 10), place, f" {text.format(value)}", va="center", fontsize=9)
    figure.savefig(HERE / "cifar10.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
