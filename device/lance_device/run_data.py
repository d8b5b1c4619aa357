"""The images of a run: those that can be read when it begins; and what becomes of those that cannot."""

from collections.abc import Callable

from lance_device.measure import RowLog, write_rows
from lance_device.options import available_cores
from lance_device.run_folder import RunFolder
from lance_device.run_setup import Run, TrainRequest
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset, open_dataset
from lance_edge.errors import DataError
from lance_edge.profiles import read_rows
from lance_edge.screening import SkippedRow, find_bad, refuse, without

Note = Callable[[str], None]


def open_images(request: TrainRequest, bundle: Bundle, note: Note) -> tuple[Dataset, tuple[SkippedRow, ...]]:
    """The data set without the images that cannot be used, and these.

    A run that is taken up again leaves out what it left out when it began, and decodes nothing twice.

    Raises:
        DataError: if there are none, a class is left empty, or one cannot be read and `--strict` was given.
    """
    dataset = open_dataset(request.data, bundle.manifest.split, bundle.manifest.classes)
    skipped = _skipped_before(request)
    if skipped is None:
        skipped = find_bad(dataset, available_cores())
        if request.strict:
            refuse(request.data, skipped)
    if skipped:
        where = RunFolder(request.out).skipped
        note(f"warning: {len(skipped)} images cannot be used and are left out; they are listed in {where}")
    return without(dataset, {row.name for row in skipped}), skipped


def _skipped_before(request: TrainRequest) -> tuple[SkippedRow, ...] | None:
    if not request.takes_up:
        return None
    try:
        return tuple(row for row in read_rows(RunFolder(request.out).skipped, SkippedRow) if row.step == 0)
    except DataError:  # missing or damaged: to be found again
        return None


class Absentees:
    """Images that go missing during a run: said, and listed in `skipped.csv`."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._run: Run | None = None
        self._on_first: Callable[[], None] = lambda: None

    def begin(self, run: Run, skipped: tuple[SkippedRow, ...], on_first: Callable[[], None]) -> None:
        """Write what is left out from the start; `last.npz` is there by now.

        Args:
            on_first: called as soon as an image is missing, before another is used in its place.
        """
        self._run, self._on_first = run, on_first
        if not run.is_resumed or not run.folder.skipped.exists():
            write_rows(run.folder.skipped, SkippedRow, skipped)

    def report(self, part: str, name: str, reason: str) -> None:
        """An image can no longer be read; for `screening.steady`."""
        self._on_first()
        self._note(f"warning: {name} can no longer be read ({reason}); another of its class stands in")
        if self._run is not None:
            log = RowLog(self._run.folder.skipped, SkippedRow)
            log.write(SkippedRow(name, part, self._run.progress.step + 1, reason))
            log.close()
