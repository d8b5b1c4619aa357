"""What it takes to decode the images of a run: known from their headers, before any of them is decoded."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lance_device.guard import status_bytes
from lance_edge.datasets import Dataset, FilePart
from lance_edge.errors import PlatformError
from lance_edge.images import decoding_bytes
from lance_edge.units import size


@dataclass(frozen=True)
class Limit:
    """Memory that this process may use.

    Attributes:
        what: who says so, for messages.
        kind: `VmHWM` (resident memory) or `VmPeak` (address space), as in proc(5).
        is_enforced: by the kernel: whoever goes beyond it gets no memory, or is killed.
    """

    nbytes: int
    what: str
    kind: str
    is_enforced: bool = True


@dataclass(frozen=True)
class LargestImage:
    """The one that takes most memory to decode; `nbytes` is 0 where the data are no image files."""

    path: Path
    nbytes: int

    def expect_room(self, limits: Collection[Limit]) -> None:
        """See that it can be decoded, so that looking at all images keeps within the limits.

        Raises:
            PlatformError: if it cannot, with the memory that it takes.
        """
        for limit in limits:
            used = status_bytes({"VmHWM": "VmRSS", "VmPeak": "VmSize"}[limit.kind]) or 0
            if used < limit.nbytes < used + self.nbytes:  # where nothing fits, `plan_memory` says it better
                raise PlatformError(
                    f"{self.path}: decoding it takes {size(self.nbytes)} beside {size(used)} that are in use,"
                    f" but {limit.what} is {size(limit.nbytes)}; make this image smaller, or allow more"
                )


def largest_image(dataset: Dataset) -> LargestImage:
    """Of all parts; looks at every header."""
    found = LargestImage(dataset.root, 0)
    for part in (dataset.train, dataset.validation, dataset.test):
        for path in part.paths if isinstance(part, FilePart) else ():
            nbytes = decoding_bytes(path)
            found = LargestImage(path, nbytes) if nbytes > found.nbytes else found
    return found


def bytes_beyond(largest: LargestImage, dataset: Dataset, measured: int) -> int:
    """What the largest image takes beyond the first training images, with which a run was measured."""
    part = dataset.train
    if not isinstance(part, FilePart):
        return 0
    return max(0, largest.nbytes - min(map(decoding_bytes, part.paths[:measured])))
