"""An uncompressed `.npz` that carries the SHA-256 of its own content.

`numpy.load` reads it like any other.  The array `sha256`, its last, is a hex digest over all others: of the
lines `<SHA-256 of the member>  <name of the member>\n`, in the order in which they stand.  So damage is found
before anything in the file is believed, whatever the storage or the file system made of it.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lance_edge.npy import read_member

SEAL = "sha256"
CHUNK_BYTES = 1 << 16
MAX_SEAL_BYTES = 1024
NO_TIME = (1980, 1, 1, 0, 0, 0)  # the same arrays give the same bytes


class SealError(ValueError):
    """The file is not what was written."""


def write_sealed(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays (none of them of Python objects) and their seal; the same arrays give the same bytes."""
    seal = hashlib.sha256()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            seal.update(_line(_member(name), _add(archive, name, array)))
        _add(archive, SEAL, np.array(seal.hexdigest()))


def check_seal(archive: zipfile.ZipFile, nbytes: int) -> None:
    """Compare every member with the seal; reads in small chunks and unpacks nothing.

    Args:
        nbytes: size of the whole file.

    Raises:
        SealError: if it has no seal, another content than the sealed one, or is compressed.
    """
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise SealError("it is compressed, so its arrays could be of any size")
    if sum(entry.file_size for entry in entries) > nbytes:
        raise SealError("its arrays together are larger than the file")
    if not entries or entries[-1].filename != _member(SEAL) or entries[-1].file_size > MAX_SEAL_BYTES:
        raise SealError(f"its last array is not {SEAL}")
    seal = hashlib.sha256()
    for entry in entries[:-1]:
        seal.update(_line(entry.filename, _digest(archive, entry)))
    if str(read_member(archive, SEAL)) != seal.hexdigest():
        raise SealError(f"its content is not what {SEAL} declares")


class _HashingWriter:
    """Hands on what is written, and remembers its digest."""

    def __init__(self, member: Any) -> None:
        self._member, self.digest = member, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return int(self._member.write(data))


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> str:
    entry = zipfile.ZipInfo(_member(name), NO_TIME)
    with archive.open(entry, "w", force_zip64=True) as member:
        writer = _HashingWriter(member)
        np.lib.format.write_array(writer, np.asarray(array, order="C"), allow_pickle=False)
    return writer.digest.hexdigest()


def _digest(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    digest = hashlib.sha256()
    with archive.open(entry) as member:
        while chunk := member.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _line(member: str, digest: str) -> bytes:
    return f"{digest}  {member}\n".encode("utf-8", "surrogatepass")


def _member(name: str) -> str:
    return name + ".npy"
