"""A data set as a run has put it on record: the same images in the same parts, be they still there or not."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lance_edge.datasets import Dataset, FilePart
from lance_edge.errors import DataError
from lance_edge.images import visible_entries


def recorded_dataset(root: Path, classes: Sequence[str], entries: Iterable[tuple[str, str, str]]) -> Dataset:
    """The image files of these names, without a look at what else is in the folder.

    Args:
        entries: name (as `Dataset` gives it), class and part of each image, in the order of the parts.
    """
    files = _Files(root)
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for name, label, part in entries:
        parts[part].append((name, classes.index(label)))

    def made(part: str) -> FilePart:
        names = tuple(name for name, _ in parts[part])
        labels = np.array([label for _, label in parts[part]], np.int64)
        return FilePart(tuple(files.path(name) for name in names), names, labels)

    return Dataset(root, tuple(classes), made("train"), made("validation"), made("test"))


class _Files:
    """Finds files by names in Unicode NFC, however their folder spells them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[Path, Mapping[str, str]] = {}

    def path(self, name: str) -> Path:
        """The path as the folder spells it; as it would be if there is no such file."""
        plain = self._root / name
        spelled = self._spellings(plain.parent).get(plain.name, plain.name)
        return plain.with_name(spelled)

    def _spellings(self, folder: Path) -> Mapping[str, str]:
        if folder not in self._folders:
            try:
                entries = visible_entries(folder)
            except DataError:  # the folder is gone: so are its files
                entries = []
            named = {unicodedata.normalize("NFC", entry.name): entry.name for entry in entries}
            self._folders[folder] = named
        return self._folders[folder]
