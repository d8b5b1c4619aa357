"""Boundary tensors: what the frozen prefix makes of images, computed every time or kept on disk.

Where features are kept they are float16, and then *every* feature is rounded to float16, freshly computed ones
and those of evaluations too: results depend on `--cache on`, but never on what a cache happens to hold.  An
image with a value beyond float16 is not kept, and its features stay as they were computed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lance_device.cache import CacheUnavailable, RecordFile
from lance_device.graphs import run_prefix
from lance_device.session import Array, Graph
from lance_edge.errors import ArtifactError
from lance_edge.images import Part, load_batch
from lance_edge.input_spec import InputSpec
from lance_edge.manifest import TensorSpec
from lance_edge.names import DROPOUT_SEEDS, LABELS

Float = NDArray[np.float32]
Half = NDArray[np.float16]
Rows = NDArray[np.int64]
Note = Callable[[str], None]

IMAGES_AT_A_TIME = 8  # decoded and in memory, whatever the micro-batch: features are smaller than images
WITHOUT_SIGN_COPIES = np.int32(-0x70002000)  # 0x8fffe000: sign, 5 bits of exponent, 10 of fraction
BIAS = np.float32(2.0**112)


@dataclass(frozen=True)
class Batch:
    """The samples of one step, read a micro-batch at a time.

    Attributes:
        indices: images of `part`, `[B]`.
        flips: which of them to mirror, `[B]`.
        dropout_seeds: what is dropped of each, `[B]`; `None`: nothing.
    """

    part: Part
    indices: NDArray[np.int64]
    flips: NDArray[np.bool_]
    preprocessing: InputSpec
    dropout_seeds: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def images(self, rows: slice | Rows) -> Float:
        """Prepared samples, `[N, 3, R, R]` of images."""
        return load_batch(self.part, self.indices[rows], self.preprocessing, self.flips[rows])

    def labels(self, rows: slice) -> NDArray[np.int64]:
        """Class indices `[N]`."""
        return np.ascontiguousarray(self.part.labels[self.indices[rows]], dtype=np.int64)

    def fed(self, rows: slice) -> dict[str, NDArray[np.int64]]:
        """What graphs are fed of the samples beside their features, by name: `[N]` each."""
        labels, seeds = self.labels(rows), self.dropout_seeds
        return {LABELS: labels, DROPOUT_SEEDS: np.full(len(labels), -1) if seeds is None else seeds[rows]}


class Meter(Protocol):
    """Who is told which phase of a step the work belongs to."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure a block."""


class Unmetered:
    """Measures nothing: evaluation is one phase as a whole."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()


class Features(Protocol):
    """Where boundary tensors come from."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors."""

    @property
    def computed(self) -> int:
        """Images that passed the prefix so far; those read from a cache do not count."""

    def boundary(self, batch: Batch, rows: slice, meter: Meter) -> dict[str, Array]:
        """Boundary tensors `[N, ...]` of some rows of a batch; the phases `data` and `prefix`.

        Raises:
            DataError: if an image cannot be read.
        """

    def stop_keeping(self) -> None:
        """From now on an image may be another than its name says: what is kept is good, but add nothing."""

    def close(self, discard: bool = False) -> None:
        """Done; `discard`: nobody will ask for these features again."""


class ComputedFeatures:
    """Every image passes the prefix every time."""

    def __init__(self, prefix: Graph) -> None:
        self._prefix = prefix
        self.names = prefix.outputs
        self.computed = 0

    def boundary(self, batch: Batch, rows: slice, meter: Meter) -> dict[str, Array]:
        """Load and compute."""
        computed = [self._compute(batch, some, meter) for some in _at_a_time(np.arange(rows.start, rows.stop))]
        if len(computed) == 1:
            return computed[0]
        return {name: np.concatenate([values[name] for values in computed]) for name in self.names}

    def _compute(self, batch: Batch, rows: Rows, meter: Meter) -> dict[str, Array]:
        with meter.phase("data"):
            images = batch.images(rows)
        with meter.phase("prefix"):
            self.computed += len(images)
            return run_prefix(self._prefix, images)

    def stop_keeping(self) -> None:
        """Nothing is kept."""

    def close(self, discard: bool = False) -> None:
        """Nothing was kept."""


@dataclass(frozen=True)
class Packing:
    """Boundary tensors of an image as one record: one after the other, in this order, float16."""

    tensors: tuple[TensorSpec, ...]

    @property
    def elements(self) -> int:
        """Of all tensors of an image."""
        return sum(_elements(spec) for spec in self.tensors)

    @property
    def obstacle(self) -> str:
        """Why there can be no records of these tensors, or nothing."""
        for spec in self.tensors:
            kinds = [type(dimension) for dimension in spec.shape]
            if spec.dtype != "float32" or kinds != [str] + [int] * (len(kinds) - 1):
                return (
                    f"{spec.name} is {spec.dtype} {list(spec.shape)}, no float32 of a fixed size for each image"
                )
        return "" if self.elements else "the frozen part of the network gives nothing"

    def pack(self, values: dict[str, Array]) -> tuple[Half, NDArray[np.bool_]]:
        """Records of N images.

        Returns:
            `[N, elements]`, and which of the N float16 can hold.

        Raises:
            ArtifactError: if the prefix gives other shapes than the manifest says.
        """
        for spec in self.tensors:
            if values[spec.name].shape[1:] != spec.shape[1:]:
                raise ArtifactError(
                    f"the prefix gives {spec.name} {list(values[spec.name].shape[1:])} an image, the manifest"
                    f" says {list(spec.shape[1:])}; rebuild the package with lance-host"
                )
        flat = [values[spec.name].reshape(-1, _elements(spec)) for spec in self.tensors]
        with np.errstate(over="ignore"):
            halves = np.concatenate(flat, axis=1).astype(np.float16)
        return halves, np.asarray(np.isfinite(halves).all(axis=1))

    def unpack(self, halves: Half) -> dict[str, Array]:
        """Tensors `[N, ...]`, float32, of records `[N, elements]`."""
        values: dict[str, Array] = {}
        start = 0
        for spec in self.tensors:
            stop = start + _elements(spec)
            values[spec.name] = widen(halves[:, start:stop]).reshape(-1, *spec.shape[1:])
            start = stop
        return values


@dataclass
class Shelf:
    """The slots of one part.

    Attributes:
        first: slot of its first image.
        views: slots of an image: 2 where it may be mirrored.
        room: records that may still be added.
    """

    first: int
    views: int
    room: int

    def slots(self, batch: Batch, rows: slice) -> Rows:
        """Slot of every row, `[N]`."""
        return self.first + self.views * batch.indices[rows] + batch.flips[rows]


class CachedFeatures:
    """Features from a file; what it lacks is computed, and kept there while there is room."""

    def __init__(
        self, prefix: Graph, packing: Packing, shelves: dict[Part, Shelf], file: RecordFile | None, note: Note
    ) -> None:
        """Join.

        Args:
            file: `None` where it cannot be used: then every feature is computed, and rounded all the same.
            note: told, once each, what is unusual.
        """
        self._prefix, self._packing, self._shelves = prefix, packing, shelves
        self._file, self._note = file, note
        self._is_filling = file is not None
        self._halves = np.zeros((0, packing.elements), dtype=np.float16)
        self._said: set[str] = set()
        self.names = prefix.outputs
        self.computed = 0

    def boundary(self, batch: Batch, rows: slice, meter: Meter) -> dict[str, Array]:
        """Read; compute and keep what is missing."""
        shelf = self._shelves[batch.part]
        slots = shelf.slots(batch, rows)
        with meter.phase("data"):
            if rows.start == 0 and self._file is not None:
                self._file.prefetch(shelf.slots(batch, slice(rows.stop, None)))
            halves, missing = self._read(slots)
            values = self._packing.unpack(halves)
        for some in _at_a_time(missing):
            with meter.phase("data"):
                images = batch.images(rows.start + some)
            with meter.phase("prefix"):
                computed = run_prefix(self._prefix, images)
            with meter.phase("data"):
                self._fill_in(values, some, computed, shelf, slots)
        if rows.start == 0 and not len(missing):  # all from the cache: a row of this phase too
            with meter.phase("prefix"):
                pass
        return values

    def stop_keeping(self) -> None:
        """See `Features`."""
        self._is_filling = False

    def close(self, discard: bool = False) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close(discard)
            self._file = None

    def _read(self, slots: Rows) -> tuple[Half, Rows]:
        """Records `[N, elements]`, and the rows that hold anything because there is no good record."""
        if len(self._halves) < len(slots):
            self._halves = np.zeros((len(slots), self._packing.elements), dtype=np.float16)
        halves = self._halves[: len(slots)]
        if self._file is None:
            return halves, np.arange(len(slots))
        found = self._file.read(slots, halves.view(np.uint8))
        if self._file.damaged:
            self._say(f"{self._file.path}: a damaged record was found; such features are computed again")
        return halves, np.flatnonzero(~found)

    def _fill_in(
        self, values: dict[str, Array], missing: Rows, computed: dict[str, Array], shelf: Shelf, slots: Rows
    ) -> None:
        """Put computed features into their rows, rounded where float16 can hold them, and keep those."""
        self.computed += len(missing)
        halves, fits = self._packing.pack(computed)
        for name, rounded in self._packing.unpack(halves[fits]).items():
            values[name][missing[fits]] = rounded
            values[name][missing[~fits]] = computed[name][~fits]
        if not fits.all():
            self._say("features of some images exceed float16; they are computed every time")
        if self._file is not None and self._is_filling:
            self._keep(self._file, shelf, slots[missing[fits]], halves[fits])

    def _keep(self, file: RecordFile, shelf: Shelf, slots: Rows, halves: Half) -> None:
        slots, first = np.unique(slots, return_index=True)  # an image stands twice at the seam of two epochs
        halves, is_new = halves[first], ~file.holds(slots)
        fits = ~is_new | (np.cumsum(is_new) <= shelf.room)
        shelf.room -= int((is_new & fits).sum())
        try:
            file.write(slots[fits], halves[fits].view(np.uint8))
        except CacheUnavailable as reason:
            self._is_filling = False
            self._say(str(reason))
        except OSError as error:  # give the space back: checkpoints need it more
            self._is_filling = False
            self._say(f"{file.path}: cannot write ({error.strerror}); the run goes on without a cache")
            self.close(discard=True)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._note(text)


def _at_a_time(rows: Rows) -> Iterator[Rows]:
    for start in range(0, len(rows), IMAGES_AT_A_TIME):
        yield rows[start : start + IMAGES_AT_A_TIME]


def widen(halves: Half) -> Float:
    """Finite float16 as float32, exactly: a fifth of the time of `astype`.

    The bits of a half, moved to where float32 has its own and read as one, are the value times 2^-112: the
    difference of the exponents' biases, 127 - 15.  Subnormals come out right too (IEEE 754, 3.4).
    """
    bits = halves.view(np.int16).astype(np.int32)  # copies the sign into the upper half
    bits <<= 13
    bits &= WITHOUT_SIGN_COPIES
    widened = bits.view(np.float32)
    widened *= BIAS
    return widened


def _elements(spec: TensorSpec) -> int:
    return math.prod(size for size in spec.shape[1:] if isinstance(size, int))
