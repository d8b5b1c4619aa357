"""Tiny data sets in every form that the benchmarks read."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image


def pixels_of(label: int, number: int, side: int = 32, channels: int = 3) -> np.ndarray:
    """An image that a network can tell by its class: a bright column, and noise."""
    noise = np.random.default_rng([label, number]).integers(0, 60, (side, side, channels), dtype=np.uint8)
    column = 2 + label * 2
    noise[:, column : column + 2] = 255
    return noise if channels == 3 else noise[..., 0]


def write_folders(folder: Path, classes: list[str], train: int = 4, test: int = 2) -> Path:
    """`train/<class>/*.png` and `test/<class>/*.png`."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels_of(label, number + 1000 * (part == "test")))
                image.save(folder / part / name / f"{number:04}.png")
    return folder


def idx(array: np.ndarray) -> bytes:
    """LeCun's format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, classes: int = 10, train: int = 4, test: int = 2, *, packed: bool = True) -> Path:
    """Four IDX files of grey images of 28 pixels, classes mixed."""
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        labels = np.tile(np.arange(classes), count)
        images = [pixels_of(int(label), n, 28, 1) for n, label in enumerate(labels)]
        for kind, array in (("images-idx3", np.stack(images)), ("labels-idx1", labels)):
            data = idx(array)
            file = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(data) if packed else data)
    return folder


def write_npz(path: Path, classes: int = 10, train: int = 4, test: int = 2) -> Path:
    """x, y, x_test, y_test, classes mixed."""
    arrays = {}
    for suffix, count in (("", train), ("_test", test)):
        labels = np.tile(np.arange(classes), count)
        arrays[f"y{suffix}"] = labels
        arrays[f"x{suffix}"] = np.stack([pixels_of(int(label), n) for n, label in enumerate(labels)])
    np.savez(path, **arrays)
    return path
