"""Whether features are kept on disk, where, and how many of which images."""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lance_device.cache import RESERVE_BYTES, CacheUnavailable, Layout, RecordFile, remove_unused
from lance_device.features import CachedFeatures, ComputedFeatures, Features, Note, Packing, Shelf
from lance_device.options import TrainOptions
from lance_device.run_record import describe_software
from lance_device.session import Graph
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset, FilePart
from lance_edge.images import Part
from lance_edge.input_spec import ArrayInput, InputSpec
from lance_edge.manifest import Variant
from lance_edge.records import to_json
from lance_edge.units import size

OWN_FILE = "features.cache"  # in the run's folder
SHARED_FILE = "features-{key}.cache"  # in --cache-dir
VIEWS = {"none": 1, "flip": 2}  # of an image, by augmentation; of others there is no end, or no knowing
LEAST_SHARE = 0.1  # auto: less of the features is not worth their rounding


@dataclass(frozen=True)
class PartPlan:
    """What is kept of one part.

    Attributes:
        views: features of an image that this run asks for: 2 where it may be mirrored.
        visits: how often the run asks for an image.
    """

    name: str
    part: Part
    views: int
    visits: float

    @property
    def records(self) -> int:
        """Records that this run can use."""
        return self.views * len(self.part)


@dataclass(frozen=True)
class CachePlan:
    """What there is to keep, and where.

    Attributes:
        path: the file.
        is_own: it lies in the run's folder and serves this run alone.
        identity: whose features the file holds, but for the images' own.
        limit_bytes: of `--cache-size`; of all files in a shared folder together.
        obstacle: why features cannot be kept at all, or nothing.
    """

    path: Path
    is_own: bool
    identity: Mapping[str, Any]
    packing: Packing
    parts: tuple[PartPlan, ...]
    limit_bytes: int
    obstacle: str

    @property
    def layout(self) -> Layout:
        """The file's; every training image has a slot for each of its two views, whoever uses the file."""
        slots = sum(len(plan.part) * views for plan, views in self._with_views())
        return Layout(self.identity, slots, 2 * self.packing.elements)

    def worth_keeping(self) -> list[PartPlan]:
        """The parts that are asked for more than once, most often asked for first.

        Files that later runs share are worth it in any case.
        """
        parts = (plan for plan in self.parts if plan.visits > 1 or not self.is_own)
        return sorted(parts, key=lambda plan: plan.visits / plan.views, reverse=True)

    @property
    def wanted(self) -> int:
        """Records that are worth keeping."""
        return sum(plan.records for plan in self.worth_keeping())

    def shelves(self, file: RecordFile | None, capacity: int) -> dict[Part, Shelf]:
        """Where the records of each part stand, and how many may be added to those that are there."""
        rooms: dict[str, int] = {}
        for plan in self.worth_keeping():
            rooms[plan.name] = min(plan.records, capacity)
            capacity -= rooms[plan.name]
        shelves, first = {}, 0
        for plan, views in self._with_views():
            end = first + views * len(plan.part)
            held = int(file.holds(np.arange(first, end, views // plan.views)).sum()) if file else 0
            shelves[plan.part] = Shelf(first, views, max(0, rooms.get(plan.name, 0) - held))
            first = end
        return shelves

    def _with_views(self) -> Iterator[tuple[PartPlan, int]]:
        for plan in self.parts:
            yield plan, max(VIEWS.values()) if plan.name == "train" else 1


def plan_cache(
    options: TrainOptions, total_steps: int, bundle: Bundle, variant: Variant, dataset: Dataset, folder: Path
) -> CachePlan:
    """What a run could keep.

    Args:
        folder: of the run.
    """
    manifest = bundle.manifest
    sha256 = {member.name: member.sha256 for member in manifest.members}
    identity = {
        "prefix": variant.prefix_sha256 or [sha256[member] for member in variant.graphs.get("prefix", ())],
        "preprocessing": to_json(manifest.preprocessing),
        "tensors": [[spec.name, list(spec.shape)] for spec in variant.boundary],
        "dtype": "float16",
    }
    shared = Path(options.cache_dir) if options.cache_dir is not None else None
    key = hashlib.sha256(json.dumps([identity, str(dataset.root.resolve())]).encode()).hexdigest()[:12]
    return CachePlan(
        path=folder / OWN_FILE if shared is None else shared / SHARED_FILE.format(key=key),
        is_own=shared is None,
        identity=identity | {"software": _software()},
        packing=Packing(variant.boundary),
        parts=_part_plans(options, total_steps, manifest.batch_size, dataset),
        limit_bytes=options.cache_size,
        obstacle=_obstacle(options, variant, manifest.preprocessing),
    )


def choose(plan: CachePlan, wanted: str) -> tuple[str, str]:
    """`on` or `off` for `auto`, `on` or `off`; and why, for people."""
    if wanted == "off":
        return "off", "as asked for"
    if plan.obstacle:
        return "off", plan.obstacle if wanted == "auto" else f"--cache on cannot be done: {plan.obstacle}"
    if wanted == "on":
        return "on", "as asked for"
    if not plan.wanted:
        return "off", "every image is seen only once"
    room = plan.layout.capacity(_available_bytes(plan))
    if room < LEAST_SHARE * plan.wanted:
        free = size(_free_bytes(plan.path))
        return "off", (
            f"{room} of {plan.wanted} features would fit: --cache-size {size(plan.limit_bytes)}, {free} free"
            f" on the disk, of which {size(RESERVE_BYTES)} stay free"
        )
    return "on", f"images are seen {plan.parts[0].visits:.3g} times" if plan.is_own else "runs share it"


def open_features(
    plan: CachePlan, options: TrainOptions, prefix: Graph, dataset: Dataset, note: Note
) -> Features:
    """The features of a run, from its cache if its options say so; what is wrong with a cache is a note."""
    if options.cache == "off":
        return ComputedFeatures(prefix)
    plan = replace(plan, identity={**plan.identity, "images": source_identity(dataset)})
    available = _available_bytes(plan) if plan.is_own else _make_room(plan, note)
    file = None
    try:
        file = RecordFile(plan.path, plan.layout, available)
    except CacheUnavailable as reason:
        note(f"{reason}; this run computes its features")
    shelves = plan.shelves(file, plan.layout.capacity(available))
    if file is not None:
        _describe(plan, file, shelves, note)
    return CachedFeatures(prefix, plan.packing, shelves, file, note)


def source_identity(dataset: Dataset) -> str:
    """SHA-256 of what tells the image files of all parts: names, sizes, times of their last change."""
    digest = hashlib.sha256()
    for part in (dataset.train, dataset.validation, dataset.test):
        paths = part.paths if isinstance(part, FilePart) else (dataset.root,)
        for name in part.names:
            digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        for path in paths:
            digest.update(_stamp(path).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _describe(plan: CachePlan, file: RecordFile, shelves: Mapping[Part, Shelf], note: Note) -> None:
    if file.stale:
        note(f"{plan.path}: emptied, its {', '.join(file.stale)} differ from this run's")
    added = min(file.room, sum(shelf.room for shelf in shelves.values()))
    note(
        f"{plan.path}: holds {file.held} of {plan.wanted} features of {size(2 * plan.packing.elements)} each,"
        f" has room for {added} more"
    )


def _make_room(plan: CachePlan, note: Note) -> int:
    """How long a shared file may become, after files of the folder that nobody uses were removed for it."""
    needed = plan.layout.nbytes(plan.wanted)
    others = [path for path in plan.path.parent.glob(SHARED_FILE.format(key="*")) if path != plan.path]
    total = sum(map(_file_bytes, others))
    for path in sorted(others, key=_last_used):
        if total + needed > plan.limit_bytes and remove_unused(path):
            note(f"{path}: removed, to stay within --cache-size {size(plan.limit_bytes)}")
            total = sum(map(_file_bytes, others))
    return min(_available_bytes(plan), max(0, plan.limit_bytes - total))


def _available_bytes(plan: CachePlan) -> int:
    """How long the file may become by `--cache-size`, and by what the disk has free beyond the reserve."""
    free = _free_bytes(plan.path) + _file_bytes(plan.path) - RESERVE_BYTES
    return max(0, min(plan.limit_bytes, free))


def _free_bytes(path: Path) -> int:
    """Of the disk on which `path` is, or will be."""
    for folder in path.absolute().parents:
        with suppress(OSError):  # it is not made yet
            disk = os.statvfs(folder)
            return disk.f_bavail * disk.f_frsize
    return 0


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _part_plans(
    options: TrainOptions, total_steps: int, batch_size: int, dataset: Dataset
) -> tuple[PartPlan, ...]:
    epochs = total_steps * batch_size / len(dataset.train)
    evaluations = 1 + (math.ceil(epochs) - 1) // options.eval_every if options.eval_every else 1
    return (
        PartPlan("train", dataset.train, VIEWS.get(options.augment, 1), epochs),
        PartPlan("validation", dataset.validation, 1, evaluations),
        PartPlan("test", dataset.test, 1, evaluations),
    )


def _obstacle(options: TrainOptions, variant: Variant, preprocessing: InputSpec) -> str:
    if options.augment not in VIEWS:
        return f"with --augment {options.augment} an image never looks the same twice"
    is_input = [spec.shape for spec in variant.boundary] == [("N", *preprocessing.sample_shape)]
    if is_input and isinstance(preprocessing, ArrayInput):
        return "nothing is frozen: the features would be the arrays themselves"
    return Packing(variant.boundary).obstacle


def _software() -> dict[str, str]:
    """What decodes images and runs the prefix."""
    versions = describe_software()["versions"]
    names = ("lance-edge", "numpy", "onnxruntime", "pillow")
    return {name: versions[name] for name in names} | {"machine": platform.machine()}


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # whoever reads the image says so
        return "-"
    return f"{found.st_size} {found.st_mtime_ns}\n"
