"""Class folders or an `.npz` as training, validation and test parts: the same on host and device::

    root/train/<class>/*  and  root/test/<class>/*     the parts as given
    root/<class>/*                                     a stratified split is made
    file.npz: x uint8 [N, H, W, 3], y [N], and optionally x_test, y_test, classes (names); or x (and
              x_test) float32 [N, ...]: arrays that go to the network unchanged

Membership depends on nothing but names.  Of each class with n images, those with the smallest
`sha256("{seed}:{name}")` are the test part, `round(test_fraction * n)` of them, at least 1, leaving at
least 1 (Python's `round`: halves to even).  Of the n training images of a class, those with the smallest
`sha256("{seed}:validation:{name}")` are the validation part, `round(validation_fraction * n)` of them,
at least 1 of 4 or more unless the fraction is 0.  A name is the path relative to the root, with `/`, in Unicode
NFC; in an `.npz` it is `x[17]`.  Within a part, images stand sorted by name (in an `.npz`, by number):
this is the order of training without shuffling.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.arrays import FloatPart
from lance_edge.errors import DataError
from lance_edge.images import EXTENSIONS, Part, is_image, load_image, visible_entries
from lance_edge.input_spec import Split
from lance_edge.npz_data import ArrayPart, read_npz

LEAST_FOR_VALIDATION = 4  # training images of a class that can spare one whatever the fraction


@dataclass(frozen=True, eq=False)
class FilePart:
    """Images that are files; see `images.Part`."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """One image, upright RGB."""
        return load_image(self.paths[index])

    def select(self, rows: NDArray[np.int64]) -> "FilePart":
        """The part that has these images only."""
        paths = tuple(self.paths[row] for row in rows)
        return FilePart(paths, tuple(self.names[row] for row in rows), self.labels[rows])


AnyPart = FilePart | ArrayPart | FloatPart


@dataclass(frozen=True)
class Dataset:
    """Three disjoint parts; a label is an index into `classes`.  `validation` may be empty."""

    root: Path
    classes: tuple[str, ...]
    train: Part
    validation: Part
    test: Part

    @property
    def array_shape(self) -> tuple[int, ...] | None:
        """Of one float32 array; `None` where the data are images."""
        return self.train.sample_shape if isinstance(self.train, FloatPart) else None


def open_dataset(root: Path, split: Split, classes: Sequence[str] | None = None) -> Dataset:
    """Find the images and divide them; nothing is decoded yet (an `.npz` is read into memory once).

    Args:
        split: seed and fractions; `test_fraction` matters only where the data bring no test part.
        classes: the classes of a package, which the data must have exactly; they give the labels' order.

    Raises:
        DataError: if the data are missing, incomplete, or of other classes.
    """
    found, train, test = _read_folders(root) if _is_folder(root) else read_npz(root)
    agreed = _agree(root, found, classes)
    order = np.array([agreed.index(name) for name in found], np.int64)
    train = replace(train, labels=order[train.labels])
    if test is None:
        _expect_two_of_each(root, agreed, train.labels)
        test, train = _divide(train, split.test_fraction, f"{split.seed}:", at_least_one_of=2)
    else:
        test = replace(test, labels=order[test.labels])
    salt = f"{split.seed}:validation:"
    spare = LEAST_FOR_VALIDATION if split.validation_fraction > 0 else None
    validation, train = _divide(train, split.validation_fraction, salt, at_least_one_of=spare)
    return Dataset(root, agreed, train, validation, test)


def _divide(part: AnyPart, fraction: float, salt: str, at_least_one_of: int | None) -> tuple[AnyPart, AnyPart]:
    """Take a fraction of each class by hash; `(taken, rest)`, each in the order of `part`."""
    taken = np.zeros(len(part), np.bool_)
    for label in np.unique(part.labels):
        rows = np.flatnonzero(part.labels == label)
        count = round(fraction * len(rows))
        if at_least_one_of is not None and len(rows) >= at_least_one_of:
            count = max(count, 1)
        ranked = sorted(rows, key=lambda row: _digest(salt + part.names[row]))
        taken[ranked[: min(count, len(rows) - 1)]] = True
    return part.select(np.flatnonzero(taken)), part.select(np.flatnonzero(~taken))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _agree(root: Path, found: Sequence[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the order of the labels."""
    if len(found) < 2:
        raise DataError(f"{root}: expected two or more classes, found only {found[0]!r}; add the others")
    if classes is None:
        return tuple(found)
    _expect_same_classes(
        str(root),
        classes,
        found,
        "rename or add folders to match the package, or calibrate again on these data",
    )
    return tuple(classes)


def _expect_same_classes(where: str, expected: Iterable[str], found: Iterable[str], remedy: str) -> None:
    missing, unexpected = set(expected) - set(found), set(found) - set(expected)
    if missing or unexpected:
        raise DataError(
            f"{where}: the classes differ: missing {_listed(missing)}; unexpected {_listed(unexpected)};"
            f" {remedy}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _expect_two_of_each(root: Path, classes: Sequence[str], labels: NDArray[np.int64]) -> None:
    for label, count in enumerate(np.bincount(labels, minlength=len(classes))):
        if count < 2:
            raise DataError(
                f"{root}: class {classes[label]!r} has {count} image; expected 2 or more, one to train and one"
                " to test on: add images, or give train/ and test/ folders"
            )


# --- class folders ---


def _is_folder(root: Path) -> bool:
    if root.is_dir():
        return True
    if not root.exists():
        raise DataError(f"{root}: no such folder; give a folder of class folders, or an .npz file")
    if root.suffix.lower() != ".npz":
        raise DataError(f"{root}: expected a folder of class folders or an .npz file, found another file")
    return False


def _read_folders(root: Path) -> tuple[list[str], FilePart, FilePart | None]:
    """Class names, the training part (or everything), and the test part if there is one."""
    has_train, has_test = (root / "train").is_dir(), (root / "test").is_dir()
    if not has_train and not has_test:
        folders = _class_folders(root)
        return list(folders), _read_classes(root, folders), None
    if not has_train or not has_test:
        present, absent = ("train", "test") if has_train else ("test", "train")
        raise DataError(
            f"{root}: found {present}/ but no {absent}/; add it, or give {root / present} to have it split"
        )
    train, test = _class_folders(root / "train"), _class_folders(root / "test")
    _expect_same_classes(str(root / "test"), train, test, "train/ and test/ need the same class folders")
    return list(train), _read_classes(root, train), _read_classes(root, test)


def _class_folders(parent: Path) -> dict[str, Path]:
    """Class name -> folder, sorted by name."""
    entries = visible_entries(parent)
    folders = {_class_name(parent, entry.name): parent / entry.name for entry in entries if entry.is_dir()}
    if not folders:
        images = sum(map(is_image, entries))
        raise DataError(
            f"{parent}: expected a folder for each class, found no folder and {images} images;"
            " move the images of each class into a folder named after it"
        )
    return dict(sorted(folders.items()))


def _class_name(parent: Path, folder: str) -> str:
    """The folder's name; as the name of a class it goes into JSON, so it must be text."""
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{parent}: expected class folders with names in UTF-8, found {folder!r}; rename it"
        ) from None
    return _nfc(folder)


def _read_classes(root: Path, folders: dict[str, Path]) -> FilePart:
    """Every image of the class folders, sorted by name; labels in the order of `folders`."""
    found: list[tuple[str, Path, int]] = []
    for label, folder in enumerate(folders.values()):
        paths = [folder / entry.name for entry in visible_entries(folder) if is_image(entry)]
        if not paths:
            raise DataError(
                f"{folder}: no images in this class folder; expected files that end in {' '.join(EXTENSIONS)}:"
                " add some, or remove the folder"
            )
        found += [(_nfc(path.relative_to(root).as_posix()), path, label) for path in paths]
    found.sort(key=lambda item: item[0])
    names, images, labels = zip(*found, strict=True)
    return FilePart(images, names, np.array(labels, np.int64))


def _nfc(name: str) -> str:
    """The same name on every system: macOS hands out decomposed accents, Linux what was stored."""
    return unicodedata.normalize("NFC", name)
