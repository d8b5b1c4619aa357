"""The networks and images that a study can have: what nobody named and is not there is a row that says so."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lance_edge.datasets import Dataset, FilePart, open_dataset
from lance_edge.errors import DataError, LanceError, ModelError
from lance_edge.images import Part
from lance_edge.input_spec import Split
from lance_host.published import UnreachableError, fetch
from lance_host.reproduce.study import Study
from lance_host.sources import open_source

PAPERS = "imagenet"  # of table 1, where it is there
WHOLE = Split(seed=0, test_fraction=0.25, validation_fraction=0.0)  # as published: all training images train


class AbsentError(LanceError):
    """A data set, or weights, that are not on this machine."""


@dataclass(frozen=True)
class Material:
    """A network with its weights, and images to fine-tune it on.

    `weights` are as `lance-host calibrate --weights` takes them; `None`: those that the network names.
    """

    model: str
    weights: str | None
    dataset: str
    data: Path


def check_named(study: Study, more: tuple[str, ...]) -> None:
    """Refuse networks, places and weights that were named, and are not there or are for nothing.

    Args:
        more: data sets that are taken where they are there, beside those of the study.

    Raises:
        LanceError: naming the first.
    """
    for model in study.models:
        open_source(model)
    for dataset, place in (study.places or {}).items():
        if dataset not in (*study.datasets, *more):
            known = ", ".join((*study.datasets, *more))
            raise LanceError(
                f"--data {dataset}={place}: expected one of {known}, found {dataset}; name it in --datasets,"
                " too"
            )
        if not place.exists():
            raise LanceError(
                f"--data {dataset}={place}: expected a folder or an .npz, found nothing there; correct the path"
            )
    for model, file in (study.weights or {}).items():
        if model not in study.models:
            raise LanceError(
                f"--weights {model}={file}: expected one of {', '.join(study.models)}, found {model}; name it"
                " in --models, too"
            )
        if not Path(file).is_file():
            raise LanceError(f"--weights {model}={file}: expected a file, found none there; correct the path")


def find_material(study: Study, model: str, dataset: str) -> Material:
    """What a cell needs, cut down to the preset's number of images.

    Raises:
        AbsentError: if data or weights are not there.
    """
    weights = find_weights(study, model)
    return Material(model, weights, dataset, sized_data(study, dataset))


def find_weights(study: Study, model: str) -> str | None:
    """The weights of a network: named by the user, or published and to be had.

    The bundled checkpoint is no substitute here: it never saw ImageNet.

    Raises:
        AbsentError: if they cannot be had.
    """
    given = (study.weights or {}).get(model)
    if given is not None:
        return given
    source = open_source(model)
    try:
        if source.provided is not None:
            source.provided()
        elif source.published is not None:
            fetch(source.published, None)
    except UnreachableError as error:
        where = "" if source.published is None else f"{source.published.url}: "
        raise AbsentError(f"no weights: {where}{error} (--weights {model}=FILE names some)") from None
    except ModelError as error:
        raise AbsentError(f"no weights: {error}") from None
    return None


def find_data(study: Study, dataset: str) -> Path:
    """The folder or `.npz` of a data set.

    Raises:
        AbsentError: if it is not there.
    """
    place = (study.places or {}).get(dataset)
    candidates = (
        [place] if place is not None else [study.data_root / dataset, study.data_root / f"{dataset}.npz"]
    )
    for path in candidates:
        if path.exists():
            return path
    looked = " or ".join(map(str, candidates))
    raise AbsentError(f"no images: {looked} is not there (--data {dataset}=FOLDER names another place)")


def sized_data(study: Study, dataset: str, classes: Sequence[str] | None = None, label: str = "") -> Path:
    """A data set with the preset's number of images, and only some of its classes.

    Args:
        classes: to keep; `None`: all.
        label: names the choice of classes.

    Raises:
        AbsentError: if the data set is not there.
    """
    path, size = find_data(study, dataset), study.size
    if classes is None and size.train_images is None and size.test_images is None:
        return path
    try:
        return _cut(study, path, dataset, classes, label)
    except DataError as error:
        raise AbsentError(f"no usable images: {error}") from None


def data_stamp(place: Path) -> str:
    """Eight digits that change with a data set's place, and with the name, size or time of any of its files."""
    place = place.absolute()
    files = [place]
    if place.is_dir():
        walk = os.walk(place, followlinks=True)
        files = [Path(folder, name) for folder, _, names in walk for name in names]
    seen = hashlib.sha256(str(place).encode("utf-8", "surrogateescape"))
    for path in sorted(files):
        try:
            found = path.stat()
        except OSError:  # a dangling link: whoever opens it says so
            continue
        text = f"{path.relative_to(place)} {found.st_size} {found.st_mtime_ns}\n"
        seen.update(text.encode("utf-8", "surrogateescape"))
    return seen.hexdigest()[:8]


def class_names(study: Study, dataset: str) -> tuple[str, ...]:
    """The classes of a data set.

    Raises:
        AbsentError: if it is not there, or is none.
    """
    try:
        return open_dataset(find_data(study, dataset), WHOLE).classes
    except DataError as error:
        raise AbsentError(f"no usable images: {error}") from None


def _cut(study: Study, path: Path, dataset: str, classes: Sequence[str] | None, label: str) -> Path:
    """A folder of links (of an `.npz`, an `.npz`): made once, by renaming what is complete."""
    size, suffix = study.size, path.suffix if path.is_file() else ""
    sizes = (str(size.train_images or ""), str(size.test_images or ""))
    name = "-".join(filter(None, (dataset, label, *sizes, data_stamp(path))))
    cut = study.out.absolute() / "data" / f"{name}{suffix}"
    if cut.exists():
        return cut
    whole = open_dataset(path, WHOLE)
    kept = whole.classes if classes is None else tuple(classes)
    labels = [whole.classes.index(one) for one in kept]
    parts = {
        "train": _some(whole.train, labels, size.train_images),
        "test": _some(whole.test, labels, size.test_images),
    }
    part_file = cut.with_name(f".part-{cut.name}")
    cut.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(whole.train, FilePart):
        shutil.rmtree(part_file, ignore_errors=True)
        _link(part_file, whole, parts)
    else:
        _copy(part_file, whole, parts, kept)
    part_file.rename(cut)
    return cut


def _some(part: Part, labels: Sequence[int], most: int | None) -> Any:
    """Images of these classes, the first of each in a seeded order, `most` in all."""
    each = None if most is None else max(1, most // len(labels))
    generator = np.random.default_rng(0)
    rows = [generator.permutation(np.flatnonzero(part.labels == label))[:each] for label in labels]
    return part.select(np.sort(np.concatenate(rows)))  # type: ignore[attr-defined]


def _link(folder: Path, whole: Dataset, parts: dict[str, Any]) -> None:
    for name, part in parts.items():
        for path, label in zip(part.paths, part.labels, strict=True):
            place = folder / name / whole.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / path.name).symlink_to(path.absolute())


def _copy(file: Path, whole: Dataset, parts: dict[str, Any], kept: Sequence[str]) -> None:
    arrays: dict[str, Any] = {"classes": np.array(kept)}
    for name, suffix in (("train", ""), ("test", "_test")):
        part = parts[name]
        stored = part.pixels if hasattr(part, "pixels") else part.values
        arrays[f"x{suffix}"] = stored[part.rows]
        arrays[f"y{suffix}"] = np.array([list(kept).index(whole.classes[label]) for label in part.labels])
    np.savez(file, **arrays)
