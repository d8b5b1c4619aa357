"""`features.cache`: records of a fixed size on disk, kept under slot numbers, read back with plain reads.

    from                    bytes      what (integers are little-endian)
    0                       8          "LANCEFC1"
    8                       4          n
    12                      n          JSON: whose records these are
    next multiple of 4096   8 * slots  table: for each slot the place of its record, from 1 (0: no record),
                                       and the record's check, both uint32
    next multiple of 4096   any        records, all of one size; the first has place 1

A record is appended when it is first written, and its table entry follows it; nothing is ever synced, to
spare an SD card.  Whatever a crash, a power cut, a second writer or a bad card leaves behind, the check
decides: it is the CRC-32 of header, slot number and record, so a record under a wrong slot, or of the features
that were in the file before (their removal may have been lost), is refused like a torn one.
A header that is not exactly the expected one means that the file belongs to other features: it is emptied.
"""

import contextlib
import errno
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"LANCEFC1"
PAGE_BYTES = 4096
ENTRY = np.dtype("<u4")
ENTRY_BYTES = 2 * ENTRY.itemsize
RESERVE_BYTES = 128 << 20  # of the disk, left free: checkpoints and measurements must find room

Bytes = NDArray[np.uint8]
Slots = NDArray[np.int64]


class CacheUnavailable(Exception):  # noqa: N818 - the run goes on without it
    """The file cannot be used; the message says why, for a note."""


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a file.

    Attributes:
        identity: whose records these are: plain JSON data.  Any difference makes a file stale.
        slots: records that there could be.
        record_bytes: of each.
    """

    identity: Mapping[str, Any]
    slots: int
    record_bytes: int

    @property
    def header(self) -> bytes:
        """The bytes before the table, padding included."""
        text = json.dumps(self.identity, sort_keys=True).encode()
        return _padded(MAGIC + struct.pack("<I", len(text)) + text)

    @property
    def data_offset(self) -> int:
        """Where the first record begins."""
        return len(self.header) + _round_up(self.slots * ENTRY_BYTES)

    def nbytes(self, records: int) -> int:
        """Size of a file with so many records."""
        return self.data_offset + records * self.record_bytes

    def capacity(self, nbytes: int) -> int:
        """Records that fit in a file of so many bytes."""
        return min(self.slots, max(0, nbytes - self.data_offset) // self.record_bytes)


class RecordFile:
    """A file that is open, and locked against other processes."""

    def __init__(self, path: Path, layout: Layout, nbytes: int) -> None:
        """Open or make.  A file of other records is emptied, a longer one is cut.

        Args:
            nbytes: how long the file may become.

        Raises:
            CacheUnavailable: if another run uses it, there is no room, or the disk does not permit it.
        """
        self.path = path
        self.stale: tuple[str, ...] = ()  # in what the records that were found here differed
        self.damaged = 0  # records whose check failed
        self._layout = layout
        self._header_bytes, self._data_offset = len(layout.header), layout.data_offset
        self._header_check = zlib.crc32(layout.header)
        self._capacity = layout.capacity(nbytes)
        if self._capacity == 0:
            raise CacheUnavailable(f"{path}: no room for features here")
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._table = np.zeros((layout.slots, 2), dtype=ENTRY)  # place, check
        try:
            with _explained(path):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except CacheUnavailable:
            os.close(self._file)
            raise
        try:
            with _explained(path):
                self._load_table()
        except CacheUnavailable:
            self.close(discard=True)
            raise
        self._free = np.setdiff1d(np.arange(1, self._capacity + 1, dtype=ENTRY), self._table[:, 0])  # places
        self._taken = 0  # of these

    @property
    def held(self) -> int:
        """Records in the file."""
        return int(np.count_nonzero(self._table[:, 0]))

    @property
    def room(self) -> int:
        """Records that may still be added."""
        return len(self._free) - self._taken

    def holds(self, slots: Slots) -> NDArray[np.bool_]:
        """Which slots have a record, `[N]`; only reading tells whether it is intact."""
        return np.asarray(self._table[slots, 0] > 0)

    def prefetch(self, slots: Slots) -> None:
        """Have the system read these records into its own memory meanwhile; costs a microsecond each."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for place in self._table[slots, 0].tolist():
            if place:
                span = (self._offset(place), self._layout.record_bytes)
                with contextlib.suppress(OSError):  # a file system that takes no advice
                    os.posix_fadvise(self._file, *span, os.POSIX_FADV_WILLNEED)

    def read(self, slots: Slots, records: Bytes) -> NDArray[np.bool_]:
        """Fill `records` `[N, record_bytes]`; rows of slots without an intact record hold anything.

        Returns:
            which rows hold their record, `[N]`.
        """
        found = np.zeros(len(slots), dtype=np.bool_)
        entries = zip(slots.tolist(), self._table[slots].tolist(), strict=True)
        for row, (slot, (place, check)) in enumerate(entries):
            if place:
                found[row] = self._read_record(place, records[row]) and check == self._check(records[row], slot)
                self.damaged += not found[row]
        return found

    def write(self, slots: Slots, records: Bytes) -> None:
        """Keep records `[N, record_bytes]`: in place of a slot's old one, else while there is room.

        Raises:
            CacheUnavailable: if the disk is nearly full; what is kept stays readable.
            OSError: if it cannot be written; the file is then best discarded.
        """
        disk = os.fstatvfs(self._file)
        if disk.f_bavail * disk.f_frsize < RESERVE_BYTES:
            raise CacheUnavailable(f"{self.path}: the disk is nearly full, no further features are kept")
        for slot, record in zip(slots.tolist(), records, strict=True):
            place = int(self._table[slot, 0]) or self._next_free()
            if place == 0:
                continue
            self._pwrite(record.tobytes(), self._offset(place))
            entry = np.array([place, self._check(record, slot)], dtype=ENTRY)
            self._pwrite(entry.tobytes(), self._header_bytes + slot * ENTRY_BYTES)
            self._table[slot] = entry

    def close(self, discard: bool = False) -> None:
        """Done; a file without any record is removed, as is one to `discard`."""
        if discard or not self._table.any():
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
                self.path.unlink()
        os.close(self._file)

    def _load_table(self) -> None:
        expected = self._layout.header
        size = os.fstat(self._file).st_size
        if size > 0 and os.pread(self._file, len(expected), 0) == expected:
            self._table = self._read_table(size)
            os.ftruncate(self._file, min(size, self._layout.nbytes(self._capacity)))
            os.utime(self._file)  # the file that was used last is the last to be removed for room
            return
        if size > 0:
            self.stale = _differences(os.pread(self._file, PAGE_BYTES, 0), self._layout.identity)
        os.ftruncate(self._file, 0)
        self._pwrite(expected, 0)
        os.ftruncate(self._file, self._data_offset)

    def _read_table(self, size: int) -> NDArray[np.uint32]:
        """The table of a file that is ours, without entries that point nowhere or at the same record."""
        length = self._layout.slots * ENTRY_BYTES
        stored = os.pread(self._file, length, self._header_bytes).ljust(length, b"\0")
        table = np.frombuffer(bytearray(stored), dtype=ENTRY).reshape(-1, 2)
        written = max(0, size - self._data_offset) // self._layout.record_bytes
        places, counts = np.unique(table[:, 0], return_counts=True)
        is_shared = np.isin(table[:, 0], places[counts > 1])
        table[is_shared | (table[:, 0] > min(written, self._capacity))] = 0
        return table

    def _read_record(self, place: int, record: Bytes) -> bool:
        try:
            return os.preadv(self._file, [record.data], self._offset(place)) == len(record)
        except OSError:  # the card cannot read it any more
            return False

    def _check(self, record: Bytes, slot: int) -> int:
        return zlib.crc32(record.data, zlib.crc32(struct.pack("<I", slot), self._header_check))

    def _next_free(self) -> int:
        if self.room == 0:
            return 0
        self._taken += 1
        return int(self._free[self._taken - 1])

    def _offset(self, place: int) -> int:
        return self._data_offset + (place - 1) * self._layout.record_bytes

    def _pwrite(self, data: bytes, offset: int) -> None:
        if os.pwrite(self._file, data, offset) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove_unused(path: Path) -> bool:
    """Remove a cache file unless some process has it open; whether it is gone."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(file)
    return not path.exists()


def _differences(found: bytes, identity: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries in which a header differs from the expected identity; `header` if it is unreadable."""
    start = len(MAGIC) + 4
    try:
        length = struct.unpack_from("<I", found, len(MAGIC))[0]
        other = json.loads(found[start : start + length])
        names = sorted(key for key in {*identity, *other} if identity.get(key) != other.get(key))
    except (struct.error, ValueError, TypeError, AttributeError):
        names = []
    return tuple(names) or ("header",)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise CacheUnavailable(f"{path}: another run is using this cache") from None
    except OSError as error:
        raise CacheUnavailable(f"{path}: cannot use this cache ({error.strerror or error})") from None


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _padded(data: bytes) -> bytes:
    return data.ljust(_round_up(len(data)), b"\0")
