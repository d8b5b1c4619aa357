"""Images that cannot be used: found before anything is learned from them, left out, and named.

A part is divided by names alone (`datasets.py`), so leaving an image out moves no other one.  Images that go
missing later, while a run reads them, are stood in for by others of their class.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from lance_edge.datasets import Dataset, FilePart
from lance_edge.errors import DataError
from lance_edge.images import Part, load_image

PARTS = ("train", "validation", "test")
AT_A_TIME = 256  # images that wait for a thread: each is a kilobyte of Python
Report = Callable[[str, str], None]  # name of the image, reason


@dataclass(frozen=True)
class SkippedRow:
    """An image that is not used (`skipped.csv`).

    Attributes:
        name: its path within the folder of images.
        part: `train`, `validation` or `test`.
        reason: why it cannot be read.
        step: 0 if it was never used, else the step in which it could no longer be read.
    """

    name: str
    part: str
    step: int
    reason: str


def find_bad(dataset: Dataset, threads: int, parts: Sequence[str] = PARTS) -> tuple[SkippedRow, ...]:
    """Decode every image file once; an `.npz` holds none.

    Args:
        threads: images that are decoded at a time, where there is room for so many threads and images.
    """
    found: list[SkippedRow] = []
    for part_name in parts:
        part = getattr(dataset, part_name)
        if isinstance(part, FilePart):
            rows = zip(part.names, _reasons(part.paths, threads), strict=True)
            found += [SkippedRow(name, part_name, 0, reason) for name, reason in rows if reason]
    return tuple(found)


def _reasons(paths: Sequence[Path], threads: int) -> list[str]:
    """For each file what is wrong with it, or nothing."""
    if threads > 1:
        # No room for a thread (`ulimit -v`), or for so many images at a time: one by one, then.
        with suppress(RuntimeError, MemoryError), ThreadPoolExecutor(threads) as pool:
            reasons: list[str] = []
            for first in range(0, len(paths), AT_A_TIME):
                reasons += pool.map(_reason, paths[first : first + AT_A_TIME])
            return reasons
    return [_reason(path) for path in paths]


def without(dataset: Dataset, names: Collection[str]) -> Dataset:
    """The data set without these images.

    Raises:
        DataError: if a class has no image left to train on.
    """
    bad = set(names)
    if not bad:
        return dataset
    train, validation, test = (leave_out(getattr(dataset, name), bad) for name in PARTS)
    counts = np.bincount(train.labels, minlength=len(dataset.classes))
    for class_name, before, count in zip(
        dataset.classes, np.bincount(dataset.train.labels), counts, strict=True
    ):
        if count == 0:
            raise DataError(
                f"{dataset.root}: class {class_name!r}: none of its {before} training images can be read;"
                " replace them, or remove the class from data and package"
            )
    return replace(dataset, train=train, validation=validation, test=test)


def refuse(root: Path, skipped: Collection[SkippedRow]) -> None:
    """What `--strict` does about bad images.

    Raises:
        DataError: if there is one, naming the first.
    """
    if skipped:
        first = next(iter(skipped))
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise DataError(
            f"{root}: cannot read {first.name} ({first.reason}){more}; replace or remove such images, or leave"
            " --strict out to skip them"
        )


def steady(
    dataset: Dataset, report: Callable[[str, str, str], None], before_each: Callable[[], None] = lambda: None
) -> Dataset:
    """The same data set, of which files may be bad, change or vanish: others of their class stand in.

    Args:
        report: told once of every image that cannot be read: its part, its name, the reason.
        before_each: called before an image is decoded, from any thread; may raise to leave.
    """

    def kept(name: str) -> Part:
        return SteadyPart.of(getattr(dataset, name), partial(report, name), before_each)

    return replace(dataset, train=kept("train"), validation=kept("validation"), test=kept("test"))


class SteadyPart(FilePart):
    """A part whose files may vanish or break while it is in use: another image of the class stands in."""

    report: Report
    before_each: Callable[[], None]

    @classmethod
    def of(cls, part: Part, report: Report, before_each: Callable[[], None]) -> Part:
        """The same images; `report` is told once of every one that cannot be read.  Arrays stay as they are."""
        if not isinstance(part, FilePart):
            return part
        steady = cls(part.paths, part.names, part.labels)
        object.__setattr__(steady, "report", report)  # the dataclass is frozen
        object.__setattr__(steady, "before_each", before_each)
        object.__setattr__(steady, "reported", set())
        return steady

    def image(self, index: int) -> Image.Image:
        """The image, or the next one of its class that can be read.

        Raises:
            DataError: if there is none.
        """
        for candidate in self._candidates(index):
            self.before_each()
            try:
                return load_image(self.paths[candidate])
            except DataError as error:
                self._report(candidate, error.reason)
                last = error
        raise DataError(f"{last}; no other image of its class can be read either")

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        same = np.flatnonzero(self.labels == self.labels[index])  # ascending
        place = int(np.searchsorted(same, index))
        yield from map(int, np.roll(same, -place)[1:])

    def _report(self, index: int, reason: str) -> None:
        reported: set[int] = self.__dict__["reported"]
        if index not in reported:
            reported.add(index)
            self.report(self.names[index], reason)


def _reason(path: Path) -> str:
    """Why an image cannot be used; empty if it can."""
    try:
        load_image(path)
    except DataError as error:
        return error.reason
    return ""


def leave_out(part: Part, names: set[str]) -> Part:
    """The part without the image files of these names."""
    if not isinstance(part, FilePart):
        return part
    return part.select(np.flatnonzero([name not in names for name in part.names]))
