"""A small real image set for a first try without any download: scikit-learn's handwritten digits."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.errors import DataError, LanceError, StorageError

SIDE = 32  # pixels; the original images are 8 x 8


def write_digits(folder: Path, per_class: int | None = None) -> int:
    """Write `<folder>/<digit>/<index>.png`, grey 32x32, and return the number of images.

    Alpaydin and Kaynak's optical digits (UCI), 1,797 images, about 180 of each class; `per_class` keeps
    the first ones of each.  The same files every time.

    Raises:
        DataError: if `folder` holds anything already, or `per_class` is not positive.
        LanceError: if scikit-learn is not installed.
        StorageError: if the files cannot be written.
    """
    if per_class is not None and per_class < 1:
        raise DataError(f"--per-class: expected at least 1 image of each class, found {per_class}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise LanceError(
            "sample-data: needs scikit-learn, which is not installed; pip install scikit-learn"
        ) from None
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 0..16 -> 0..255
    try:
        _require_empty(folder)
        return sum(_write_class(folder, digit, grey[digits.target == digit][:per_class]) for digit in range(10))
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write ({error.strerror or error}); free some space or choose another place"
        ) from error


def _require_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: expected a new or empty folder, found files in it; name another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _write_class(folder: Path, digit: int, images: NDArray[np.uint8]) -> int:
    """`images` uint8 `[n, 8, 8]` as PNG files of one class; their number."""
    target = folder / str(digit)
    target.mkdir()
    for index, image in enumerate(images):
        large = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        large.save(target / f"{index:03d}.png")
    return len(images)
