"""The cells of a study: packages, runs and benchmarks, each in a place of its own and made once.

The name of a place ends with a digest of everything that decides its content.  So a cell that is finished is
skipped, another claim finds it, one that was broken off is taken up, and other options make another cell.
"""

import contextlib
import csv
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lance_edge.errors import DataError
from lance_edge.files import atomic_writer
from lance_edge.input_spec import Split
from lance_host.build import calibrate
from lance_host.reproduce.device import run_device
from lance_host.reproduce.material import WHOLE, Material, data_stamp
from lance_host.reproduce.study import Study
from lance_host.request import Feedback, Request

CACHE_SIZE = "8GiB"  # features of the 50,000 images of CIFAR, mirrored and not, take 3
EVALUATIONS = 10  # of a run: each passes all test images
MICRO_BATCH = 64  # a workstation has the memory; cached steps take two thirds of their time at 8
STATES = ("last.npz", "previous.npz", "best.npz")  # of a run: with any of them it is gone on with


@dataclass(frozen=True)
class Cells:
    """Makes what is not there yet.

    Attributes:
        used: names of the pieces of work that were asked for, done now or before; their times are a claim's.
        stamps: of data sets, by place; tens of thousands of files are looked at once a claim.
    """

    study: Study
    used: list[str] = field(default_factory=list)
    stamps: dict[Path, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """What all that was asked for took, earlier calls included."""
        known = read_seconds(self.study.out / "cells.json")
        return sum(known.get(name, 0.0) for name in dict.fromkeys(self.used))

    def run_options(self) -> dict[str, list[int]]:
        """`micro_batch` and `threads` of the runs and benchmarks that were asked for, by their first steps."""
        found: dict[str, set[int]] = {"micro_batch": set(), "threads": set()}
        for name in self.used:
            for path in (self.study.out / kind / name / "steps.csv" for kind in ("runs", "benchmarks")):
                if path.exists():
                    with path.open(newline="", encoding="utf-8") as file:
                        row = next(csv.DictReader(file), {})
                    for key, values in found.items():
                        values.update([int(row[key])] if key in row else [])
        return {key: sorted(values) for key, values in found.items() if values}

    def package(self, material: Material, seed: int, **options: Any) -> Path:
        """The package of a calibration; `options` are fields of `Request`."""
        request = Request(
            model=material.model,
            data=material.data,
            output=Path(),
            weights=material.weights,
            batches=self.study.size.batches,
            seed=seed,
            split=WHOLE,
        )
        request = replace(request, **options)
        if material.data not in self.stamps:
            self.stamps[material.data] = data_stamp(material.data)
        name = f"{_label(material)}-{seed}-{digest(_identity(request, self.stamps[material.data]))}.tar"
        path = self.study.out / "packages" / name
        self.used.append(name)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        asked = f"--layers {request.layers}, {', '.join(request.methods)}, ε {request.energy:g}"
        self.study.say(f"calibrating {name} ({asked})")
        with self.timed(name):
            calibrate(replace(request, output=path, threads=self.study.threads), self._feedback())
        return path

    def run(self, material: Material, package: Path, seed: int, **words: Any) -> Path:
        """The folder of a finished training run; `words` are options of `lance-device train`."""
        epochs = words.get("epochs", self.study.size.epochs)
        own = {"epochs": epochs, "eval_every": max(1, epochs // EVALUATIONS), "seed": seed, "lr": self.study.lr}
        decay = {"weight_decay": self.study.weight_decay} if self.study.weight_decay else {}
        words = {**own, **decay, "micro_batch": MICRO_BATCH, **words}
        method = f"{words.get('method') or 'default'}-{words.get('layers', '')}"
        name = f"{_label(material)}-{seed}-{method}-{digest([package.name, words])}"
        folder = self.study.out / "runs" / name
        self.used.append(name)
        if is_finished(folder):
            self.study.say(f"trained before: {name}")
            return folder
        self.study.say(f"training {name}")
        goes_on = any((folder / state).exists() for state in STATES)  # and keeps the threads that it has
        places = {
            "artifact": package,
            "data": material.data,
            "out": folder,
            "resume_or_start": True,
            "threads": None if goes_on else self.study.threads,
            "cache_dir": self.study.out / "features",
            "cache_size": CACHE_SIZE,
        }
        with self.timed(name):
            run_device({**places, **words}, "train", folder.with_name(f"{name}.log"), self.study.say)
        return folder

    def bench(self, package: Path, **words: Any) -> Path:
        """The folder of a finished benchmark; one that was broken off is made anew."""
        name = f"{package.stem}-{words.get('layers', '')}-{digest([package.name, words])}"
        folder = self.study.out / "benchmarks" / name
        self.used.append(name)
        if is_finished(folder):
            self.study.say(f"measured before: {name}")
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        tries = sum(1 for _ in folder.parent.glob(f".{name}*"))
        if folder.exists():
            folder.rename(folder.with_name(f".{name}-{tries}"))
        self.study.say(f"measuring {name}")
        with self.timed(name):
            places = {"artifact": package, "out": folder, "threads": self.study.threads}
            run_device({**places, **words}, "bench", folder.with_name(f"{name}.log"), self.study.say)
        return folder

    def numbers(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `measure` gives, kept under a name that says everything that decides it."""
        path = self.study.out / "numbers" / f"{name}.json"
        self.used.append(name)
        if path.exists():
            return {str(key): float(value) for key, value in json.loads(path.read_text()).items()}
        with self.timed(name):
            found = measure()
        with atomic_writer(path) as file:
            file.write((json.dumps(found) + "\n").encode())
        return found

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of some work to `cells.json`, however it ends: a cell may take several attempts."""
        began = time.monotonic()
        try:
            yield
        finally:
            path = self.study.out / "cells.json"
            seconds = read_seconds(path)
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 3)
            with atomic_writer(path) as file:
                file.write((json.dumps(seconds, indent=1) + "\n").encode())

    def _feedback(self) -> Feedback:
        return Feedback(say=lambda text: self.study.say(f"  {text}"), progress=lambda name, done, total: None)


def read_seconds(path: Path) -> dict[str, float]:
    """How long each cell took, by name; empty before the first."""
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot read ({error}); remove it: only durations are lost") from None


def is_finished(folder: Path) -> bool:
    """Whether a run or benchmark went to its end."""
    return bool(read_run_json(folder).get("status") == "finished")


def read_run_json(folder: Path) -> Mapping[str, Any]:
    """The `run.json` of a folder; empty where there is none, or a torn one."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def digest(value: Any) -> str:
    """Eight digits that change with any part of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _identity(request: Request, data: str) -> dict[str, Any]:
    """Everything of a request that decides the package; of a file of weights its content, not its place.

    Args:
        data: the stamp of the images.
    """
    values = {name: value for name, value in vars(request).items() if name not in ("output", "threads")}
    weights = request.weights
    if isinstance(weights, str) and Path(weights).is_file():
        values["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    split: Split = request.split
    return {
        **values,
        "data": data,
        "split": vars(split),
        "budgets": dict(request.budgets),
    }


def _label(material: Material) -> str:
    return f"{Path(material.model).stem.replace(':', '-')}-{material.dataset}"
