"""Reading sealed `.npz` files of matrices (`memory.npz`, `stats.npz`) without trusting them."""

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import ArtifactError, LanceError
from lance_edge.npz_kinds import OF_KIND, kind_of
from lance_edge.sealed import SEAL, check_seal

META = "meta"
MAX_META_BYTES = 1 << 24


class MatrixFile:
    """An open file whose content is what was written; nothing in it is larger than the file."""

    def __init__(self, path: Path, npz: Any, what: str, schema: int) -> None:
        self.path, self._npz, self._what, self._schema = path, npz, what, schema

    def meta(self) -> dict[str, Any]:
        """The meta data, JSON, of this schema.

        Raises:
            ArtifactError: if it is of another schema, or a file of another kind.
        """
        value = json.loads(str(self._npz[META]))
        if (kind := kind_of(value)) is not None and kind != self._what:
            raise ArtifactError(f"{self.path}: {OF_KIND[kind]}, not the {self._what}")
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != self._schema:
            raise ArtifactError(
                f"{self.path}: {self._what} schema {version!r}, this version reads {self._schema};"
                " install a newer lance-edge, or make the file again"
            )
        return dict(value)

    def array(self, name: str, dtype: type[np.generic], ndims: tuple[int, ...]) -> NDArray[Any]:
        """A finite array of this type and one of these numbers of dimensions.

        Raises:
            ArtifactError: if it is anything else.
        """
        found = self._npz[name] if name in self._npz.files else None
        if found is None or found.dtype != dtype or found.ndim not in ndims or not np.isfinite(found).all():
            kinds = " or ".join(map(str, ndims))
            kind = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ArtifactError(
                f"{self.path}: {name}: expected finite {np.dtype(dtype)} of {kinds} dimensions,"
                f" found {kind}; make the {self._what} again"
            )
        return np.array(found, order="C")

    def names(self) -> list[str]:
        """The arrays beside meta and seal."""
        return [name for name in self._npz.files if name not in (META, SEAL)]

    def expect_no_more(self, names: Iterable[str]) -> None:
        """See that there is no array but these.

        Raises:
            ArtifactError: naming what is too much.
        """
        unknown = sorted(set(self.names()) - set(names))
        if unknown:
            raise ArtifactError(
                f"{self.path}: found the unknown array {unknown[0]}; make the {self._what} again"
            )


@contextmanager
def open_matrices(path: Path, what: str, schema: int) -> Iterator[MatrixFile]:
    """Open a sealed file.

    Args:
        what: how messages call it, `memory`.
        schema: of its meta data, which this version reads.

    Raises:
        ArtifactError: for whatever a missing or damaged file makes zipfile, numpy and json raise.
    """
    try:
        file = path.open("rb")
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ArtifactError(f"{path}: cannot open the {what} ({error.strerror}); check the path") from None
    with file, _opened(file, path, what, schema) as matrices:
        yield matrices


@contextmanager
def open_member(data: bytes, where: Path, what: str, schema: int) -> Iterator[MatrixFile]:
    """The same of a file that is a member of a package.

    Args:
        where: how messages call it.
    """
    with _opened(io.BytesIO(data), where, what, schema) as matrices:
        yield matrices


@contextmanager
def _opened(file: BinaryIO, path: Path, what: str, schema: int) -> Iterator[MatrixFile]:
    try:
        npz = np.load(file, allow_pickle=False)
        if not hasattr(npz, "zip") or META not in npz.files:
            raise ValueError(f"expected an npz with {META}")
        check_seal(npz.zip, file.seek(0, io.SEEK_END))
        if npz.zip.getinfo(f"{META}.npy").file_size > MAX_META_BYTES:
            raise ValueError(f"its {META} is larger than {MAX_META_BYTES} bytes")
        yield MatrixFile(path, npz, what, schema)
    except LanceError:
        raise
    except Exception as error:  # zipfile, zlib, json and numpy raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(
            f"{path}: not a readable {what} ({reason}); it may be cut off: copy it again, or make it again"
        ) from None
