"""Boundary tensors for a benchmark: computed in every step, or read from a file that the warm-up filled."""

from pathlib import Path

from lance_device.cache import CacheUnavailable, Layout, RecordFile
from lance_device.features import CachedFeatures, ComputedFeatures, Features, Packing, Shelf
from lance_device.session import Graph
from lance_edge.errors import StorageError
from lance_edge.images import Part
from lance_edge.manifest import Variant

CACHE_FILE = "features.cache"


def open_bench_features(
    prefix: Graph, variant: Variant, part: Part, batch_size: int, cache_folder: Path | None
) -> Features:
    """Features of the images of a part.

    Args:
        batch_size: images of a step: no others are kept.
        cache_folder: where to keep them; `None` computes them every time.

    Raises:
        StorageError: if they cannot be kept there.
    """
    if cache_folder is None:
        return ComputedFeatures(prefix)
    packing = Packing(variant.boundary)
    if packing.obstacle:
        _refuse(packing.obstacle)
    layout = Layout({"benchmark": "of one process"}, len(part), 2 * packing.elements)
    try:
        file = RecordFile(cache_folder / CACHE_FILE, layout, layout.nbytes(batch_size))
    except CacheUnavailable as reason:
        raise StorageError(f"--cache on: {reason}") from None
    return CachedFeatures(prefix, packing, {part: Shelf(0, 1, batch_size)}, file, _refuse)


def _refuse(text: str) -> None:
    """What a run would note, and go on without a cache: here the figures would not be what they claim."""
    raise StorageError(f"--cache on: {text}; measure with --cache off")
