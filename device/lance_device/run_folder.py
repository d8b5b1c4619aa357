"""The folder of a run: which file is called what, and whether it may be written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lance_device.measure import write_rows
from lance_edge.datasets import Dataset
from lance_edge.errors import CheckpointError, StorageError
from lance_edge.images import Part


@dataclass(frozen=True)
class SplitRow:
    """One image (`split.csv`)."""

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
    def best(self) -> Path:
        """Checkpoint of the best evaluation."""
        return self.path / "best.npz"

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
    def record(self) -> Path:
        """Machine, versions, arguments, result."""
        return self.path / "run.json"

    def claim(self) -> None:
        """Make the folder for a new run.

        Raises:
            StorageError: if it holds a run already or cannot be made.
        """
        files = (self.last, self.best, self.steps, self.history, self.summary, self.split, self.record)
        existing = [file.name for file in files if file.exists()]
        if existing:
            raise StorageError(
                f"{self.path}: holds a run already ({', '.join(existing)}); continue it with --resume,"
                " or choose another --out"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot make this folder ({error.strerror}); choose another --out"
            ) from None

    def expect_run(self) -> None:
        """Check that there is a run to resume, and clear away what a killed process left half-written.

        Raises:
            CheckpointError: if there is none.
        """
        if not self.last.exists():
            raise CheckpointError(
                f"{self.path}: no {self.last.name} here, so there is no run to resume;"
                " start one without --resume"
            )
        for file in (self.last, self.best, self.steps, self.history, self.summary, self.split, self.record):
            for leftover in self.path.glob(f".{file.name}.*"):
                leftover.unlink(missing_ok=True)

    def write_split(self, dataset: Dataset) -> None:
        """Write which image is in which part."""
        write_rows(self.split, SplitRow, tuple(_split_rows(dataset)))


def _split_rows(dataset: Dataset) -> Iterator[SplitRow]:
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
