"""Finding runs: folders of `train` and `bench`, folders of such folders, and CSV files copied from a board."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lance_edge.errors import DataError
from lance_edge.profiles import HistoryRow, StepRow, columns
from lance_edge.report.views import Files, View

FIRST_COLUMNS = 3  # tell what a file holds, whichever version wrote it
KINDS = {columns(StepRow)[:FIRST_COLUMNS]: "steps", columns(HistoryRow)[:FIRST_COLUMNS]: "history"}
RECORD = "run.json"
STEPS, HISTORY = "steps.csv", "history.csv"
EXPECTED = (
    "expected the --out folder of lance-device train or bench, a folder of such folders, or CSV files copied"
    " from one (steps.csv, history.csv)"
)


def open_views(folders: Sequence[Path], note: Callable[[str], None] = lambda text: None) -> tuple[View, ...]:
    """Everything that is measured in these folders, read to its end.

    Args:
        note: is told of each run that is left out, as it is damaged or empty.

    Raises:
        DataError: if a folder has nothing, or nothing that can be read.
    """
    found = [files for folder in folders for files in find_files(folder)]
    left_out: list[tuple[str, DataError]] = []
    views = tuple(_readable([View(files) for files in _with_distinct_names(found)], left_out))
    if not views:
        raise left_out[0][1]
    for text, _ in left_out:
        note(text)
    return views


def _readable(views: Sequence[View], left_out: list[tuple[str, DataError]]) -> Iterator[View]:
    """Those with rows; of the others, what a report says of them, and the error if there is nothing else."""
    for view in views:
        try:
            view.update()
        except DataError as error:
            left_out.append((f"{view.name} was left out, as it cannot be read: {error}.", error))
            continue
        if not view.is_empty:
            yield view
            continue
        status = f" (status {_how_it_stands(view)})" if view.status is not None else ""
        empty = DataError(
            f"{_place(view.files)}: holds no rows yet; let the run make some steps, then ask again"
        )
        left_out.append((f"{view.name} holds no rows{status} and was left out.", empty))


def _how_it_stands(view: View) -> str:
    message = view.fact("message")
    return f"{view.status}: {message}" if message else str(view.status)


def _place(files: Files) -> Path | None:
    return files.steps or files.history or files.record


def find_files(folder: Path) -> tuple[Files, ...]:
    """The runs in a folder, or in the folders within it.

    Raises:
        DataError: if there are none.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: found {found}; {EXPECTED}")
    runs = _runs_in(folder)
    if not any(files.steps or files.history for files in runs):
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))
        runs = tuple(run for path in inner for run in _runs_in(path)) or runs
    if not runs:
        raise DataError(f"{folder}: no run and no benchmark in it; {EXPECTED}")
    return runs


def _runs_in(folder: Path) -> tuple[Files, ...]:
    """By their names, else by what stands in the first line of each CSV file."""
    record = folder / RECORD
    existing_record = record if record.is_file() else None
    steps, history = folder / STEPS, folder / HISTORY
    if steps.is_file() or (history.is_file() and existing_record):
        return (Files(_name(folder), _existing(steps), _existing(history), existing_record),)
    kinds = {path: _kind(path) for path in sorted(folder.glob("*.csv")) if not _is_hidden(path)}
    step_files = [path for path, kind in kinds.items() if kind == "steps"]
    history_files = [path for path, kind in kinds.items() if kind == "history"]
    files = (*step_files, *history_files)
    if len(step_files) <= 1 and len(history_files) <= 1 and (files or existing_record):
        own = (next(iter(step_files), None), next(iter(history_files), None))
        return (Files(_name(folder), *own, existing_record),)
    return tuple(
        Files(_run_name(path), path, _companion(path, history_files), None) for path in step_files
    ) + tuple(Files(_run_name(path), None, path, None) for path in _alone(history_files, step_files))


def _companion(steps: Path, history_files: Sequence[Path]) -> Path | None:
    """The history that is called like these steps: steps-bp.csv, history-bp.csv."""
    return next((path for path in history_files if _core(path) == _core(steps)), None)


def _alone(history_files: Sequence[Path], step_files: Sequence[Path]) -> list[Path]:
    taken = {_core(path) for path in step_files}
    return [path for path in history_files if _core(path) not in taken]


def _core(path: Path) -> str:
    return path.stem.lower().replace("steps", "").replace("history", "").strip("-_ .")


def _run_name(path: Path) -> str:
    return _core(path) or path.stem


def _kind(path: Path) -> str | None:
    """What its header says; `None` for other files."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader([file.readline(1 << 14)]), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    return KINDS.get(tuple(header[:FIRST_COLUMNS]))


def _is_hidden(path: Path) -> bool:
    """As the trash of a system is, or what it keeps beside a file (`._steps.csv`)."""
    return path.name.startswith(".")


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _name(folder: Path) -> str:
    return folder.resolve().name or "run"


def _with_distinct_names(found: Sequence[Files]) -> list[Files]:
    """Runs of one name are told apart by the folder around them, then by a number."""
    names = [files.name for files in found]
    doubled = {name for name in names if names.count(name) > 1}
    distinct: list[Files] = []
    taken: set[str] = set()
    for files in found:
        path = _place(files)
        name = files.name
        if name in doubled and path is not None:
            name = f"{path.resolve().parent.parent.name}/{name}"
        original, number = name, 2
        while name in taken:
            name, number = f"{original} ({number})", number + 1
        taken.add(name)
        distinct.append(Files(name, files.steps, files.history, files.record))
    return distinct
