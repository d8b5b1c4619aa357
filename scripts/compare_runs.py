"""For `make pi-check`: two runs of the same arguments on two machines agree in losses and answers."""

import argparse
import json
import math
import sys
from pathlib import Path

from lance_edge.profiles import StepRow, read_rows


def losses(run: Path) -> dict[str, float]:
    """Loss by step."""
    rows = (row for row in read_rows(run / "steps.csv", StepRow) if row.phase == "step")
    return {f"step {row.step}": row.loss for row in rows if row.loss is not None}


def answers(run: Path) -> dict[str, float]:
    """Loss and accuracy of the evaluation, and every probability of the predictions by file and class."""
    evaluation = json.loads((run / "eval.json").read_text())
    found = {name: evaluation[name] for name in ("loss", "accuracy")}
    for entry in json.loads((run / "predict.json").read_text()):
        name = Path(entry["file"]).name  # the folders differ from machine to machine
        found |= {f"{name} {item['class']}": item["probability"] for item in entry["predictions"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expected", type=Path)
    parser.add_argument("found", type=Path)
    parser.add_argument("--answers", action="store_true", help="of eval and predict, instead of the losses")
    parser.add_argument("--tolerance", type=float, required=True)
    options = parser.parse_args()
    read, name = (answers, "answers of eval and predict") if options.answers else (losses, "losses of steps")
    expected, found = read(options.expected), read(options.found)
    if expected.keys() != found.keys() or not expected:
        sys.exit(f"{name}: expected {sorted(expected)}, found {sorted(found)}")
    differences = [abs(value - found[key]) for key, value in expected.items()]
    if not all(map(math.isfinite, found.values())) or not max(differences) <= options.tolerance:
        sys.exit(f"{name} differ by {max(differences):.2e}, expected at most {options.tolerance:g}")
    print(f"{name} differ by {max(differences):.1e} at most")


if __name__ == "__main__":
    main()
