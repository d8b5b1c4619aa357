"""What a benchmark leaves on disk: a record for every task that was learnt, in folders that say of what.

out/split-cifar10-alexnet-quick/settings.json        what all runs below have in common
out/split-cifar10-alexnet-quick/lance/seed-0/task-1/record.json
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lance_edge.errors import LanceError
from lance_edge.files import atomic_writer
from lance_edge.records import RecordError, from_json, to_json

SCHEMA_VERSION = 1
RECORD, SETTINGS, STATE, CARRY = "record.json", "settings.json", "state.safetensors", "carry.npz"
PACKAGE, TRAINED = "pkg.tar", "trained.npz"  # of methods that train in the engine


@dataclass(frozen=True)
class Settings:
    """What the results of an output folder depend on, beside method and seed.

    Attributes:
        lr, gpm_lr: learning rates; GPM's own may differ.
        batch_norm: `running` statistics, frozen after task 1, or those of the `batch`, also at test.
        dropout: whether the networks' dropout is on while they train.
        data: digests of the data sets, in the order of the tasks; see `image_sets.digest_of`.
    """

    benchmark: str
    network: str
    preset: str
    epochs: int
    lr: float
    gpm_lr: float
    per_class: tuple[int, ...]
    batch_norm: str
    dropout: bool
    tasks: tuple[str, ...]
    data: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def folder(self) -> str:
        """Name of the folder of these results."""
        network = re.sub(r"[^\w-]+", "-", Path(self.network).name)
        plain = f"{self.benchmark}-{network}-{self.preset}"
        return plain if self.batch_norm == "running" else f"{plain}-batch-statistics"


@dataclass(frozen=True)
class TaskRecord:
    """A method learnt a task (or, jointly, all of them).

    Attributes:
        after: number of the task, from 0.
        accuracies: on the test images of this task and all before it, in order.
        epochs: until the schedule ended, or the most that were allowed.
        lr: learning rate at the start: that of the settings, or less where the numbers ran away with it.
        ranks: of the protected subspace by layer, where there is one.
        kept_bytes: what is kept from task to task, by kind; `weights` are the network with its newest head.
        activation_bytes: of the trained layers at the batch size, as the paper counts them.
        seconds: on this machine.
    """

    method: str
    seed: int
    after: int
    task: str
    accuracies: tuple[float, ...]
    epochs: int
    lr: float
    activation_bytes: int
    seconds: float
    ranks: dict[str, int] = field(default_factory=dict)
    kept_bytes: dict[str, int] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def bytes_beside(self) -> int:
        """What is kept beside the network as it is used."""
        return sum(count for kind, count in self.kept_bytes.items() if kind != "weights")


def keep_settings(folder: Path, settings: Settings) -> None:
    """Write `settings.json`, or see that the results that are there have the same.

    Raises:
        LanceError: naming the first setting that differs.
    """
    path = folder / SETTINGS
    stored = _read(path)
    if stored is None:
        _write(path, to_json(settings))
        return
    wanted = json.loads(json.dumps(to_json(settings)))
    for name in wanted:
        if stored.get(name) == wanted[name]:
            continue
        if name == "data":
            raise LanceError(
                f"{path}: these results were made with other images than those below --data now (digests"
                f" {stored.get(name, 'unknown')}, not {wanted[name]}); give the same data to go on, or another"
                " --out"
            )
        raise LanceError(
            f"{path}: these results were made with {name} {stored.get(name)!r}, not {wanted[name]!r}; give"
            " the same options to go on, or another --out"
        )


def task_folder(folder: Path, label: str, seed: int, after: int) -> Path:
    """Of one task of one run."""
    return folder / label / f"seed-{seed}" / f"task-{after + 1}"


def write_record(folder: Path, record: TaskRecord) -> None:
    """The last file of a task: where it is, the task was learnt.

    Raises:
        StorageError: if it cannot be written.
    """
    _write(folder / RECORD, to_json(record))


def read_record(folder: Path) -> TaskRecord | None:
    """The record of a task, `None` where it was not learnt.

    Raises:
        LanceError: if it is damaged.
    """
    value = _read(folder / RECORD)
    if value is None:
        return None
    try:
        return from_json(TaskRecord, value)
    except RecordError as error:
        raise LanceError(
            f"{folder / RECORD}: damaged ({error}); remove the folder: its task is learnt again"
        ) from None


def read_records(folder: Path) -> dict[str, list[TaskRecord]]:
    """All records below a folder of results, by method, in the order of seeds and tasks."""
    found = [
        record for path in folder.glob(f"*/seed-*/task-*/{RECORD}") if (record := read_record(path.parent))
    ]
    ordered = sorted(found, key=lambda record: (record.method, record.seed, record.after))
    return {name: [r for r in ordered if r.method == name] for name in dict.fromkeys(r.method for r in ordered)}


def _read(path: Path) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LanceError(f"{path}: not readable ({error}); remove it and what is beside it") from None
    if not isinstance(value, dict):
        raise LanceError(f"{path}: expected a JSON object, found {type(value).__name__}; remove it")
    return value


def _write(path: Path, value: Mapping[str, object]) -> None:
    with atomic_writer(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
