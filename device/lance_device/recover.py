"""Taking up a run that was cut off: the newest state on disk that is whole, and the rows that belong to it.

A run saves in this order, each durable before the next begins: the rows of its CSV files, `best.npz`,
`last.npz`, whose predecessor stays as `previous.npz`.  A checkpoint says what the CSV files held
(`Progress.rows`), so here

1. `last.npz` is taken if it is whole, else the later one of `previous.npz` and `best.npz` that is;
2. rows that are damaged or lost are no reason to take an older one: weights are worth more.  Of such a file
   the rows that an older checkpoint vouches for stay;
3. rows of later steps are dropped: those steps are about to be done again, to the same bits.

What is given up is set aside (`last.npz.damaged`, `steps.csv.damaged`), not written over.

Nothing here trusts a file because it is there, and being cut off here again does no harm.
"""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_device.checkpoint import Checkpoint, FileMark, read_checkpoint, read_meta, write_checkpoint
from lance_device.run_folder import RunFolder
from lance_device.run_record import read_record
from lance_edge.bundle import Bundle
from lance_edge.errors import CheckpointError, DamagedCheckpointError, DataError, StorageError
from lance_edge.files import atomic_writer, file_digest
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
    for path in folder.row_files:
        _expect_writable(path)
    notes: list[str] = []
    checkpoint = _choose(folder, bundle, notes)
    for path in folder.row_files:
        _cut_rows(folder, path, checkpoint, bundle, notes)
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


def _expect_writable(path: Path) -> None:
    """See, before anything is renamed, that a file of rows can be gone on with if it is there."""
    try:
        path.open("r+b").close()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write ({error.strerror or error}), so the run cannot go on; check its permissions"
        ) from None


def _choose(folder: RunFolder, bundle: Bundle, notes: list[str]) -> Checkpoint:
    last = _read(folder.last, bundle, notes)
    if last is not None:
        return last
    whole = {}
    previous = _read(folder.previous, bundle, notes)
    if previous is not None:
        whole[folder.previous] = previous
    best = _read(folder.best, bundle, notes if previous is None else [])
    if best is not None and (previous is None or best.meta.run_id == previous.meta.run_id):
        whole[folder.best] = best
    if not whole:
        raise DamagedCheckpointError(
            f"{folder.path}: no checkpoint here is whole ({'; '.join(notes)}); start a new run with another"
            " --out"
        )
    path = max(whole, key=lambda path: whole[path].meta.step)  # of equal ones the previous
    aside = _set_aside(folder.last)
    kept = f"; last.npz is kept as {aside.name}" if aside is not None else ""
    notes.append(f"going on from {path.name}, step {whole[path].meta.step}{kept}")
    return whole[path]


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


def _begins_with(path: Path, mark: FileMark) -> bool:
    if mark.size <= 0:
        return True
    try:
        return path.stat().st_size >= mark.size and file_digest(path, mark.size).hexdigest() == mark.sha256
    except OSError:
        return False


def _cut_rows(folder: RunFolder, path: Path, checkpoint: Checkpoint, bundle: Bundle, notes: list[str]) -> None:
    """Drop what came after the checkpoint; set a file aside of which what came before is damaged."""
    rows = checkpoint.meta.progress.rows
    if not path.exists() and path.name not in rows:
        return
    if not _begins_with(path, rows.get(path.name, NOTHING)):
        notes.append(_save_rows(folder, path, checkpoint, bundle))
        return
    mark, end = rows.get(path.name, NOTHING), _mark_at_the_end(folder, checkpoint, path.name)
    is_end = end.size > mark.size and _begins_with(path, end)
    _truncate(path, end.size if is_end else max(mark.size, 0))


def _save_rows(folder: RunFolder, path: Path, checkpoint: Checkpoint, bundle: Bundle) -> str:
    """Keep the rows that an older checkpoint vouches for, and the damaged file aside; gives what was lost."""
    name, rows = path.name, checkpoint.meta.progress.rows
    vouched = _vouched_rows(folder, path, checkpoint, bundle)
    if vouched is None:
        del rows[name]
        aside = _set_aside(path)
        problem, see = ("is damaged", f" (see {aside.name})") if aside is not None else ("is missing", "")
        return f"{name} {problem}: its rows up to step {checkpoint.meta.step} are lost{see}"
    step, rows[name] = vouched
    see = ""
    if path.stat().st_size > rows[name].size:  # else it was cut before: by this, or by what damaged it
        aside = path.with_name(f"{name}.damaged")
        with atomic_writer(aside) as copy, path.open("rb") as damaged:
            shutil.copyfileobj(damaged, copy)
        see = f" (see {aside.name})"
        _truncate(path, rows[name].size)
    return f"{name} is damaged: its rows after step {step} are lost{see}"


def _vouched_rows(
    folder: RunFolder, path: Path, checkpoint: Checkpoint, bundle: Bundle
) -> tuple[int, FileMark] | None:
    """The most rows of a damaged file that another checkpoint of the run declares, and up to which step."""
    found = []
    for other in (folder.previous, folder.best):
        with contextlib.suppress(CheckpointError):  # missing, damaged, or of another package
            meta = read_meta(other, bundle)
            mark = meta.progress.rows.get(path.name, NOTHING)
            is_own = meta.run_id == checkpoint.meta.run_id and meta.step <= checkpoint.meta.step
            if is_own and mark.size > 0 and _begins_with(path, mark):
                found.append((meta.step, mark))
    return max(found, key=lambda entry: entry[1].size, default=None)


def _truncate(path: Path, size: int) -> None:
    try:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"{path}: cannot cut it back to {size} bytes ({error.strerror or error}); check the card and its"
            " permissions"
        ) from None


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
