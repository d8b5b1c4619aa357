"""Images for a benchmark without a data set."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lance_edge.arrays import FloatPart
from lance_edge.images import Part
from lance_edge.input_spec import ArrayInput, InputSpec

DRIFT = 64  # pixels: neighbouring images are crops of one picture, so that thousands of them need no memory
COARSE = 16  # pixels of one random patch: a picture of pure noise is unlike any photograph


@dataclass(frozen=True, eq=False)
class GeneratedPart:
    """Crops of one smooth random picture, the same on every machine; see `images.Part`.

    Attributes:
        picture: `[S + DRIFT, S + DRIFT, 3]`, where S is what preprocessing resizes to: nothing is scaled.
    """

    picture: Image.Image
    side: int
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> Image.Image:
        """One image, RGB."""
        left, top = 7 * index % DRIFT, 7 * index // DRIFT * 5 % DRIFT
        return self.picture.crop((left, top, left + self.side, top + self.side))


def generated_part(preprocessing: InputSpec, classes: int, count: int) -> Part:
    """So many images (or arrays), with labels in turn."""
    labels = np.arange(count, dtype=np.int64) % classes
    names = tuple(f"generated[{i}]" for i in range(count))
    if isinstance(preprocessing, ArrayInput):
        values = np.random.default_rng(0).standard_normal((count, *preprocessing.shape), np.float32)
        return FloatPart(values, np.arange(count), names, labels)
    side = preprocessing.resize
    size = side + DRIFT
    patches = np.random.default_rng(0).integers(0, 256, (-(-size // COARSE),) * 2 + (3,), dtype=np.uint8)
    picture = Image.fromarray(patches).resize((size, size), Image.Resampling.BILINEAR)
    return GeneratedPart(picture, side, names, labels)
