"""The figures of continual learning, against values worked out by hand, and the file that holds them."""

import pytest

from lance_edge.accuracy_matrix import AccuracyMatrix, AfterTask, matrix_csv, read_matrix, write_matrix
from lance_edge.errors import DataError

# After task 1, 2, 3; the accuracy of the first task rises before it falls.
R = ((0.8,), (0.9, 0.7), (0.6, 0.5, 1.0))
NAMES = ("digits", "letters", "signs, and more")


def matrix(rows=R):
    made = AccuracyMatrix()
    for number, accuracies in enumerate(rows):
        ranks = {"conv": 3 * number + 1} | ({"fc": 5} if number else {})
        made = made.plus(AfterTask(NAMES[number], accuracies, ranks, {"memory": 100 * number, "heads": 8}))
    return made


def test_the_figures_of_a_matrix_worked_out_by_hand():
    three = matrix()
    assert three.acc == pytest.approx((0.6 + 0.5 + 1.0) / 3)
    assert three.bwt == pytest.approx(((0.6 - 0.8) + (0.5 - 0.7)) / 2)
    assert three.forgetting == pytest.approx(((0.9 - 0.6) + (0.7 - 0.5)) / 2)
    assert three.learning_accuracy == pytest.approx((0.8 + 0.7 + 1.0) / 3)
    two = three.upto(2)
    assert two.figures == pytest.approx({"acc": 0.8, "bwt": 0.1, "forgetting": -0.1, "learning_accuracy": 0.75})


def test_one_task_has_nothing_to_forget():
    one = matrix(R[:1])
    assert one.figures == {"acc": 0.8, "bwt": None, "forgetting": None, "learning_accuracy": 0.8}
    assert set(AccuracyMatrix().figures.values()) == {None}


def test_the_file_reads_like_the_matrix_and_brings_it_back(tmp_path):
    path = tmp_path / "accuracy_matrix.csv"
    write_matrix(path, matrix())
    assert path.read_text().splitlines() == [
        'after,accuracy/digits,accuracy/letters,"accuracy/signs, and more",acc,bwt,forgetting,'
        "learning_accuracy,rank/conv,rank/fc,bytes/memory,bytes/heads",
        "digits,0.8,,,0.8,,,0.8,1,,0,8",
        "letters,0.9,0.7,,0.8,0.1,-0.1,0.75,4,5,100,8",
        '"signs, and more",0.6,0.5,1,0.7,-0.2,0.25,0.833333333,7,5,200,8',
    ]
    assert read_matrix(path) == matrix()
    assert matrix_csv(read_matrix(path)) == path.read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((0.8,), (0.9,)), "after task 2: expected 2 accuracies, found 1"),
        (((1.5,),), "after task 1: expected accuracies from 0 to 1"),
        (((float("nan"),),), "after task 1: expected accuracies from 0 to 1"),
    ],
)
def test_what_is_no_matrix_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        matrix(rows)


def test_a_task_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match="expected tasks of different names, found digits, digits"):
        matrix(R[:1]).plus(AfterTask("digits", (0.5, 0.5), {}, {}))


@pytest.mark.parametrize(
    "text",
    ["", "epoch,step\n1,2\n", "after,accuracy/a\na,no number\n", "after,accuracy/a\na,nan\n", "after\na\n"],
)
def test_what_is_no_such_file_is_refused(tmp_path, text):
    path = tmp_path / "accuracy_matrix.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=r"not a readable accuracy matrix \(.*\); expected the accuracy_matrix"):
        read_matrix(path)
