"""The images of a run: those that can be read when it begins; and what becomes of those that cannot."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lance_device.checkpoint import FileMark
from lance_device.image_memory import largest_image
from lance_device.measure import RowLog, csv_lines, write_rows
from lance_device.memory_plan import find_limits
from lance_device.options import available_cores
from lance_device.recover import is_whole, marks_on_record
from lance_device.run_folder import RunFolder, SplitRow, split_rows
from lance_device.run_setup import Run, TrainRequest
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset, FilePart, open_dataset
from lance_edge.errors import CheckpointError, DataError
from lance_edge.profiles import read_intact_rows
from lance_edge.recorded_split import recorded_dataset
from lance_edge.screening import PARTS, SkippedRow, find_bad, leave_out, refuse, without

Note = Callable[[str], None]


def open_images(request: TrainRequest, bundle: Bundle, note: Note) -> tuple[Dataset, tuple[SkippedRow, ...]]:
    """The data set without the images that cannot be used, and these.

    A run that is taken up again has the images that it began with, as its folder has them on record: one that
    is gone is stood in for, a new one takes no part, and nothing is decoded twice.

    Raises:
        CheckpointError: if a class has lost all images of the run.
        DataError: if there are none, a class is left empty, or one cannot be read and `--strict` was given.
    """
    marks = marks_on_record(RunFolder(request.out), bundle) if request.takes_up else {}
    dataset = _on_record(request, bundle, marks)
    if dataset is None:
        listing = open_dataset(request.data, bundle.manifest.split, bundle.manifest.classes)
        skipped = _skipped_before(request, marks)
        if skipped is None:
            skipped = _find_bad(request, listing)
        dataset = without(listing, {row.name for row in skipped})
    else:
        skipped = _compare(request, bundle, dataset, _skipped_before(request, marks), note)
    if request.strict:
        bad_now = _find_bad(request, dataset) if request.takes_up else ()
        refuse(request.data, (*skipped, *bad_now))
    if skipped:
        where = RunFolder(request.out).skipped
        note(f"warning: {len(skipped)} images cannot be used and are left out; they are listed in {where}")
    return dataset, skipped


def _find_bad(request: TrainRequest, dataset: Dataset) -> tuple[SkippedRow, ...]:
    """Those that cannot be decoded; under a limit on memory one is decoded at a time, if it fits.

    Raises:
        PlatformError: if the largest does not.
    """
    limits = find_limits(request.memory_limit)
    if limits:
        largest_image(dataset).expect_room(limits)
    return find_bad(dataset, 1 if limits else available_cores())


def _on_record(request: TrainRequest, bundle: Bundle, marks: Mapping[str, FileMark]) -> Dataset | None:
    """The images that a run began with, if that is known for certain; arrays are all in one file."""
    folder = RunFolder(request.out)
    if not request.data.is_dir() or not is_whole(folder.split, marks):
        return None
    try:
        entries = [(row.name, row.label, row.part) for row in folder.read_split()]
    except DataError:  # an odd name: the listing will do
        return None
    return recorded_dataset(request.data, bundle.manifest.classes, entries)


def _skipped_before(request: TrainRequest, marks: Mapping[str, FileMark]) -> tuple[SkippedRow, ...] | None:
    """What the run left out when it began; `None` if that is not known for certain."""
    path = RunFolder(request.out).skipped
    if not is_whole(path, marks):
        return None
    return tuple(row for row in _intact(path) if row.step == 0)


def _intact(path: Path) -> tuple[SkippedRow, ...]:
    try:
        return tuple(read_intact_rows(path, SkippedRow))
    except DataError:
        return ()


def _compare(
    request: TrainRequest,
    bundle: Bundle,
    dataset: Dataset,
    skipped: tuple[SkippedRow, ...] | None,
    note: Note,
) -> tuple[SkippedRow, ...]:
    """Say what has changed in the folder since the run began; gives what the run left out."""
    _expect_some_of_each_class(request, dataset)
    gone = sum(not path.exists() for part in _file_parts(dataset) for path in part.paths)
    if gone:
        note(f"warning: {gone} images of this run are gone from {request.data}; others of their class stand in")
    known = {name for part in _file_parts(dataset) for name in part.names}
    try:
        listing = open_dataset(request.data, bundle.manifest.split, bundle.manifest.classes)
    except DataError:  # a class is empty, or a new one is there: the run needs neither
        return skipped or ()
    train, validation, test = (leave_out(getattr(listing, name), known) for name in PARTS)
    if skipped is None:  # of those that are not in the run, the bad ones
        skipped = _find_bad(request, replace(listing, train=train, validation=validation, test=test))
    bad = {row.name for row in skipped}
    new = sum(name not in bad for part in (train, validation, test) for name in part.names)
    if new:
        note(f"{request.data}: {new} images are new; this run goes on without them, as it began")
    return skipped


def _expect_some_of_each_class(request: TrainRequest, dataset: Dataset) -> None:
    (train, *_) = _file_parts(dataset)
    there = np.array([path.exists() for path in train.paths], np.bool_)
    for label, name in enumerate(dataset.classes):
        own = train.labels == label
        if not there[own].any():
            raise CheckpointError(
                f"{request.data}: none of the {own.sum()} training images of class {name!r} is here that"
                f" the run in {request.out} began with; give the same --data, or start a new run with another"
                " --out"
            )


def _file_parts(dataset: Dataset) -> tuple[FilePart, ...]:
    parts = (dataset.train, dataset.validation, dataset.test)
    return tuple(part for part in parts if isinstance(part, FilePart))


class Absentees:
    """Images that go missing during a run: said, and listed in `skipped.csv`."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._run: Run | None = None
        self._skipped: tuple[SkippedRow, ...] = ()
        self._on_first: Callable[[], None] = lambda: None

    def take_down(self, run: Run, dataset: Dataset, skipped: tuple[SkippedRow, ...]) -> None:
        """Put on record, with the next checkpoint, which images the run has and which it leaves out."""
        self._skipped = skipped
        contents = {
            run.folder.split.name: csv_lines(SplitRow, split_rows(dataset)),
            run.folder.skipped.name: csv_lines(SkippedRow, skipped),
        }
        for name, lines in contents.items():
            data = b"".join(lines)
            run.progress.rows[name] = FileMark(len(data), hashlib.sha256(data).hexdigest())

    def begin(self, run: Run, on_first: Callable[[], None]) -> None:
        """Write what is left out from the start; `last.npz` is there by now.

        Args:
            on_first: called as soon as an image is missing, before another is used in its place.
        """
        self._run, self._on_first = run, on_first
        path, known = run.folder.skipped, {row.name for row in self._skipped}
        before = _intact(path) if run.is_resumed else ()
        later = [row for row in before if row.step > 0 and row.name not in known]
        lines = b"".join(csv_lines(SkippedRow, [*self._skipped, *later]))
        if not path.exists() or path.read_bytes() != lines:  # new, damaged, or torn at its end
            write_rows(path, SkippedRow, [*self._skipped, *later])

    def report(self, part: str, name: str, reason: str) -> None:
        """An image can no longer be read; for `screening.steady`."""
        self._on_first()
        self._note(f"warning: {name} can no longer be read ({reason}); another of its class stands in")
        if self._run is not None:
            log = RowLog(self._run.folder.skipped, SkippedRow)
            log.write(SkippedRow(name, part, self._run.progress.step + 1, reason))
            log.close()
