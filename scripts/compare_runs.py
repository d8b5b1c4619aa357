"""For `make pi-check`: two runs of the same arguments on two machines agree in losses and answers."""

import argparse
import json
import math
import sys
from pathlib import Path

from lance_edge.profiles import StepRow, read_rows


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    rows = (row for row in read_rows(run / "steps.csv", StepRow) if row.phase == "step")
    return {row.step: row.loss for row in rows if row.loss is not None}


def answers(run: Path) -> list[float]:
    """Loss and accuracy of the evaluation, and every probability of the predictions by file and class."""
    evaluation = json.loads((run / "eval.json").read_text())
    found = [evaluation["loss"], evaluation["accuracy"]]
    for entry in json.loads((run / "predict.json").read_text()):
        ranking = {item["class"]: item["probability"] for item in entry["predictions"]}
        found.append(max(ranking.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expected", type=Path)
    parser.add_argument("found", type=Path)
    parser.add_argument("--answers", action="store_true", help="of eval and predict, instead of the losses")
    parser.add_argument("--tolerance", type=float, required=True)
    options = parser.parse_args()
    if options.answers:
        expected, found = answers(options.expected), answers(options.found)
        name = "answers of eval and predict"
    else:
        first, second = losses(options.expected), losses(options.found)
        if first.keys() != second.keys():
            sys.exit(f"steps differ: expected {sorted(first)}, found {sorted(second)}")
        expected, found = list(first.values()), [second[step] for step in first]
        name = f"losses of {len(first)} steps"
    differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    if not max(differences) <= options.tolerance or not all(map(math.isfinite, found)):
        sys.exit(f"{name} differ by {max(differences):.2e}, expected at most {options.tolerance:g}")
    print(f"{name} differ by {max(differences):.1e} at most")


if __name__ == "__main__":
    main()
