"""The folder of a run: which file is called what, and whether it may be written."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lance_device.measure import csv_lines, write_rows
from lance_edge.datasets import Dataset
from lance_edge.errors import CheckpointError, StorageError
from lance_edge.files import sync_folder
from lance_edge.images import Part
from lance_edge.profiles import read_rows


@dataclass(frozen=True)
class SplitRow:
    """One image (`split.csv`).

    Attributes:
        name: its path within the folder of images; of an array `part/number`.
        label: the name of its class.
        part: `train`, `validation` or `test`.
    """

    name: str
    label: str
    part: str


@dataclass(frozen=True)
class RunFolder:
    """Paths within a run."""

    path: Path

    @property
    def last(self) -> Path:
        """Checkpoint of the last complete step."""
        return self.path / "last.npz"

    @property
    def previous(self) -> Path:
        """The checkpoint before that one: kept until the new one is durable, and then until the next."""
        return self.path / "previous.npz"

    @property
    def best(self) -> Path:
        """Checkpoint of the best evaluation."""
        return self.path / "best.npz"

    def kept(self, epoch: int) -> Path:
        """A copy of the state after an epoch (`--keep-every`)."""
        return self.path / f"epoch-{epoch:04}.npz"

    @property
    def steps(self) -> Path:
        """A row per step and phase."""
        return self.path / "steps.csv"

    @property
    def history(self) -> Path:
        """A row per evaluation."""
        return self.path / "history.csv"

    @property
    def summary(self) -> Path:
        """Latency per phase."""
        return self.path / "summary.csv"

    @property
    def split(self) -> Path:
        """Every image with its part."""
        return self.path / "split.csv"

    @property
    def skipped(self) -> Path:
        """Images that are not used."""
        return self.path / "skipped.csv"

    @property
    def record(self) -> Path:
        """Machine, versions, arguments, result."""
        return self.path / "run.json"

    @property
    def protected(self) -> Path:
        """The memory that gradients are projected off, where there is one: a resumed run needs it again.

        It is written before the first checkpoint, so alone it is no run.
        """
        return self.path / "protect.npz"

    @property
    def row_files(self) -> tuple[Path, Path]:
        """Files that grow by whole rows."""
        return (self.steps, self.history)

    @property
    def has_state(self) -> bool:
        """Whether there is something to go on from."""
        return any(file.exists() for file in (self.last, self.previous, self.best))

    @contextlib.contextmanager
    def held(self, create: bool) -> Iterator[None]:
        """Keep the folder to this process; a folder that is still empty at the end is removed.

        Args:
            create: make the folder where there is none.

        Raises:
            StorageError: if another process trains into it, or it cannot be made.
        """
        if create:
            self._make()
        if not self.path.is_dir():
            yield
            return
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot open this folder ({error.strerror}); check its permissions, or choose"
                " another --out"
            ) from None
        try:
            self._lock(descriptor)
            try:
                yield
            finally:  # while it is still locked: nobody else can have begun here
                with contextlib.suppress(OSError):  # not empty: the rule
                    self.path.rmdir()
        finally:
            os.close(descriptor)

    def _make(self) -> None:
        try:
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in made:
                sync_folder(folder.parent)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot make this folder ({error.strerror}); choose another --out"
            ) from None

    def _lock(self, descriptor: int) -> None:
        busy = StorageError(
            f"{self.path}: another process is training into this folder; wait for it, or choose another --out"
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            own, there = os.fstat(descriptor), self.path.stat()
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        except OSError:
            return  # a file system without locks
        if not os.path.samestat(own, there):  # it was removed, and made anew, before it was locked here
            raise busy

    def claim(self) -> None:
        """See that a new run may begin here, and clear away what a killed process left half-written.

        Raises:
            StorageError: if the folder holds a run already.
        """
        existing = [file.name for file in self._files if file.exists() and file != self.protected]
        if existing:
            raise StorageError(
                f"{self.path}: holds a run already ({', '.join(existing)}); continue it with --resume,"
                " or choose another --out"
            )
        self._clear_leftovers()

    def expect_run(self) -> None:
        """Check that there is a run to resume, and clear away what a killed process left half-written.

        Raises:
            CheckpointError: if there is none.
        """
        if not self.has_state:
            raise CheckpointError(
                f"{self.path}: no {self.last.name} here, so there is no run to resume;"
                " start one without --resume"
            )
        self._clear_leftovers()

    @property
    def _files(self) -> tuple[Path, ...]:
        checkpoints = (self.last, self.previous, self.best)
        reports = (self.summary, self.split, self.skipped, self.record)
        return (*checkpoints, *self.row_files, *reports, self.protected)

    def _clear_leftovers(self) -> None:
        for file in self._files:
            for leftover in self.path.glob(f".{file.name}.*"):
                leftover.unlink(missing_ok=True)

    def write_split(self, dataset: Dataset) -> bool:
        """Write which image is in which part; `False` if that was on record already."""
        lines = b"".join(csv_lines(SplitRow, split_rows(dataset)))
        with contextlib.suppress(OSError):
            if self.split.read_bytes() == lines:
                return False
        write_rows(self.split, SplitRow, split_rows(dataset))
        return True

    def read_split(self) -> tuple[SplitRow, ...]:
        """What was written.

        Raises:
            DataError: if it cannot be read.
        """
        return tuple(read_rows(self.split, SplitRow, undecodable="surrogateescape"))


def split_rows(dataset: Dataset) -> Iterator[SplitRow]:
    """What `split.csv` says of a data set."""
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    for part_name, part in parts.items():
        for name, label in zip(part.names, part.labels, strict=True):
            yield SplitRow(name, dataset.classes[label], part_name)


def data_identity(part: Part) -> str:
    """SHA-256 of the names and labels of a part, in order: the same images in the same order."""
    lines = (f"{name}\0{label}\n" for name, label in zip(part.names, part.labels, strict=True))
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
