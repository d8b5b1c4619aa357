"""Reading a checkpoint (`last.npz`, `best.npz`) without trusting it; the format is in `docs/artifact.md`.

The device writes and resumes from checkpoints, the workstation merges them: both read them here.  Damage
(`DamagedCheckpointError`) is told from a sound file of something else, before anything in it is believed.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_edge.bundle import Bundle
from lance_edge.errors import CheckpointError, DamagedCheckpointError, LanceError
from lance_edge.manifest import Variant
from lance_edge.npy import load, read_member
from lance_edge.npz_kinds import OF_KIND, kind_of
from lance_edge.sealed import SEAL, check_seal

SCHEMA_VERSION = 3
META = "meta"
OPTIMIZER = "optimizer/"
CODEC = "codec/"
MAX_META_BYTES = 1 << 24
NPY_OVERHEAD_BYTES = 4096  # header of an array inside the npz

Float = NDArray[np.float32]


class Archive:
    """An open checkpoint file: every array is checked before it is unpacked."""

    def __init__(self, path: Path, npz: Any) -> None:
        """`npz` is what `npy.load` opened.

        Raises:
            DamagedCheckpointError: if it is an array or an npz without the checkpoint's `meta`.
            SealError: if its content is not what was written.
        """
        self.path = path
        self._npz = npz
        if not hasattr(npz, "zip") or META not in npz.files:
            raise DamagedCheckpointError(
                f"{path}: not a checkpoint: expected an npz with {META}; give the last.npz or best.npz of a run"
            )
        check_seal(npz.zip, path.stat().st_size)

    @property
    def weight_names(self) -> set[str]:
        """The parameters that are stored."""
        own = (META, SEAL)
        return {name for name in self._npz.files if name not in own and not name.startswith((OPTIMIZER, CODEC))}

    def meta(self, bundle: Bundle) -> dict[str, Any]:
        """The meta data, as JSON, of a checkpoint that belongs to this package.

        Raises:
            CheckpointError: if it is of a newer schema, damaged, or of another package.
        """
        value = self._meta()
        version = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{self.path}: checkpoint schema {version}, this runtime reads {SCHEMA_VERSION};"
                " install a newer lance-edge"
            )
        if isinstance(version, int) and version < SCHEMA_VERSION:
            raise CheckpointError(
                f"{self.path}: checkpoint schema {version}, this runtime reads {SCHEMA_VERSION};"
                " finish this run with the lance-edge that began it"
            )
        if not isinstance(value, dict) or not isinstance(value.get("artifact_sha256"), str):
            raise CheckpointError(f"{self.path}: its {META} is damaged; use another checkpoint")
        if value["artifact_sha256"] != bundle.sha256:
            raise CheckpointError(
                f"{self.path}: belongs to another package: expected {bundle.sha256[:12]}, found"
                f" {value['artifact_sha256'][:12]} ({value.get('model')});"
                " give the pkg.tar that this run was trained from"
            )
        return value

    def expect_checkpoint(self) -> None:
        """See that it is one, whatever its package.

        Raises:
            CheckpointError: naming what else it is.
        """
        self._meta()

    def _meta(self) -> Any:
        self._check_size(META, MAX_META_BYTES)
        value = json.loads(str(read_member(self._npz.zip, META)))
        if (kind := kind_of(value)) in ("memory", "statistics"):
            raise CheckpointError(f"{self.path}: {OF_KIND[kind]}, not the checkpoint")
        return value

    def weights(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Float]:
        """The trained tensors, which must be exactly those of `shapes`."""
        if self.weight_names != set(shapes):
            differing = ", ".join(sorted(self.weight_names ^ set(shapes)))
            raise CheckpointError(
                f"{self.path}: its tensors are not those of the package: {differing}; use another checkpoint"
            )
        return {name: self.tensor(name, shape) for name, shape in shapes.items()}

    def group(
        self, prefix: str, shapes: dict[str, tuple[int, ...]], *, optional: bool = False
    ) -> dict[str, Float]:
        """The tensors under a prefix (the optimiser's momentum, a codec's state): all of `shapes`.

        Args:
            optional: none of them is right, too.
        """
        stored = {name.removeprefix(prefix) for name in self._npz.files if name.startswith(prefix)}
        if stored != set(shapes) and not (optional and not stored):
            differing = ", ".join(prefix + name for name in sorted(stored ^ set(shapes)))
            raise CheckpointError(
                f"{self.path}: its tensors are not those of the package: {differing}; use another checkpoint"
            )
        return {name: self.tensor(prefix + name, shape) for name, shape in shapes.items() if stored}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float:
        """A finite float32 array of this shape.

        Raises:
            CheckpointError: if it is anything else; nothing larger than expected is unpacked.
        """
        size = 4 * int(np.prod(shape, dtype=np.int64))
        self._check_size(name, size + NPY_OVERHEAD_BYTES)
        array = read_member(self._npz.zip, name)
        if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
            raise CheckpointError(
                f"{self.path}: {name} is {array.dtype} {list(array.shape)}, expected finite float32"
                f" {list(shape)}; use another checkpoint"
            )
        return np.array(array, dtype=np.float32, order="C")

    def _check_size(self, name: str, limit: int) -> None:
        archive: zipfile.ZipFile = self._npz.zip
        size = archive.getinfo(name + ".npy").file_size
        if size > limit:
            raise CheckpointError(
                f"{self.path}: {name} has {size} bytes, expected at most {limit}; use another checkpoint"
            )


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a checkpoint whose content is what was written.

    Raises:
        DamagedCheckpointError: for whatever a damaged file makes zipfile and numpy raise.
        CheckpointError: if there is no such file.
        MemoryError: if there is too little memory, which says nothing of the file.
    """
    try:
        with path.open("rb") as file:
            yield Archive(path, load(file))
    except (LanceError, MemoryError):
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise CheckpointError(
            f"{path}: cannot open the checkpoint ({error.strerror}); give the last.npz or best.npz of a run"
        ) from None
    except Exception as error:  # zipfile, zlib, json and numpy raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedCheckpointError(
            f"{path}: not a readable checkpoint ({reason}); it may be cut off: copy it again, or use another",
            reason,
        ) from None


def trained_shapes(bundle: Bundle, variant: Variant) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a variant of the package trains, by state-dict name."""
    shapes = {spec.name: tuple(int(dim) for dim in spec.shape) for spec in bundle.manifest.parameters}
    return {name: shapes[name] for name in variant.parameters}


@dataclass(frozen=True)
class Trained:
    """The result of a run: the variant that it trained, and the tensors by state-dict name."""

    variant: Variant
    weights: dict[str, Float]


def read_weights(path: Path, bundle: Bundle) -> Trained:
    """The trained tensors of a checkpoint of this package.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another package.
    """
    with open_archive(path) as archive:
        variant = trained_variant(path, archive.meta(bundle), bundle)
        return Trained(variant, archive.weights(trained_shapes(bundle, variant)))


def trained_variant(path: Path, meta: Mapping[str, Any], bundle: Bundle) -> Variant:
    """The variant of the package that a checkpoint's `meta` names.

    Raises:
        CheckpointError: if it names none.
    """
    method, layers = meta.get("method"), meta.get("layers")
    for variant in bundle.manifest.variants:
        if (variant.method, len(variant.layers)) == (method, layers):
            return variant
    held = ", ".join(f"{variant.method} of {len(variant.layers)}" for variant in bundle.manifest.variants)
    raise CheckpointError(
        f"{path}: its {META} is damaged: expected a method and number of layers of the package ({held}),"
        f" found {method!r} of {layers!r}; use another checkpoint"
    )
