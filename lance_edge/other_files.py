"""What stands in folders of images and is not taken as one, said in a line: nobody loses half of his photos.

Images are known by the ends of their names (`images.EXTENSIONS`); hidden files are meant to be passed over.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lance_edge.errors import DataError
from lance_edge.images import EXTENSIONS, is_image, visible_entries

MOST_KINDS = 8  # named in a line: `frame.0001`, `frame.0002` are kinds of their own


def of_data(root: Path) -> str:
    """The line for a folder of class folders, or of `train/` and `test/` with these; empty if all is taken."""
    if not root.is_dir():
        return ""
    parents = [root / name for name in ("train", "test") if (root / name).is_dir()] or [root]
    folders = [entry for parent in parents for entry in _entries(parent) if entry.is_dir()]
    return _line(str(root), (entry for folder in folders for entry in _entries(Path(folder.path))))


def of_folders(paths: Sequence[Path]) -> str:
    """The line for folders that are looked through with all below them; empty if all is taken."""
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        return ""
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    return _line(f"{folders[0]}{more}", (entry for folder in folders for entry in _walk(folder)))


def _walk(folder: Path) -> Iterator["os.DirEntry[str]"]:
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield entry


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        return visible_entries(folder)
    except DataError:  # whoever needs what is in it says so
        return []


def _line(where: str, entries: Iterable["os.DirEntry[str]"]) -> str:
    kinds = Counter(_kind(entry) for entry in entries if not is_image(entry))
    if not kinds:
        return ""
    ranked = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    counts = [f"{kind} {count}" for kind, count in ranked[:MOST_KINDS]]
    counts += [f"others {sum(count for _, count in ranked[MOST_KINDS:])}"] if ranked[MOST_KINDS:] else []
    number = kinds.total()
    what = "1 entry is not taken as an image" if number == 1 else f"{number} entries are not taken as images"
    return f"{where}: {what} ({', '.join(counts)}); images are files that end in {' '.join(EXTENSIONS)}"


def _kind(entry: "os.DirEntry[str]") -> str:
    """A suffix, or what an entry is that is no file."""
    if entry.is_dir():
        return "folders"
    if not entry.is_file():
        return "broken links" if entry.is_symlink() else "pipes or devices"
    suffix = Path(entry.name).suffix.lower() or "without suffix"
    return suffix if suffix.isprintable() else ascii(suffix)
