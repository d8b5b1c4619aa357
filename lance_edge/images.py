"""From an image file to the network's input: the same for calibration, training and prediction.

JPEG, PNG, BMP, WebP and GIF (the first frame) of every colour mode become upright 8-bit RGB.  An alpha
channel is dropped, not blended; 16-bit greys are scaled to 8 bits.  `datasets.py` finds the files.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.arrays import array_batch
from lance_edge.errors import DataError
from lance_edge.input_spec import ArrayInput, InputSpec, Preprocessing

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")  # case does not matter
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
MAX_ASPECT_RATIO = 16  # beyond it, the ends of an image are cut off before it is resized
MAX_PIXELS = 89_478_485  # 341 MiB in pillow's four bytes a pixel; its own threshold for a decompression bomb

# Bytes a pixel at the peak of `load_image`, by the mode of the file: pillow keeps RGB in 4, a palette goes
# through RGBA, 16-bit greys through float64 (measured with pillow 13: 4.1, 5.1, 8.1, 9.1, 20.4).
_DECODING_BYTES = {"RGB": 4, "L": 5, "1": 5, "RGBA": 8, "LA": 8, "CMYK": 8, "P": 9}
_MOST_DECODING_BYTES = 21
_WEBP_BYTES = 17  # the decoder's own canvases
_PROGRESSIVE_BYTES = 4 + 6  # the coefficients of three channels, 16 bits each

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF 2.3, table 6: how a stored image becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Part(Protocol):
    """Labelled images that are decoded one at a time: the training, validation or test part of a data set."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Index of every image's class, `[n]`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Path of every image relative to the data folder, with `/`; `x[17]` in an `.npz`."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """One image, upright RGB.

        Raises:
            DataError: if the file cannot be read.
        """


def load_image(path: Path) -> Image.Image:
    """An upright 8-bit RGB image, fully decoded.

    Raises:
        DataError: if the file is missing, empty, truncated, not an image, or larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height <= MAX_PIXELS:
                file.load()
                upright = _upright_rgb(file)
                upright.info.clear()  # pillow copies metadata along: nobody shall turn it again
                return upright
            reason = f"found {file.width}x{file.height} pixels, more than {MAX_PIXELS} in all"
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # pillow raises many kinds for a damaged file
        reason = _reason(path, error)
    raise DataError(
        f"{path}: cannot read this image ({reason}); expected a whole JPEG, PNG, BMP, WebP or GIF file:"
        " replace or remove it",
        reason,
    )


def decoding_bytes(path: Path) -> int:
    """Memory that `load_image` takes at its peak, from the header alone; 0 for a file that it refuses."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            pixels = file.width * file.height
            each = _DECODING_BYTES.get(file.mode, _MOST_DECODING_BYTES)
            # Metadata of a PNG may stand behind its pixels.
            is_turned = file.format == "PNG" or _orientation(file) in _UPRIGHT
            each = max(each, 8 if is_turned else 0)
            each = max(each, _PROGRESSIVE_BYTES if "progressive" in file.info else 0)
            each = max(each, _WEBP_BYTES if file.format == "WEBP" else 0)
            return each * pixels if pixels <= MAX_PIXELS else 0
    except MemoryError:
        raise
    except Exception:  # whoever decodes it says what is wrong
        return 0


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with suppress(OSError):  # it may vanish at any moment
        if path.stat().st_size == 0:
            return "found 0 bytes"
    return str(error).replace(str(path), path.name) or type(error).__name__


def prepare(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the short side to `resize` (never below `resolution`) and crop the centre.

    Returns:
        RGB pixels `[R, R, 3]`, or grey ones `[R, R, 1]`, with R = `preprocessing.resolution`.
    """
    resolution = preprocessing.resolution
    short = max(preprocessing.resize, resolution)
    rgb = _without_far_ends(_upright_rgb(image))
    width, height = (round(side * short / min(rgb.size)) for side in rgb.size)
    left, upper = (round((side - resolution) / 2) for side in (width, height))
    resized = rgb.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
    crop = resized.crop((left, upper, left + resolution, upper + resolution))
    is_grey = len(preprocessing.mean) == 1
    return np.asarray(crop.convert("L"))[:, :, None] if is_grey else np.asarray(crop)


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of a very long image: the crop reads nothing else, and resizing all of it costs memory."""
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) <= longest:
        return image
    left, upper = (max(0, (side - longest) // 2) for side in image.size)
    return image.crop((left, upper, image.width - left, image.height - upper))


def load_batch(
    part: Part,
    indices: Sequence[int] | NDArray[np.int64],
    preprocessing: InputSpec,
    flips: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Samples as the network reads them: images as `(x / 255 - mean) / std` per channel, arrays unchanged.

    Args:
        indices: which N images of the part, in the order of the batch.
        flips: `[N]`, which of them to mirror left to right; none by default.

    Returns:
        float32 `[N, channels, R, R]`, or `[N, *shape]` of arrays, C-contiguous.

    Raises:
        DataError: if an image cannot be read.
    """
    if isinstance(preprocessing, ArrayInput):
        return array_batch(part, indices, preprocessing.shape)
    batch = np.empty((len(indices), *preprocessing.sample_shape), np.float32)
    levels = _normalised_levels(preprocessing)  # [channels, 256]
    for row, index in enumerate(indices):
        pixels = prepare(part.image(int(index)), preprocessing)  # [R, R, channels]
        if flips is not None and flips[row]:
            pixels = pixels[:, ::-1]
        for channel, level in enumerate(levels):
            batch[row, channel] = level[pixels[:, :, channel]]
    return batch


def _normalised_levels(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """The network's input for each of the 256 levels of a channel, `[channels, 256]`, rounded once."""
    mean = np.array(preprocessing.mean, np.float64)[:, None]
    std = np.array(preprocessing.std, np.float64)[:, None]
    return ((np.arange(256) / 255 - mean) / std).astype(np.float32)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths` and, recursively, in those that are folders: sorted, each once.

    A file that is named is taken as it is; in folders, hidden entries and other extensions are ignored.

    Raises:
        DataError: if a path does not exist or cannot be read, or if there is no image at all.
    """
    found: set[Path] = set()
    for path in paths:
        if path.is_dir():
            found.update(_walk(path))
        elif path.exists():
            found.add(path)
        else:
            raise DataError(f"{path}: no such file or folder; give image files or folders of images")
    if not found:
        given = ", ".join(map(str, paths)) or "no path"
        raise DataError(f"{given}: no images here; expected files that end in {' '.join(EXTENSIONS)}")
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in visible_entries(folder):
        if entry.is_dir(follow_symlinks=False):  # a link to a folder may lead back up
            yield from _walk(folder / entry.name)
        elif is_image(entry):
            yield folder / entry.name


def visible_entries(folder: Path) -> list["os.DirEntry[str]"]:
    """What a folder holds, sorted by name, without hidden entries.

    Raises:
        DataError: if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot list this folder ({error.strerror}); check the path and its permissions"
        ) from None
    return sorted(visible, key=lambda entry: unicodedata.normalize("NFC", entry.name))


def is_image(entry: "os.DirEntry[str]") -> bool:
    """Whether a folder's entry is a file with one of the `EXTENSIONS`."""
    return entry.name.lower().endswith(EXTENSIONS) and entry.is_file()


def _upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB with the EXIF orientation applied; the image itself if nothing is to be done."""
    method = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if method is None else rgb.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # malformed metadata of an image that is otherwise good
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit greys: convert() would clip at 255
        levels = np.clip(np.asarray(image), 0, 65535)
        return Image.fromarray(np.rint(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P":  # through RGBA: a palette with transparent entries warns otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")
