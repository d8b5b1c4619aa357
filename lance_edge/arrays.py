"""Float32 arrays instead of images: audio features, sensor windows, whatever a network takes unchanged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.errors import DataError
from lance_edge.npy import load, read_member

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FloatPart:
    """Rows of an array `[N, ...]` that all parts share; see `images.Part`."""

    values: Float
    rows: NDArray[np.int64]
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one array."""
        return self.values.shape[1:]

    def image(self, index: int) -> Image.Image:
        """There is none.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"{self.names[index]}: expected an image, found a float32 array {list(self.sample_shape)}; give"
            " images, or make the package from such arrays"
        )

    def select(self, rows: NDArray[np.int64]) -> "FloatPart":
        """The part that has these arrays only."""
        names = tuple(self.names[row] for row in rows)
        return FloatPart(self.values, self.rows[rows], names, self.labels[rows])


def array_batch(part: Any, indices: Sequence[int] | NDArray[np.int64], shape: Sequence[int]) -> Float:
    """Arrays as the network reads them: unchanged.

    Args:
        part: one of float32 arrays.

    Returns:
        float32 `[N, *shape]`, C-contiguous.

    Raises:
        DataError: if it holds something else.
    """
    if not isinstance(part, FloatPart) or part.sample_shape != tuple(shape):
        found = f"arrays {list(part.sample_shape)}" if isinstance(part, FloatPart) else "images"
        raise DataError(
            f"{part.names[0]}: the package takes float32 arrays {list(shape)}, found {found}; give an .npz"
            f" with x float32 [N, {', '.join(map(str, shape))}]"
        )
    return np.ascontiguousarray(part.values[part.rows[np.asarray(indices, np.int64)]])


def read_arrays(paths: Sequence[Path], shape: Sequence[int]) -> FloatPart:
    """The arrays of files: `x` of an `.npz`, or an `.npy`; `[N, *shape]`, or one `shape`.

    Raises:
        DataError: if a file cannot be read or holds other arrays.
    """
    values, names = [], []
    for path in paths:
        array = _read(path)
        single = array.shape == tuple(shape)
        array = array[None] if single else array
        if array.dtype != np.float32 or array.shape[1:] != tuple(shape):
            raise DataError(
                f"{path}: expected float32 [N, {', '.join(map(str, shape))}], found {array.dtype}"
                f" {list(array.shape)}; convert it"
            )
        if not np.isfinite(array).all():
            number = int((~np.isfinite(array)).sum())
            raise DataError(
                f"{path}: expected finite values, found {number} that are NaN or infinite; repair them"
            )
        values.append(array)
        names += [str(path)] if single else [f"{path}[{row}]" for row in range(len(array))]
    if not names:
        raise DataError(f"{', '.join(map(str, paths))}: no arrays here; give .npz files with x, or .npy files")
    return FloatPart(
        np.concatenate(values), np.arange(len(names)), tuple(names), np.zeros(len(names), np.int64)
    )


def _read(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as stream:
            file = load(stream)
            return read_member(file.zip, "x") if isinstance(file, np.lib.npyio.NpzFile) else np.asarray(file)
    except KeyError:
        raise DataError(f"{path}: no array x in this file; write it with numpy.savez(file, x=...)") from None
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            f"{path}: not a readable .npz or .npy file ({reason}); write it again with numpy"
        ) from None
