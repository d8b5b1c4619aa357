"""Finding runs: folders of `train` and `bench`, folders of such folders, and CSV files copied from a board."""

import csv
from collections.abc import Sequence
from pathlib import Path

from lance_edge.bench_rows import BenchRow
from lance_edge.errors import DataError
from lance_edge.profiles import HistoryRow, StepRow, columns
from lance_edge.report.views import Files, View

HEADERS = {columns(StepRow): "steps", columns(BenchRow): "steps", columns(HistoryRow): "history"}
RECORD = "run.json"
STEPS, HISTORY = "steps.csv", "history.csv"
EXPECTED = (
    "expected the --out folder of lance-device train or bench, a folder of such folders, or CSV files copied"
    " from one (steps.csv, history.csv)"
)


def open_views(folders: Sequence[Path]) -> tuple[View, ...]:
    """Everything that is measured in these folders, read to its end.

    Raises:
        DataError: if a folder has nothing, or something in it cannot be read.
    """
    found = [files for folder in folders for files in find_files(folder)]
    views = tuple(View(files) for files in _with_distinct_names(found))
    for view in views:
        view.update()
    empty = [view for view in views if view.is_empty]
    if len(empty) == len(views):
        place = empty[0].files.steps or empty[0].files.history
        raise DataError(f"{place}: holds no rows yet; let the run make some steps, then ask again")
    return tuple(view for view in views if not view.is_empty)


def find_files(folder: Path) -> tuple[Files, ...]:
    """The runs in a folder, or in the folders within it.

    Raises:
        DataError: if there are none.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: found {found}; {EXPECTED}")
    runs = _runs_in(folder)
    if not runs:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
        runs = tuple(run for path in inner for run in _runs_in(path))
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
    kinds = {path: _kind(path) for path in sorted(folder.glob("*.csv"))}
    step_files = [path for path, kind in kinds.items() if kind == "steps"]
    history_files = [path for path, kind in kinds.items() if kind == "history"]
    if len(step_files) <= 1 and len(history_files) <= 1 and step_files + history_files:
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
    return HEADERS.get(tuple(header))


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
        path = files.steps or files.history
        name = files.name
        if name in doubled and path is not None:
            name = f"{path.resolve().parent.parent.name}/{name}"
        original, number = name, 2
        while name in taken:
            name, number = f"{original} ({number})", number + 1
        taken.add(name)
        distinct.append(Files(name, files.steps, files.history, files.record))
    return distinct
