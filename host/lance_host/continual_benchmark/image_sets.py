"""Data sets of small images from where their users have them, as pixels of 32 by 32.

Below `--data` a set is looked for under its name, then (where a benchmark has one set only) in the folder
itself:

    cifar10/train/<class>/*.png and cifar10/test/<class>/*       class folders
    mnist/train-images-idx3-ubyte[.gz], ... (four files)         IDX, as MNIST and Fashion-MNIST come
    svhn.npz: x uint8 [N, H, W, 3], y, x_test, y_test            arrays
"""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.datasets import open_dataset
from lance_edge.errors import DataError
from lance_edge.files import file_digest
from lance_edge.images import EXTENSIONS, Part
from lance_edge.input_spec import Split
from lance_edge.npz_data import ArrayPart, read_npz
from lance_host.continual_benchmark.benchmarks import Source

SIDE = 32
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
WHOLE = Split(seed=0, test_fraction=0.25, validation_fraction=0.0)  # class folders bring train/ and test/
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
IDX_BYTES = 0x08  # the type code of unsigned bytes
MAX_IDX_VALUES = 1 << 30
DIGEST_CHARS = 16


@dataclass(frozen=True, eq=False)
class Images:
    """Images that are read when they are asked for: `read(rows)` gives pixels uint8 `[n, 32, 32, 3]`."""

    labels: Labels
    read: Callable[[NDArray[np.int64]], Pixels]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set; a label is an index into `classes`, `digest` tells it from other data of this name."""

    source: Source
    classes: tuple[str, ...]
    train: Images
    test: Images
    digest: str = ""


def find_set(root: Path, source: Source, *, may_be_root: bool) -> ImageSet | None:
    """The data set, or `None` where it is not there.

    Args:
        may_be_root: whether `root` itself may be the set.

    Raises:
        DataError: if it is there, but damaged or with other classes than it must have.
    """
    places = [root / source.name, root / f"{source.name}.npz"]
    places += [root] if may_be_root else []
    places += [source.elsewhere] if source.elsewhere is not None else []
    for place in places:
        for is_here, read in READERS:
            if is_here(place):
                found = read(place, source)
                _expect_classes(place, source, found)
                return replace(found, digest=digest_of(place))
    return None


def digest_of(place: Path) -> str:
    """What tells the data from others, wherever they lie: hex digits.

    Of the contents of an npz or of IDX files; of names and sizes of image files, which are many.
    """
    if place.is_file():
        return file_digest(place).hexdigest()[:DIGEST_CHARS]
    images = [path for part in ("train", "test") for path in (place / part).glob("*/*")]
    lines = [
        f"{path.stat().st_size}  {path.relative_to(place).as_posix()}" for path in images if _is_image(path)
    ]
    packed = [place / f"{name}{ending}" for name in IDX_FILES for ending in ("", ".gz")]
    lines += [f"{file_digest(path).hexdigest()}  {path.name}" for path in packed if path.is_file()]
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_CHARS]


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(EXTENSIONS)


def _expect_classes(place: Path, source: Source, found: ImageSet) -> None:
    for part in (found.train, found.test):
        present = len(np.unique(part.labels))
        if len(found.classes) != source.classes or present != source.classes:
            raise DataError(
                f"{place}: expected {source.classes} classes with training and test images of {source.name},"
                f" found {min(present, len(found.classes))}; give the whole data set"
            )


# --- class folders and npz ---


def _is_class_folders(place: Path) -> bool:
    return (place / "train").is_dir() and (place / "test").is_dir()


def _read_class_folders(place: Path, source: Source) -> ImageSet:
    dataset = open_dataset(place, WHOLE)
    names = in_label_order(dataset.classes)
    order = np.array([names.index(name) for name in dataset.classes], np.int64)
    train, test = (Images(order[part.labels], _from_part(part)) for part in (dataset.train, dataset.test))
    return ImageSet(source, names, train, test)


def in_label_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Folders that are called by numbers in the order of these; names as they sort, as CIFAR numbers them."""
    return tuple(sorted(names, key=int)) if all(name.isdecimal() for name in names) else tuple(sorted(names))


def _from_part(part: Part) -> Callable[[NDArray[np.int64]], Pixels]:
    def read(rows: NDArray[np.int64]) -> Pixels:
        return _stacked(part.image(int(row)) for row in rows)

    return read


def _is_npz(place: Path) -> bool:
    return place.suffix == ".npz" and place.is_file()


def _read_npz(place: Path, source: Source) -> ImageSet:
    classes, train, test = read_npz(place)
    if test is None or not isinstance(train, ArrayPart) or not isinstance(test, ArrayPart):
        raise DataError(
            f"{place}: expected images x uint8 [N, H, W, 3] and x_test with their labels; write both parts"
        )
    own, own_test = (Images(part.labels, _from_part(part)) for part in (train, test))
    return ImageSet(source, tuple(classes), own, own_test)


# --- IDX ---


def _is_idx(place: Path) -> bool:
    return any((place / name).is_file() for name in (IDX_FILES[0], f"{IDX_FILES[0]}.gz"))


def _read_idx_set(place: Path, source: Source) -> ImageSet:
    parts = []
    for images_file, labels_file in (IDX_FILES[:2], IDX_FILES[2:]):
        pixels, labels = read_idx(place, images_file, rank=3), read_idx(place, labels_file, rank=1)
        if len(pixels) != len(labels):
            raise DataError(
                f"{place}: {images_file} has {len(pixels)} images, {labels_file} {len(labels)} labels; they"
                " belong to different sets: copy them again"
            )
        parts.append(Images(labels.astype(np.int64), _from_grey(pixels)))
    classes = tuple(str(label) for label in range(int(parts[0].labels.max()) + 1))
    return ImageSet(source, classes, parts[0], parts[1])


def read_idx(folder: Path, name: str, rank: int) -> Pixels:
    """An array of unsigned bytes from an IDX file (LeCun's format: magic, sizes big-endian, values).

    Raises:
        DataError: if it is missing, cut off or something else.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: expected {name} or {name}.gz beside the other IDX files; copy it there")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return _parse_idx(data, rank)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: not a readable IDX file ({error}); copy it again") from None


def _parse_idx(data: bytes, rank: int) -> Pixels:
    if data[:4] != bytes((0, 0, IDX_BYTES, rank)) or len(data) < 4 + 4 * rank:
        raise ValueError(f"expected unsigned bytes of {rank} dimensions, found a header {data[:4].hex()}")
    sizes = np.frombuffer(data, ">u4", rank, offset=4).astype(np.int64)
    count = int(sizes.prod())
    if not 0 < count < MAX_IDX_VALUES or len(data) - 4 - 4 * rank != count:
        raise ValueError(f"expected {sizes.tolist()} values, found {len(data) - 4 - 4 * rank}")
    return np.frombuffer(data, np.uint8, count, offset=4 + 4 * rank).reshape(sizes)


def _from_grey(pixels: Pixels) -> Callable[[NDArray[np.int64]], Pixels]:
    def read(rows: NDArray[np.int64]) -> Pixels:
        return _stacked(Image.fromarray(pixels[row]) for row in rows)

    return read


# --- pixels ---


def _stacked(images: Iterator[Image.Image]) -> Pixels:
    found = [to_square(image) for image in images]
    return np.stack(found) if found else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def to_square(image: Image.Image) -> Pixels:
    """RGB `[32, 32, 3]`: smaller images are padded with black on all sides, larger ones resized."""
    rgb = image.convert("RGB")
    if max(rgb.size) > SIDE:
        return np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    square = np.zeros((SIDE, SIDE, 3), np.uint8)
    top, left = (SIDE - rgb.height) // 2, (SIDE - rgb.width) // 2
    square[top : top + rgb.height, left : left + rgb.width] = np.asarray(rgb)
    return square


Reader = Callable[[Path, Source], ImageSet]
READERS: tuple[tuple[Callable[[Path], bool], Reader], ...] = (
    (_is_class_folders, _read_class_folders),
    (_is_idx, _read_idx_set),
    (_is_npz, _read_npz),
)
