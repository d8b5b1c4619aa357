"""Writing files so that a reader sees the old one or the new one, never half of one."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lance_edge.errors import ArtifactError, StorageError

CHUNK_BYTES = 1 << 16


@contextlib.contextmanager
def atomic_writer(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and vanishes otherwise.

    Order of write barriers: file fsync, rename, folder fsync.  So at every moment the name leads to a file
    that is durable, whichever of the renames a power cut leaves behind.

    Args:
        previous: where the file that stood at `path` is kept, in the same folder.

    Raises:
        StorageError: if the folder or the file cannot be written (disk full, no permission).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        with name.open("xb") as file:  # not tempfile: its private mode cannot be changed on FAT
            temporary = name
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write ({error.strerror or error}); free some space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def file_digest(path: Path, size: int | None = None) -> "hashlib._Hash":
    """The running SHA-256 of a file, or of its first `size` bytes.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def expect_signed(path: Path, found_sha256: str, signed_sha256: str | None) -> None:
    """See that a file that is about to be used is the one that was signed, if that is asked for.

    Args:
        found_sha256: of all of it.
        signed_sha256: what its signature says.

    Raises:
        ArtifactError: if it is another.
    """
    if signed_sha256 not in (None, found_sha256):
        raise ArtifactError(
            f"{path}: not the package that was signed (expected sha256 {str(signed_sha256)[:12]}..., found"
            f" {found_sha256[:12]}...); it was changed or damaged: copy it again, with its signature"
        )


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name; where the file system has no hard links (FAT), its only one."""
    second = path.parent / f".{previous.name}.{secrets.token_hex(4)}"
    try:
        second.hardlink_to(path)
    except OSError:
        path.replace(previous)
        sync_folder(path.parent)
        return
    try:
        second.replace(previous)
    finally:
        second.unlink(missing_ok=True)  # renaming between two names of one file does nothing


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
