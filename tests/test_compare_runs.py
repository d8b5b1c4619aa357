"""`make pi-check` compares two machines: what differs is seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_runs.py"
EVALUATION = {"loss": 0.5, "accuracy": 0.75}
PREDICTIONS = [
    {
        "file": "/a/x.png",
        "predictions": [{"class": "cat", "probability": 0.8}, {"class": "dog", "probability": 0.2}],
    }
]


def _run(folder, evaluation=EVALUATION, predictions=PREDICTIONS):
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "predict.json").write_text(json.dumps(predictions))
    return folder


def _compare(expected, found):
    command = [sys.executable, str(SCRIPT), str(expected), str(found), "--answers", "--tolerance", "1e-3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def _predicted(file="/a/x.png", cat=0.8, first="cat"):
    ranking = [
        {"class": first, "probability": cat},
        {"class": "dog" if first == "cat" else "cat", "probability": 0.2},
    ]
    return [{"file": file, "predictions": ranking}]


def test_the_same_answers_of_another_folder_agree(tmp_path):
    found = _run(tmp_path / "found", predictions=_predicted("/mnt/elsewhere/x.png", 0.8005))
    code, said = _compare(_run(tmp_path / "expected"), found)
    assert (code, said) == (0, "answers of eval and predict differ by 5.0e-04 at most\n")


@pytest.mark.parametrize(
    ("evaluation", "predictions", "words"),
    [
        (EVALUATION, _predicted(first="dog"), "differ by 6.00e-01, expected at most 0.001"),
        (EVALUATION, _predicted(cat=0.9), "differ by 1.00e-01"),
        (EVALUATION, _predicted("/a/y.png"), "expected ['accuracy', 'loss', 'x.png cat', 'x.png dog'], found"),
        ({**EVALUATION, "accuracy": 0.5}, PREDICTIONS, "differ by 2.50e-01"),
        ({**EVALUATION, "loss": float("nan")}, PREDICTIONS, "answers of eval and predict differ by"),
    ],
)
def test_another_answer_is_seen(tmp_path, evaluation, predictions, words):
    """Another class with the same probability is another answer."""
    code, said = _compare(_run(tmp_path / "expected"), _run(tmp_path / "found", evaluation, predictions))
    assert code == 1
    assert words in said
