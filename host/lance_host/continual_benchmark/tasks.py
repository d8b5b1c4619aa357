"""From data sets to tasks: one `.npz` a task, which the host and the device read like any other data.

`x`, `x_test` float32 `[N, 3, 32, 32]`, normalised, `y`, `y_test`, and `classes`.  As arrays, not as images,
because the data sets of one benchmark are normalised each by its own mean, while a package has one
preprocessing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_edge.datasets import Dataset, open_dataset
from lance_edge.errors import DataError
from lance_edge.files import atomic_writer
from lance_host.continual_benchmark.benchmarks import Benchmark, Source
from lance_host.continual_benchmark.image_sets import Images, ImageSet, Pixels, find_set
from lance_host.continual_benchmark.protocol import SPLIT

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A task: its number from 0, name, names of its classes, its file, and the digest of its data set."""

    number: int
    name: str
    classes: tuple[str, ...]
    path: Path
    digest: str = ""

    def open(self) -> Dataset:
        """Training, validation (5 % of each class) and test part."""
        return open_dataset(self.path, SPLIT, self.classes)


def make_tasks(
    benchmark: Benchmark, root: Path, folder: Path, per_class: tuple[int, int] | None, say: Say
) -> tuple[Task, ...]:
    """The tasks of a benchmark; their files are written into `folder` unless they are there.

    Args:
        per_class: training and test images of a class at most, the first ones; `None` takes all.

    Raises:
        DataError: if no data set of the benchmark is there, or one is damaged.
    """
    tasks: list[Task] = []
    for source in benchmark.sources:
        found = find_set(root, source, may_be_root=benchmark.is_one_set)
        if found is None:
            say(f"{source.name}: not found below {root}; skipped")
            continue
        for first in range(0, source.classes, benchmark.classes_per_task):
            labels = range(first, first + benchmark.classes_per_task)
            task = describe_task(benchmark, found, labels, len(tasks), folder, per_class)
            if not task.path.exists():
                say(f"task {task.number + 1}: {', '.join(task.classes)}")
                _write_task(task, found, labels, per_class)
            tasks.append(task)
    if not tasks:
        names = " or ".join(source.name for source in benchmark.sources)
        raise DataError(
            f"{root}: none of the data sets of {benchmark.name} is here; expected a folder {names} with"
            " train/<class>/*.png and test/<class>/*.png, IDX files, or an .npz"
        )
    return tuple(tasks)


def describe_task(
    benchmark: Benchmark,
    found: ImageSet,
    labels: range,
    number: int,
    folder: Path,
    per_class: tuple[int, int] | None,
) -> Task:
    """The task of these labels of a data set."""
    classes = tuple(found.classes[label] for label in labels)
    name = (
        found.source.name
        if len(labels) == found.source.classes
        else f"{found.source.name}-{labels[0]}-{labels[-1]}"
    )
    amount = "all" if per_class is None else "{}-{}".format(*per_class)
    path = folder / f"{name}-{amount}-{found.digest}.npz"  # other data below --data have another file
    return Task(number, name, classes, path, found.digest)


def _write_task(task: Task, found: ImageSet, labels: range, per_class: tuple[int, int] | None) -> None:
    limits = per_class or (None, None)
    (x, y), (x_test, y_test) = (
        select(part, labels, limit) for part, limit in zip((found.train, found.test), limits, strict=True)
    )
    with atomic_writer(task.path) as file:
        np.savez(
            file,
            x=normalise(x, found.source),
            y=y,
            x_test=normalise(x_test, found.source),
            y_test=y_test,
            classes=np.array(task.classes),
        )


def select(part: Images, labels: range, limit: int | None) -> tuple[Pixels, NDArray[np.int64]]:
    """The first images of each of these classes, in the order of the set, and their labels from 0."""
    chosen = [np.flatnonzero(part.labels == label)[:limit] for label in labels]
    rows = np.sort(np.concatenate(chosen))
    return part.read(rows), part.labels[rows] - labels[0]


def normalise(pixels: Pixels, source: Source) -> NDArray[np.float32]:
    """`(x / 255 - mean) / std` per channel: uint8 `[N, 32, 32, 3]` to float32 `[N, 3, 32, 32]`."""
    mean, std = (np.array(values, np.float64) for values in (source.mean, source.std))
    levels = (np.arange(256)[None, :] / 255 - mean[:, None]) / std[:, None]  # [3, 256]
    planes = [levels[channel].astype(np.float32)[pixels[..., channel]] for channel in range(3)]
    return np.stack(planes, axis=1)
