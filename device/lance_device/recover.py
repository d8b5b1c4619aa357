"""Taking up a run that was cut off: the newest state on disk that is whole, and the rows that belong to it.

A run saves in this order, each durable before the next begins: the rows of its CSV files, `best.npz`,
`last.npz`, whose predecessor stays as `previous.npz`.  A checkpoint says what the CSV files held
(`Progress.rows`), so here

1. the first of `last.npz`, `previous.npz` that is whole, and whose rows are whole, is taken;
2. else the first of `last.npz`, `previous.npz`, `best.npz` that is whole, and damaged rows are given up;
3. rows of later steps are dropped: those steps are about to be done again, to the same bits.

What is given up is set aside (`last.npz.damaged`, `steps.csv.damaged`), not written over.

Nothing here trusts a file because it is there, and being cut off here again does no harm.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_device.checkpoint import Checkpoint, FileMark, read_checkpoint, read_meta, write_checkpoint
from lance_device.run_folder import RunFolder
from lance_device.run_record import read_record
from lance_edge.bundle import Bundle
from lance_edge.errors import DamagedCheckpointError, DataError, StorageError
from lance_edge.files import file_digest
from lance_edge.records import RecordError, from_json

NOTHING = FileMark(0, "")


@dataclass(frozen=True)
class Recovered:
    """The state to go on from.

    Attributes:
        notes: what was damaged and what became of it, for the user and for `run.json`; where there is any,
            `last.npz` is to be written anew.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...]


def recover(folder: RunFolder, bundle: Bundle) -> Recovered:
    """Find the last good state of a run and cut its files back to it.

    Raises:
        DamagedCheckpointError: if no checkpoint in the folder is whole.
        CheckpointError: if it belongs to another package.
        StorageError: if the folder cannot be written.
    """
    notes: list[str] = []
    checkpoint = _choose(folder, bundle, notes)
    for path in folder.row_files:
        _cut_rows(folder, path, checkpoint, notes)
    _check_best(folder, bundle, checkpoint, notes)
    return Recovered(checkpoint, tuple(notes))


def marks_on_record(folder: RunFolder, bundle: Bundle) -> Mapping[str, FileMark]:
    """What the newest whole checkpoint says that the files of a run held; nothing where none is whole.

    Raises:
        CheckpointError: if it belongs to another package.
    """
    for path in (folder.last, folder.previous, folder.best):
        if path.exists():
            with contextlib.suppress(DamagedCheckpointError):
                return read_meta(path, bundle).progress.rows
    return {}


def is_whole(path: Path, marks: Mapping[str, FileMark]) -> bool:
    """Whether a file begins with what is on record of it."""
    return path.name in marks and _begins_with(path, marks[path.name])


def _choose(folder: RunFolder, bundle: Bundle, notes: list[str]) -> Checkpoint:
    whole: list[tuple[Path, Checkpoint]] = []
    for path in (folder.last, folder.previous):
        checkpoint = _read(path, bundle, notes)
        if checkpoint is not None:
            whole.append((path, checkpoint))
            damaged = [file.name for file in folder.row_files if not _rows_are_whole(file, checkpoint)]
            if not damaged:
                return _taken(whole[-1], folder, notes)
            notes.append(f"{' and '.join(damaged)}: not the rows that {path.name} declares")
    if not whole:
        checkpoint = _read(folder.best, bundle, notes)
        whole = [(folder.best, checkpoint)] if checkpoint is not None else []
    if not whole:
        raise DamagedCheckpointError(
            f"{folder.path}: no checkpoint here is whole ({'; '.join(notes)}); start a new run with another"
            " --out"
        )
    return _taken(whole[0], folder, notes)


def _taken(choice: tuple[Path, Checkpoint], folder: RunFolder, notes: list[str]) -> Checkpoint:
    path, checkpoint = choice
    if path != folder.last:
        aside = _set_aside(folder.last)
        kept = f"; last.npz is kept as {aside.name}" if aside is not None else ""
        notes.append(f"going on from {path.name}, step {checkpoint.meta.step}{kept}")
    return checkpoint


def _set_aside(path: Path) -> Path | None:
    """Give a file that is not gone on with another name; `None` if there is no such file."""
    aside = path.with_name(path.name + ".damaged")
    try:
        path.replace(aside)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot rename it to {aside.name} ({error.strerror or error}); check the card and its"
            " permissions"
        ) from None
    return aside


def _read(path: Path, bundle: Bundle, notes: list[str]) -> Checkpoint | None:
    if not path.exists():
        if path.name == "last.npz":
            notes.append(f"{path.name} is missing")
        return None
    try:
        return read_checkpoint(path, bundle)
    except DamagedCheckpointError as error:
        notes.append(f"{path.name} is damaged ({error.reason})")
        return None


def _rows_are_whole(path: Path, checkpoint: Checkpoint) -> bool:
    return _begins_with(path, checkpoint.meta.progress.rows.get(path.name, NOTHING))


def _begins_with(path: Path, mark: FileMark) -> bool:
    if mark.size <= 0:
        return True
    try:
        return path.stat().st_size >= mark.size and file_digest(path, mark.size).hexdigest() == mark.sha256
    except OSError:
        return False


def _cut_rows(folder: RunFolder, path: Path, checkpoint: Checkpoint, notes: list[str]) -> None:
    """Drop what came after the checkpoint; set a file aside of which what came before is damaged."""
    step, rows = checkpoint.meta.progress.step, checkpoint.meta.progress.rows
    if not path.exists() and path.name not in rows:
        return
    if not _rows_are_whole(path, checkpoint):
        rows.pop(path.name)
        aside = _set_aside(path)
        problem, see = ("is damaged", f" (see {aside.name})") if aside is not None else ("is missing", "")
        notes.append(f"{path.name} {problem}: its rows up to step {step} are lost{see}")
        return
    mark, end = rows.get(path.name, NOTHING), _mark_at_the_end(folder, checkpoint, path.name)
    is_end = end.size > mark.size and _begins_with(path, end)
    try:
        _truncate(path, end.size if is_end else max(mark.size, 0))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot cut it back to step {step} ({error.strerror or error}); check the card and its"
            " permissions"
        ) from None


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def _mark_at_the_end(folder: RunFolder, checkpoint: Checkpoint, name: str) -> FileMark:
    """What a file held when the run was stopped in good order, right after this checkpoint.

    That is a row more than the checkpoint knows of: what the checkpoint itself cost.
    """
    meta = checkpoint.meta
    try:
        record = read_record(folder.record)
        if record["run_id"] == meta.run_id and record["result"]["step"] == meta.progress.step:
            return from_json(FileMark, record["rows"][name])
    except (DataError, RecordError, LookupError, TypeError):  # it did not end in good order
        pass
    return NOTHING


def _check_best(folder: RunFolder, bundle: Bundle, checkpoint: Checkpoint, notes: list[str]) -> None:
    """See that `best.npz` is what the state says; a later one is good too: its step will come again."""
    best = checkpoint.meta.progress.best
    if best is None:
        return
    problems: list[str] = []
    stored = _read(folder.best, bundle, problems)
    if stored is not None and stored.meta.run_id == checkpoint.meta.run_id and stored.meta.step >= best.step:
        return
    notes += problems or ["best.npz is missing or of another run"]
    same = _of_step(best.step, [checkpoint, _read(folder.previous, bundle, [])])
    if same is not None:
        write_checkpoint(folder.best, same)
        notes.append(f"best.npz (epoch {best.epoch}) is written anew")
    else:
        checkpoint.meta.progress.best = None
        notes.append(f"the weights of epoch {best.epoch}, the best so far, are lost; the best is chosen anew")


def _of_step(step: int, checkpoints: Sequence[Checkpoint | None]) -> Checkpoint | None:
    return next((known for known in checkpoints if known is not None and known.meta.step == step), None)
