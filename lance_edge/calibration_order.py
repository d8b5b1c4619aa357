"""Which images calibrate: the same on workstation and board, so that both measure the same second moments."""

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import DataError, LanceError


def calibration_batches(train_images: int, batch_size: int, requested: int, seed: int) -> NDArray[np.int64]:
    """Indices of the images of each calibration batch, `[N, B]`; `len()` says how many there are.

    N is `requested`, or as many full batches as one pass over a seeded permutation gives: no image is
    used twice, and the remainder of the permutation is left out (of calibration only).

    Raises:
        LanceError: if fewer than one batch is requested.
        DataError: if there are fewer images than one batch.
    """
    if requested < 1:
        raise LanceError(
            f"calibration batches: expected at least 1, found {requested}; the usual number is 100"
        )
    if not 1 <= batch_size <= train_images:
        raise DataError(
            f"calibration: expected a batch size from 1 to the {train_images} training images,"
            f" found {batch_size}; ask for a smaller one"
        )
    number = min(requested, train_images // batch_size)
    order = np.random.default_rng(seed).permutation(train_images).astype(np.int64)
    return order[: number * batch_size].reshape(number, batch_size)
