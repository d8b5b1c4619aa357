"""Cutting the power: killing a real run at a random moment, and a disk that forgets what was not synced."""

import json
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
from device_harness import arrays, assert_same_arrays, spawn, table

from lance_device.run_log import RunLog

# What a clock, a thermometer or chance decides: everything else is the same in every run of these arguments.
# `cached` tells what a measurement is of: after a break, features that were kept need not be computed again.
MEASURED = (
    *("latency_ms", "rss_kib", "peak_rss_kib", "temperature_c", "arm_mhz", "time_s"),
    *("run_id", "warmup", "cached"),
)
MEASURED_META = ("run_id", "seconds", "rows")

# A killer within the process: SIGKILL at the n-th call into the operating system that changes a file: a
# checkpoint, a CSV file, the cache of features, a name.  With n = 0 it only counts.
KILLER = """
import atexit, os, signal, sys
import lance_device.train
class Killer:
    NAMES = {{"write", "pwrite", "fsync", "replace", "link", "unlink", "truncate", "ftruncate", "flush"}}
    def __init__(self, event, count):
        self.event, self.count, self.seen = event, count, 0
    def __call__(self, frame, event, argument):
        if event == self.event and argument.__name__ in self.NAMES:
            self.seen += 1
            if self.seen == self.count:
                os.kill(os.getpid(), signal.SIGKILL)
killer = Killer({event!r}, {count})
atexit.register(lambda: print("calls", killer.seen))
sys.setprofile(killer)
"""


def count_calls(words: tuple[Any, ...]) -> int:
    """How often a whole run of `lance-device` changes a file."""
    process = spawn(*words, prelude=KILLER.format(event="c_call", count=0))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return int(output.splitlines()[-1].removeprefix("calls "))


def run_until_killed(words: tuple[Any, ...], chance: random.Random, calls: int, seconds: float) -> bool:
    """Run `lance-device` and kill it: half of the times at one of its first `calls` calls that change a file,
    half of the times within `seconds` after it began to train.  Whether it was killed before it was done."""
    if chance.random() < 0.5:
        event = chance.choice(["c_call", "c_return"])
        process = spawn(*words, prelude=KILLER.format(event=event, count=chance.randint(1, calls)))
        _, errors = process.communicate(timeout=120)
    else:
        process = spawn(*words)
        first = process.stderr.readline()  # the handlers are set, the first files are written
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        errors = first + process.communicate(timeout=120)[1]
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights, momentum, progress, rows: as if the run had never been cut off."""
    for name in ("last.npz", "best.npz"):
        assert_same_arrays(found / name, expected / name)
        assert _meta(found / name) == _meta(expected / name), name
    for name in ("steps.csv", "history.csv"):
        assert rows_of(found / name) == rows_of(expected / name), name
    saved = _saved_states(found / "steps.csv")
    assert len(saved) == len(set(saved)), "a checkpoint's row stands twice"
    assert (found / "split.csv").read_bytes() == (expected / "split.csv").read_bytes()
    assert json.loads((found / "run.json").read_text())["status"] == "finished"
    left = {file.name for file in found.iterdir()}
    assert not [name for name in left if name.startswith(".") or name == "features.cache"]


def _saved_states(path: Path) -> list[tuple[str, int]]:
    """Step and evaluations before, of each checkpoint's row: a stop before an evaluation saves a step twice."""
    rows, evaluations, saved = table(path), 0, []
    for row in rows:
        evaluations += row["phase"] == "eval"
        if row["phase"] == "checkpoint":
            saved.append((row["step"], evaluations))
    return saved


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of steps and evaluations without what is measured.

    What a checkpoint cost is known only after it was written: a process killed in between never tells, so
    those rows are left out here.
    """
    kept = (row for row in table(path) if row.get("phase") != "checkpoint")
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in kept]


def _meta(path: Path) -> dict[str, Any]:
    with np.load(path) as archive:
        meta = json.loads(str(archive["meta"]))
    flat = {**meta, **meta["progress"]}
    return {key: value for key, value in flat.items() if key not in (*MEASURED_META, "progress")}


def same_weights(found: Path, expected: Path) -> bool:
    a, b = arrays(found), arrays(expected)
    return a.keys() == b.keys() and all(np.array_equal(value, b[name]) for name, value in a.items())


class _File:
    """A file that hands everything on and tells the disk what was written where."""

    def __init__(self, disk: "ForgetfulDisk", file: Any, inode: int, appends: bool) -> None:
        self._disk, self._file, self._inode, self._appends = disk, file, inode, appends

    def write(self, data: Any) -> int:
        raw = bytes(data)
        offset = os.fstat(self._file.fileno()).st_size if self._appends else self._file.tell()
        self._disk.record("write", self._inode, offset, raw)
        return self._file.write(data)

    def truncate(self, size: int) -> int:
        self._disk.record("truncate", self._inode, size)
        return self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()


class ForgetfulDisk:
    """Records what a run does to its folder; `crash` gives what a power cut could leave of it.

    The model is the one that POSIX promises: data are durable when their file was synced, names when their
    folder was; of everything since then any part may have reached the disk, and of a write any part.
    """

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.operations: list[tuple[Any, ...]] = []
        self._folder = folder
        self._serials: dict[int, int] = {}  # an inode's number comes again when its file is gone
        self._durable = {file.name: file.read_bytes() for file in folder.glob("*")}
        self._real_open, self._real_fsync = Path.open, os.fsync
        self._real_os_open, self._real_pwrite, self._real_ftruncate = os.open, os.pwrite, os.ftruncate
        monkeypatch.setattr(Path, "open", lambda *words, **options: self._open(*words, **options))
        monkeypatch.setattr(os, "fsync", self._fsync)
        for name in ("open", "pwrite", "ftruncate"):  # the cache of features
            monkeypatch.setattr(os, name, getattr(self, f"_os_{name}"))
        for name in ("replace", "hardlink_to", "unlink"):
            self._watch(name, getattr(Path, name), monkeypatch)
        checkpoint = RunLog.checkpoint
        monkeypatch.setattr(RunLog, "checkpoint", lambda log, cost: self._saved(log) or checkpoint(log, cost))

    def record(self, *operation: Any) -> None:
        self.operations.append(operation)

    def _saved(self, log: RunLog) -> None:
        self.record("saved", log._run.progress.step)

    def _watch(self, name: str, real: Any, monkeypatch: Any) -> None:
        def call(path: Path, *words: Any, **options: Any) -> Any:
            is_mine = path.parent == self._folder and (name == "hardlink_to" or path.exists())
            result = real(path, *words, **options)
            if is_mine:
                self.record(name, path.name, *(word.name for word in words))
            return result

        monkeypatch.setattr(Path, name, call)

    def _open(self, path: Path, mode: str = "r", *words: Any, **options: Any) -> Any:
        is_new = not path.exists()
        file = self._real_open(path, mode, *words, **options)
        if path.parent != self._folder or mode in ("r", "rb"):
            return file
        serial = self._opened(path, file.fileno(), is_new)
        return _File(self, file, serial, mode.startswith("a"))

    def _os_open(self, path: Any, flags: int, *words: Any) -> int:
        is_new = not Path(path).exists()
        descriptor = self._real_os_open(path, flags, *words)
        if Path(path).parent == self._folder and flags & os.O_RDWR:
            self._opened(Path(path), descriptor, is_new)
        return descriptor

    def _opened(self, path: Path, descriptor: int, is_new: bool) -> int:
        number = os.fstat(descriptor).st_ino
        if is_new or number not in self._serials:
            self._serials[number] = len(self._serials) + len(self.operations)
            self.record("create" if is_new else "found", path.name, self._serials[number])
        return self._serials[number]

    def _os_pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self.record("write", self._serials[os.fstat(descriptor).st_ino], offset, bytes(data))
        return self._real_pwrite(descriptor, data, offset)

    def _os_ftruncate(self, descriptor: int, size: int) -> None:
        self.record("truncate", self._serials[os.fstat(descriptor).st_ino], size)
        self._real_ftruncate(descriptor, size)

    def _fsync(self, descriptor: int) -> None:
        state = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(state.st_mode)
        if not is_folder:
            self.record("sync", self._serials.get(state.st_ino))
        elif os.path.samestat(state, os.stat(self._folder)):  # noqa: PTH116
            self.record("sync folder", "")
        self._real_fsync(descriptor)

    def promised_step(self, moment: int) -> int:
        """The step whose checkpoint was complete, so that nothing may lose it."""
        return max((step for kind, step, *_ in self.operations[:moment] if kind == "saved"), default=0)

    def crash(self, moment: int, chance: random.Random, folder: Path) -> None:
        """Write into `folder` what is left when the power fails after so many operations."""
        contents: dict[Any, bytearray] = {name: bytearray(data) for name, data in self._durable.items()}
        unsynced: dict[Any, list[tuple[Any, ...]]] = {}
        names: dict[str, Any] = {name: name for name in self._durable}
        pending: list[tuple[Any, ...]] = []  # changes of names since the folder was synced
        for operation in self.operations[:moment]:
            kind = operation[0]
            if kind in ("write", "truncate"):
                unsynced.setdefault(operation[1], []).append(operation)
            elif kind == "sync":
                for late in unsynced.pop(operation[1], []):
                    _apply(contents, late)
            elif kind == "found":
                contents[operation[2]] = contents.pop(names[operation[1]])
                names = {name: operation[2] if name == operation[1] else key for name, key in names.items()}
            elif kind == "saved":
                continue
            elif kind == "sync folder":
                for change in pending:
                    _rename(names, change)
                pending = []
            else:
                pending.append(operation)
        _lose_some(contents, unsynced, chance)
        for change in pending:
            if chance.random() < 0.5:
                _rename(names, change)
        folder.mkdir()
        for name, inode in names.items():
            (folder / name).write_bytes(contents.get(inode, b""))


def _lose_some(contents: dict[int, bytearray], unsynced: dict[int, list[tuple[Any, ...]]], chance: Any) -> None:
    for inode in unsynced:
        for operation in unsynced[inode]:
            kind, _, position, *data = operation
            fate = chance.choice(["lost", "kept", "torn"])
            if fate == "torn" and kind == "write":
                operation = (kind, inode, position, data[0][: chance.randint(0, len(data[0]))])
            if fate != "lost":
                _apply(contents, operation)


def _apply(contents: dict[int, bytearray], operation: tuple[Any, ...]) -> None:
    kind, inode, position, *data = operation
    content = contents.setdefault(inode, bytearray())
    if kind == "truncate":
        del content[position:]
        content.extend(bytes(position - len(content)))
    else:
        content.extend(bytes(max(0, position - len(content))))  # a hole is zeros
        content[position : position + len(data[0])] = data[0]


def _rename(names: dict[str, int], change: tuple[Any, ...]) -> None:
    """Apply a change of names, as far as what it needs is there."""
    kind, name, *other = change
    if kind == "create":
        names[name] = other[0]
    elif kind == "replace" and name in names:
        names[other[0]] = names.pop(name)
    elif kind == "hardlink_to" and other[0] in names:
        names[name] = names[other[0]]
    elif kind == "unlink":
        names.pop(name, None)
