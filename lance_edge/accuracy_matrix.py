"""What a network knows of each task after each task: the matrix R, and the usual figures from it.

`R[i][j]` is the accuracy on the test images of task j after task i was learnt, for j <= i; T tasks.

    ACC               mean over j of R[T-1][j]
    BWT               mean over j < T-1 of R[T-1][j] - R[j][j]; below 0 is forgetting
    forgetting        mean over j < T-1 of max over j <= i < T-1 of R[i][j], minus R[T-1][j]
    learning accuracy mean over j of R[j][j]

Sources: ACC and BWT, Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017; forgetting, Chaudhry
et al., "Riemannian Walk", ECCV 2018; learning accuracy, Riemer et al., "Learning to Learn without
Forgetting", ICLR 2019.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_edge.errors import DataError
from lance_edge.files import atomic_writer

AFTER, ACCURACY, RANK, KEPT = "after", "accuracy/", "rank/", "bytes/"
FIGURES = ("acc", "bwt", "forgetting", "learning_accuracy")
LARGEST = 1e18  # a number in the file; bytes never reach it


@dataclass(frozen=True)
class AfterTask:
    """The row that is added after a task.

    Attributes:
        task: its name.
        accuracies: on this task and all before it, in the order in which they were learnt: fractions of 1.
        ranks: of the protected subspace M, all groups together, by layer; 0 where nothing is protected.
        kept_bytes: what is kept from task to task, by kind (`memory`, `heads`, `weights`, ...).
    """

    task: str
    accuracies: tuple[float, ...]
    ranks: dict[str, int]
    kept_bytes: dict[str, int]


@dataclass(frozen=True)
class AccuracyMatrix:
    """The tasks so far."""

    rows: tuple[AfterTask, ...] = ()

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: if row i has not i + 1 accuracies, or a name comes twice.
        """
        for number, row in enumerate(self.rows, start=1):
            if len(row.accuracies) != number:
                raise ValueError(
                    f"after task {number}: expected {number} accuracies, found {len(row.accuracies)}"
                )
            if not all(0 <= accuracy <= 1 for accuracy in row.accuracies):
                raise ValueError(
                    f"after task {number}: expected accuracies from 0 to 1, found {row.accuracies}"
                )
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"expected tasks of different names, found {', '.join(self.tasks)}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names, in the order in which they were learnt."""
        return tuple(row.task for row in self.rows)

    def plus(self, row: AfterTask) -> "AccuracyMatrix":
        """With one more task."""
        return AccuracyMatrix((*self.rows, row))

    def upto(self, number: int) -> "AccuracyMatrix":
        """As it was after so many tasks."""
        return AccuracyMatrix(self.rows[:number])

    @property
    def acc(self) -> float | None:
        """Mean accuracy over all tasks after the last one; `None` before the first."""
        return _mean(self.rows[-1].accuracies) if self.rows else None

    @property
    def bwt(self) -> float | None:
        """Backward transfer: how accuracies changed since each task was learnt; `None` with one task."""
        last = self.rows[-1].accuracies if self.rows else ()
        return _mean([now - row.accuracies[-1] for now, row in zip(last[:-1], self.rows, strict=False)])

    @property
    def forgetting(self) -> float | None:
        """How far accuracies fell below their best since; `None` with one task."""
        earlier = self.rows[:-1]
        best = [max(row.accuracies[j] for row in earlier[j:]) for j in range(len(earlier))]
        last = self.rows[-1].accuracies if self.rows else ()
        return _mean([high - now for high, now in zip(best, last, strict=False)])

    @property
    def learning_accuracy(self) -> float | None:
        """Mean accuracy of each task right after it was learnt; `None` before the first."""
        return _mean([row.accuracies[-1] for row in self.rows])

    @property
    def figures(self) -> dict[str, float | None]:
        """ACC, BWT, forgetting and learning accuracy, by the names of their columns."""
        return {name: getattr(self, name) for name in FIGURES}


def write_matrix(path: Path, matrix: AccuracyMatrix) -> None:
    """Write `accuracy_matrix.csv`, atomically.

    A row for each task, in the order in which they were learnt: `after` (its name), `accuracy/<task>` of every
    task (empty for later ones), the four figures up to that row, `rank/<layer>` of M, `bytes/<kind>` kept.

    Raises:
        StorageError: if it cannot be written.
    """
    with atomic_writer(path) as file:
        file.write(matrix_csv(matrix).encode())


def matrix_csv(matrix: AccuracyMatrix) -> str:
    """The text of `accuracy_matrix.csv`: see `write_matrix`."""
    layers = _in_order(row.ranks for row in matrix.rows)
    kinds = _in_order(row.kept_bytes for row in matrix.rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            *(AFTER, *(ACCURACY + task for task in matrix.tasks), *FIGURES),
            *(*(RANK + layer for layer in layers), *(KEPT + kind for kind in kinds)),
        ]
    )
    for number, row in enumerate(matrix.rows, start=1):
        accuracies = [*row.accuracies, *[None] * (len(matrix.rows) - number)]
        figures = matrix.upto(number).figures.values()
        cells = [*accuracies, *figures, *map(row.ranks.get, layers), *map(row.kept_bytes.get, kinds)]
        table.writerow([row.task, *map(_cell, cells)])
    return text.getvalue()


def read_matrix(path: Path) -> AccuracyMatrix:
    """Read what `write_matrix` wrote; the figures are computed anew.

    Raises:
        DataError: if it cannot be read, or is something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            if (table.fieldnames or [])[:1] != [AFTER]:
                raise ValueError(f"its first column is not {AFTER}")
            return AccuracyMatrix(tuple(_row(row) for row in table))
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable accuracy matrix ({error}); expected the accuracy_matrix.csv that"
            " lance-device or lance-host continual wrote"
        ) from None


def _row(cells: dict[str, str]) -> AfterTask:
    filled = {name: text for name, text in cells.items() if text}
    numbers = {name: float(text) for name, text in filled.items() if name != AFTER}
    if not all(abs(number) < LARGEST for number in numbers.values()):  # also true of nan
        raise ValueError("expected finite numbers")
    return AfterTask(
        task=cells[AFTER],
        accuracies=tuple(number for name, number in numbers.items() if name.startswith(ACCURACY)),
        ranks={name.removeprefix(RANK): int(n) for name, n in numbers.items() if name.startswith(RANK)},
        kept_bytes={name.removeprefix(KEPT): int(n) for name, n in numbers.items() if name.startswith(KEPT)},
    )


def _in_order(groups: Iterable[Mapping[str, int]]) -> list[str]:
    """All names of several mappings, each once, in the order in which they come."""
    names: dict[str, None] = {}
    for group in groups:
        names |= dict.fromkeys(group)
    return list(names)


def _cell(value: float | int | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else format(value, ".9g")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
