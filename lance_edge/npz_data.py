"""An `.npz` as a data set: images or float32 arrays with their labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.arrays import FloatPart
from lance_edge.errors import DataError
from lance_edge.npy import load, read_member

MAX_LABEL = 65_535  # whoever has more means something else by a label


@dataclass(frozen=True, eq=False)
class ArrayPart:
    """Rows of an array of pixels `[N, H, W, 3]` that all parts share; see `images.Part`."""

    pixels: NDArray[np.uint8]
    rows: NDArray[np.int64]
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """One image, RGB."""
        return Image.fromarray(self.pixels[self.rows[index]])

    def select(self, rows: NDArray[np.int64]) -> "ArrayPart":
        """The part that has these images only."""
        names = tuple(self.names[row] for row in rows)
        return ArrayPart(self.pixels, self.rows[rows], names, self.labels[rows])


NpzPart = ArrayPart | FloatPart


def read_npz(path: Path) -> tuple[list[str], NpzPart, NpzPart | None]:
    """Class names, the training part (or everything), and the test part if there is one.

    Raises:
        DataError: naming the array that is missing or not as it must be.
    """
    arrays = _load_arrays(path)
    train = _array_part(path, arrays, "x", "y")
    has_test = "x_test" in arrays or "y_test" in arrays
    test = _array_part(path, arrays, "x_test", "y_test") if has_test else None
    if test is not None and (type(test) is not type(train) or _shape_of(test) != _shape_of(train)):
        raise DataError(
            f"{path}: x is {arrays['x'].dtype} {list(arrays['x'].shape)}, x_test {arrays['x_test'].dtype}"
            f" {list(arrays['x_test'].shape)}; they must be of one kind, and arrays of one"
            " shape: convert one of them"
        )
    classes = _class_names(path, arrays.get("classes"), train.labels)
    for key, part in (("y", train), ("y_test", test)):
        if part is not None and part.labels.max() >= len(classes):
            raise DataError(
                f"{path}: {key} has label {part.labels.max()}, expected 0 to {len(classes) - 1}"
                f" for {len(classes)} classes; correct the labels or the classes"
            )
    for label, count in enumerate(np.bincount(train.labels, minlength=len(classes))):
        if count == 0:
            raise DataError(
                f"{path}: class {classes[label]!r} has no image in y; labels must be 0 to {len(classes) - 1},"
                " each used: number the classes without gaps"
            )
    return classes, train, test


def _load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    wanted = ("x", "y", "x_test", "y_test", "classes")
    try:
        with path.open("rb") as stream:
            file = load(stream)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("found a single array, as of numpy.save")
            arrays = {key: read_member(file.zip, key) for key in wanted if key in file.files}
            held = ", ".join(file.files) or "nothing"
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise DataError(f"{path}: not a readable npz ({error}); write it again with numpy.savez") from None
    for key in ("x", "y", *(wanted[2:4] if "x_test" in arrays or "y_test" in arrays else ())):
        if key not in arrays:
            raise DataError(f"{path}: expected an array {key}, found {held}; add it to the file")
    return arrays


def _shape_of(part: NpzPart) -> tuple[int, ...] | None:
    return part.sample_shape if isinstance(part, FloatPart) else None


def _array_part(path: Path, arrays: dict[str, NDArray[Any]], images: str, labels: str) -> NpzPart:
    x, y = arrays[images], arrays[labels]
    is_images = x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] == 3
    is_arrays = x.dtype == np.float32 and x.ndim >= 2
    if not (is_images or is_arrays) or 0 in x.shape:
        raise DataError(
            f"{path}: {images} must be uint8 [N, H, W, 3] (images) or float32 [N, ...] (arrays for the"
            f" network as they are), found {x.dtype} {list(x.shape)}; convert it"
        )
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise DataError(
            f"{path}: {labels} must be int64 [{len(x)}], one label for each of {images}, found {y.dtype}"
            f" {list(y.shape)}; convert it"
        )
    if y.min() < 0:
        raise DataError(f"{path}: {labels} has label {y.min()}, expected 0 or more; remove such images")
    if y.max() > MAX_LABEL:
        raise DataError(
            f"{path}: {labels} has label {y.max()}, expected at most {MAX_LABEL};"
            " number the classes without gaps"
        )
    names = tuple(f"{images}[{row}]" for row in range(len(x)))
    if is_images:
        return ArrayPart(x, np.arange(len(x)), names, y.astype(np.int64))
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{path}: {names[int(np.argmin(finite))]} holds NaN or infinity; remove or mend such arrays"
        )
    return FloatPart(x, np.arange(len(x)), names, y.astype(np.int64))


def _class_names(path: Path, given: NDArray[Any] | None, labels: NDArray[np.int64]) -> list[str]:
    if given is None:
        return [str(label) for label in range(int(labels.max()) + 1)]
    names = [str(name) for name in given.ravel()]
    if given.dtype.kind != "U" or given.ndim != 1 or len(set(names)) != len(names):
        raise DataError(
            f"{path}: classes must be distinct strings [K], found {given.dtype} {list(given.shape)}; correct it"
        )
    return names
