"""The package file: a deterministic, uncompressed tar whose first member is `manifest.json`.

Reading trusts nothing: every byte of the file is checked before one is used (members against the manifest,
the manifest against its own digest, all else against what `write_bundle` writes), and nothing is ever
extracted to the file system.  The format is in `docs/artifact.md`.
"""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import ArtifactError
from lance_edge.files import atomic_writer, expect_signed
from lance_edge.manifest import Manifest, Member
from lance_edge.manifest_json import decode, encode
from lance_edge.npy import load, read_member

MANIFEST_MEMBER = "manifest.json"
DIGEST_MEMBER = "manifest.sha256"  # second member, as sha256sum writes it: finds damage, proves no origin
MAX_MANIFEST_BYTES = 16 << 20
CHUNK_BYTES = 1 << 16


def describe(name: str, data: bytes) -> Member:
    """The manifest's entry for a member with this content."""
    return Member(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_bundle(path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Write the package: the same manifest and contents give the same bytes.

    Args:
        manifest: its `members` must describe `contents`, in the order in which they are written.

    Raises:
        StorageError: if the file cannot be written; nothing is left behind.
    """
    encoded = encode(manifest)
    with atomic_writer(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, MANIFEST_MEMBER, encoded)
        _add(tar, DIGEST_MEMBER, _digest_line(encoded))
        for member in manifest.members:
            _add(tar, member.name, contents[member.name])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    tar.addfile(_header(name, len(data)), io.BytesIO(data))


def _header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)  # owner, mode and time keep their constant defaults: determinism
    info.size = size
    return info


def _digest_line(encoded: bytes) -> bytes:
    return f"{hashlib.sha256(encoded).hexdigest()}  {MANIFEST_MEMBER}\n".encode()


class Bundle:
    """An open, verified package.  Use as a context manager; members are read on demand."""

    def __init__(self, path: Path, signed_sha256: str | None = None) -> None:
        """Open and verify.

        Args:
            signed_sha256: of the whole file, by its signature: looked at before anything in it is read.

        Raises:
            ArtifactError: if the file is missing, truncated, tampered with, unsafe or too new.
        """
        self.path = path
        self._file = _open_file(path)
        try:
            if signed_sha256 is not None:
                expect_signed(path, _sha256(self._file), signed_sha256)
                self._file.seek(0)
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 - open as long as the bundle
            infos = _checked_infos(path, self._tar)
            _expect_layout(path, self._file, infos)
            encoded = self._read_manifest(infos)
            self.manifest = decode(encoded, str(path))
            self.sha256 = hashlib.sha256(encoded).hexdigest()  # covers every member through its hash
            self._infos = {info.name: info for info in infos[2:]}
            self._verify_members()
        except (tarfile.TarError, EOFError, OSError, UnicodeError, ValueError) as error:
            self._file.close()
            raise ArtifactError(
                f"{path}: not a readable package ({error}); expected an uncompressed tar from lance-host;"
                " it may be cut off: copy it again"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Bundle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, *names: str) -> bytes:
        """The content of a member, or of several one after the other: the parts of a graph.

        Raises:
            ArtifactError: if there is no such member.
        """
        return b"".join(self._read(name) for name in names)

    def _read(self, name: str) -> bytes:
        with self._open(name) as stream:
            content = stream.read()
        if describe(name, content) not in self.manifest.members:
            raise ArtifactError(f"{self.path}: {name} was changed while the package is in use; copy it again")
        return content

    def arrays(self, name: str) -> "ArrayReader":
        """The arrays of an `.npz` member, each read when it is asked for."""
        return ArrayReader(self._open(name), f"{self.path}: {name}")

    def _open(self, name: str) -> BinaryIO:
        if name not in self._infos:
            raise ArtifactError(f"{self.path}: no member {name}; rebuild the package with lance-host")
        stream = self._tar.extractfile(self._infos[name])
        return cast(BinaryIO, stream)

    def _read_manifest(self, infos: list[tarfile.TarInfo]) -> bytes:
        first = infos[0]
        if first.name != MANIFEST_MEMBER or first.size > MAX_MANIFEST_BYTES:
            raise ArtifactError(
                f"{self.path}: expected {MANIFEST_MEMBER} as first member, found {first.name!r}"
                f" of {first.size} bytes; this is not a package of lance-host"
            )
        encoded, second = self._content(first), infos[1:2]
        if [info.name for info in second] != [DIGEST_MEMBER] or self._content(second[0]) != _digest_line(
            encoded
        ):
            raise ArtifactError(
                f"{self.path}: {MANIFEST_MEMBER} is not what {DIGEST_MEMBER} declares; the package was"
                " changed or damaged: copy it again"
            )
        return encoded

    def _content(self, info: tarfile.TarInfo) -> bytes:
        return cast(BinaryIO, self._tar.extractfile(info)).read()

    def _verify_members(self) -> None:
        declared = {member.name: member for member in self.manifest.members}
        if list(declared) != list(self._infos) or len(declared) != len(self.manifest.members):
            difference = sorted(set(declared) ^ set(self._infos)) or "their order"
            raise ArtifactError(
                f"{self.path}: members differ from the manifest: {difference}; the package was changed:"
                " copy it again from where it was made"
            )
        for name, member in declared.items():
            found_size, found_sha256 = self._infos[name].size, ""
            if found_size == member.size:
                found_sha256 = self._digest(name)
            if found_sha256 != member.sha256:
                raise ArtifactError(
                    f"{self.path}: {name} is not what the manifest declares (expected {member.size} bytes,"
                    f" sha256 {member.sha256[:12]}; found {found_size} bytes,"
                    f" sha256 {found_sha256[:12] or 'not read'});"
                    " the package was changed or damaged: copy it again"
                )

    def _digest(self, name: str) -> str:
        with self._open(name) as stream:
            return _sha256(stream)


class ArrayReader(Mapping[str, NDArray[np.generic]]):
    """Arrays of an uncompressed `.npz`, never unpickled: none is larger than the file."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self._where = where
        try:
            self._npz = load(stream)
            self._names = list(self._npz.files)
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in self._npz.zip.infolist()):
                raise ValueError("it is compressed, so its arrays could be of any size")
        except MemoryError:  # says nothing of the file
            raise
        except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
            raise ArtifactError(f"{where}: not a readable npz ({error}); rebuild the package") from None

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        if name not in self._names:
            raise ArtifactError(f"{self._where}: no array {name}; rebuild the package with lance-host")
        try:
            return cast(NDArray[np.generic], read_member(self._npz.zip, name))
        except MemoryError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{self._where}: array {name} is unreadable ({error}); rebuild the package"
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def npz_bytes(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """An uncompressed `.npz`; the same arrays give the same bytes (numpy stamps no time)."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(value, order="C") for name, value in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def _sha256(stream: BinaryIO) -> str:
    """Of all that is left in it."""
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot open the package ({error.strerror}); make one with lance-host calibrate"
        ) from None


def _checked_infos(path: Path, tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    infos = tar.getmembers()
    names = [info.name for info in infos]
    if not infos:
        raise ArtifactError(f"{path}: an empty tar; expected a package of lance-host")
    for info in infos:
        parts = PurePosixPath(info.name).parts
        if not info.isreg() or info.name.startswith("/") or ".." in parts or "\\" in info.name:
            raise ArtifactError(
                f"{path}: member {info.name!r} is a link, a folder or a path that escapes; a package holds"
                " plain files only: do not use this file"
            )
    if len(set(names)) != len(names):
        raise ArtifactError(f"{path}: a member stands twice; the package was changed: do not use this file")
    return infos


def _expect_layout(path: Path, file: BinaryIO, infos: list[tarfile.TarInfo]) -> None:
    """Headers, padding and end are what `write_bundle` writes: nothing hides between members or after them."""
    file.seek(0)
    good = True
    for info in infos:
        header = _header(info.name, info.size).tobuf(tarfile.USTAR_FORMAT)
        good = good and file.read(len(header)) == header
        file.seek(info.size, io.SEEK_CUR)
        padding = -info.size % tarfile.BLOCKSIZE
        good = good and file.read(padding) == bytes(padding)
    end = file.tell()
    rest = tarfile.RECORDSIZE - end % tarfile.RECORDSIZE
    if rest < 2 * tarfile.BLOCKSIZE:  # the end of a tar is two empty blocks, then a full record
        rest += tarfile.RECORDSIZE
    if not good or file.read(rest + 1) != bytes(rest):
        raise ArtifactError(
            f"{path}: the tar is cut off, was changed, or was packed by another program; expected the file as"
            " lance-host wrote it: copy it again"
        )
