"""Files of numpy whose headers claim no more than there is.

numpy makes room for what a header claims before it reads.  A false claim would end as `MemoryError`, which
says nothing of the file; so it is found here first, and a lack of memory is never taken for damage.
"""

import io
import math
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_HEADERS = {  # by version of the format; 3.0 is for structures only
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def load(stream: BinaryIO) -> Any:
    """`numpy.load` without pickles: an array, or an open npz, whose arrays `read_member` gives.

    Raises:
        ValueError: if it is neither, or shorter than its header claims.
        MemoryError: if there is too little memory for it.
    """
    nbytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if stream.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
        stream.seek(0)
        _expect_whole(stream, nbytes)
    stream.seek(0)
    return np.load(stream, allow_pickle=False)


def read_member(archive: Any, name: str) -> NDArray[Any]:
    """An array of an npz.

    Args:
        archive: the zip file that it is (`NpzFile.zip`).

    Raises:
        KeyError: if there is none of this name.
        ValueError: if it is no array, or shorter than its header claims.
        MemoryError: if there is too little memory for it.
    """
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as member:
        _expect_whole(member, entry.file_size)
    with archive.open(entry) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _expect_whole(stream: Any, nbytes: int) -> None:
    """Read the header of an array that has so many bytes in all."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"format {version[0]}.{version[1]} of numpy is not read here")
    shape, _, dtype = _HEADERS[version](stream)
    claimed = stream.tell() + math.prod(shape) * dtype.itemsize
    if claimed > nbytes and not dtype.hasobject:  # numpy refuses objects by itself
        raise ValueError(f"its header claims {claimed} bytes, found {nbytes}")
