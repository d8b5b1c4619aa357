"""What a network is fed: how images are prepared, or arrays of a shape, and how data are split."""

import math
from dataclasses import dataclass

MAX_SIDE = 1 << 14  # pixels of an image that a network reads: more would not fit into any board's memory
MAX_VALUES = 1 << 28  # of an array, for the same reason

INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")  # of `Preprocessing`, as pillow has them

# Metadata of an exported ONNX model, both JSON: the class names, and the fields of `Preprocessing`.
CLASSES_KEY = "classes"
PREPROCESSING_KEY = "preprocessing"


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the network's input; the same for calibration, training and prediction.

    EXIF-oriented, RGB (or grey, where `mean` and `std` have one entry), resized to `resize` on the short
    side, centre crop `resolution`, then `(x / 255 - mean) / std` per channel.
    """

    resolution: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one prepared image, `[channels, R, R]`."""
        return (len(self.mean), self.resolution, self.resolution)


@dataclass(frozen=True)
class ArrayInput:
    """Float32 arrays of this shape, without the batch, go to the network unchanged."""

    shape: tuple[int, ...]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one array."""
        return self.shape


InputSpec = Preprocessing | ArrayInput


@dataclass(frozen=True)
class Split:
    """How class folders without their own `train/` and `test/` are divided (see `datasets.py`).

    `validation_fraction` is taken from the training part; `best.npz` is chosen on it.
    """

    seed: int
    test_fraction: float
    validation_fraction: float


DEFAULT_SPLIT = Split(seed=0, test_fraction=0.25, validation_fraction=0.1)


def broken_rules(steps: InputSpec) -> list[str]:
    """What is wrong with an input's description, each as what was expected; nothing if it is sound."""
    return [expected for expected, holds in input_rules(steps).items() if not holds]


def input_rules(steps: InputSpec) -> dict[str, bool]:
    """Every rule of an input's description, and whether it holds."""
    if isinstance(steps, ArrayInput):
        is_sound = bool(steps.shape) and min(steps.shape) >= 1
        return {
            "arrays of positive size": is_sound,
            f"arrays of at most {MAX_VALUES} values": not is_sound or math.prod(steps.shape) <= MAX_VALUES,
        }
    return {
        "a resolution of 1 or more": min(steps.resolution, steps.resize) >= 1,
        f"a resolution of at most {MAX_SIDE}": max(steps.resolution, steps.resize) <= MAX_SIDE,
        "a mean and a positive std of 1 or 3 channels": len(steps.mean) == len(steps.std)
        and len(steps.mean) in (1, 3)
        and min(steps.std) > 0
        and all(map(math.isfinite, (*steps.mean, *steps.std))),
        f"an interpolation of {', '.join(INTERPOLATIONS)}": steps.interpolation in INTERPOLATIONS,
    }
