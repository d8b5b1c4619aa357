"""A folder of tasks: for each one a run folder with its package, and what became of all tasks.

    tasks/
      1-animals/    pkg.tar  task.json  last.npz  best.npz  steps.csv  ...   (as every run, see `run_folder.py`)
      2-plants/     pkg.tar: weights, heads and memory of the tasks before
      accuracy_matrix.csv

A task begins when its folder takes its name: package and record are durable in it by then, so whatever a power
cut leaves is the state before or the state after.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lance_device.run_folder import RunFolder
from lance_device.run_record import read_record, write_record
from lance_edge.bundle import Bundle
from lance_edge.errors import CheckpointError, DataError, StorageError
from lance_edge.files import CHUNK_BYTES, atomic_writer, sync_folder
from lance_edge.names import is_task_name
from lance_edge.records import RecordError, from_json, to_json

FOLDER = re.compile(r"([1-9]\d{0,3})-(.+)")
PACKAGE, RECORD, MATRIX = "pkg.tar", "task.json", "accuracy_matrix.csv"
CHECKPOINTS = ("last", "best")
FIRST_NAME = "task-1"  # of a package that has no name for its task, as the workstation has it


@dataclass(frozen=True)
class TaskRecord:
    """`task.json`: where a task's images are, and which checkpoint is its result (`last` or `best`)."""

    task: str
    data: str
    result: str


@dataclass(frozen=True)
class TaskPlace:
    """One task in the folder."""

    number: int
    path: Path
    record: TaskRecord

    @property
    def run(self) -> RunFolder:
        """Its run."""
        return RunFolder(self.path)

    @property
    def package(self) -> Path:
        """What it trains from."""
        return self.path / PACKAGE

    @property
    def checkpoint(self) -> Path:
        """Its result."""
        return self.path / f"{self.record.result}.npz"

    @property
    def is_finished(self) -> bool:
        """Whether its training came to its end."""
        try:
            return bool(read_record(self.run.record)["status"] == "finished") and self.checkpoint.exists()
        except (DataError, KeyError):
            return False


class TaskFolder:
    """All tasks, in the order in which they came."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def matrix(self) -> Path:
        """What is known of each task after each task."""
        return self.root / MATRIX

    @property
    def has_tasks(self) -> bool:
        """Whether this is a folder of tasks."""
        return bool(self._folders())

    def tasks(self) -> tuple[TaskPlace, ...]:
        """The tasks so far.

        Raises:
            CheckpointError: if one is missing or its record is damaged.
        """
        places = []
        for number, (found, path) in enumerate(self._folders(), start=1):
            if found != number:
                raise CheckpointError(f"{self.root}: task {number} is missing; bring its folder back")
            places.append(TaskPlace(number, path, _read(path / RECORD)))
        return tuple(places)

    def current(self) -> TaskPlace:
        """The task that came last.

        Raises:
            CheckpointError: if there is none.
        """
        places = self.tasks()
        if not places:
            raise CheckpointError(
                f"{self.root}: no task here; begin with lance-device train --artifact pkg.tar --tasks"
            )
        return places[-1]

    def learned(self) -> tuple[TaskPlace, ...]:
        """The tasks whose training is finished: all, or all but the last."""
        return tuple(place for place in self.tasks() if place.is_finished)

    def begin_first(self, artifact: Path, data: Path, result: str) -> TaskPlace:
        """The folder of the first task, with a copy of the package, whose name for the task it has.

        Raises:
            ArtifactError: if the package is not sound.
            StorageError: if it cannot be written; nothing is left behind.
        """

        def copy(target: Path) -> None:
            with artifact.open("rb") as source, atomic_writer(target) as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)

        with Bundle(artifact) as bundle:
            name = bundle.manifest.task or FIRST_NAME
            return self.begin(TaskRecord(name, str(data.absolute()), result), copy)

    def begin(self, record: TaskRecord, make_package: Callable[[Path], object]) -> TaskPlace:
        """The folder of a further task, complete when it has its name.

        Args:
            make_package: writes the package, durable, to the path that it is given.

        Raises:
            DataError: if the name cannot be one, or is taken.
            StorageError: if it cannot be written, or another task begins here; nothing is left behind.
        """
        with self._locked():
            places = self.tasks()
            _check_name(record.task, [place.record.task for place in places])
            number = len(places) + 1
            self._clear_leftovers()
            unfinished = self.root / f".{number}-{record.task}.{secrets.token_hex(4)}"
            path = self.root / f"{number}-{record.task}"
            try:
                with _making(path):
                    unfinished.mkdir()
                make_package(unfinished / PACKAGE)
                with _making(path):
                    write_record(unfinished / RECORD, {"record": to_json(record)})
                    unfinished.replace(path)
                    sync_folder(self.root)
                    sync_folder(self.root.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            return TaskPlace(number, path, record)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder, made where it was not, for one command at a time that begins a task in it."""
        with _making(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StorageError(
                        f"{self.root}: another process begins a task in this folder; wait for it"
                    ) from None
            yield
        finally:
            os.close(descriptor)

    def _folders(self) -> list[tuple[int, Path]]:
        if not self.root.is_dir():
            return []
        matches = ((FOLDER.fullmatch(path.name), path) for path in self.root.iterdir() if path.is_dir())
        return sorted((int(match[1]), path) for match, path in matches if match and (path / RECORD).exists())

    def _clear_leftovers(self) -> None:
        """What a power cut left of a task that never began."""
        for path in self.root.glob(".[1-9]*-*") if self.root.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def open_place(root: Path, artifact: Path | None, data: Path, result: str, takes_up: bool = False) -> TaskPlace:
    """Where to train: the folder's current task, or in an empty folder the first.

    Args:
        takes_up: a run that is there is gone on with.

    Raises:
        CheckpointError: if there is a package, and the folder has one already; or if the current task is
            finished, and the images are another's.
        DataError: if there is none at all.
    """
    folder = TaskFolder(root)
    if not folder.has_tasks:
        if artifact is None:
            raise DataError(f"{root}: no task here yet; give the first one's package with --artifact")
        return folder.begin_first(artifact, data, result)
    place = folder.current()
    if artifact is not None:
        raise CheckpointError(
            f"{root}: task {place.record.task} has its own package, {place.package}; leave --artifact out"
        )
    if place.is_finished and not takes_up and str(data.absolute()) != place.record.data:
        raise CheckpointError(
            f"{root}: task {place.record.task} is finished, and its images were {place.record.data}; for a next"
            f" task, make its package first: lance-device next-task --run {root} --next-data {data}"
        )
    return place


def find_place(places: tuple[TaskPlace, ...], wanted: str, where: Path) -> TaskPlace:
    """A task by its name, or by its number from 1.

    Raises:
        DataError: if there is none.
    """
    for place in places:
        if wanted in (place.record.task, str(place.number)):
            return place
    known = ", ".join(f"{place.number} ({place.record.task})" for place in places)
    raise DataError(f"{where}: no task {wanted!r} here; expected one of {known}")


@contextlib.contextmanager
def _making(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot make this folder ({error.strerror}); check the disk") from None


def _check_name(name: str, taken: list[str]) -> None:
    if not is_task_name(name) or name in taken:
        raise DataError(
            f"task {name!r}: expected a name of letters, digits, dots and dashes, at most 64, that no task here"
            f" has ({', '.join(taken) or 'none'}); give another with --task"
        )


def _read(path: Path) -> TaskRecord:
    try:
        record = from_json(TaskRecord, read_record(path)["record"])
    except (DataError, RecordError, KeyError) as error:
        raise CheckpointError(f"{path}: not the record of a task ({error}); bring the file back") from None
    if record.result not in CHECKPOINTS:
        raise CheckpointError(
            f"{path}: result is {record.result!r}, expected last or best; bring the file back"
        )
    return record
