"""A lack of memory is never taken for damage, and a false claim never for a lack of memory."""

import io
import zipfile

import numpy as np
import pytest

from lance_edge.arrays import read_arrays
from lance_edge.bundle import ArrayReader
from lance_edge.checkpoints import open_archive
from lance_edge.errors import ArtifactError, CheckpointError, DataError
from lance_edge.npy import load, read_member
from lance_edge.npz_data import read_npz
from lance_edge.sealed import write_sealed

TOO_MANY = (1 << 50, 4)  # 16 PiB of float32: no machine has it, so making room for it fails


def _claiming(shape, version=(1, 0)):
    """An array of four bytes whose header claims another shape."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    writers = {(1, 0): np.lib.format.write_array_header_1_0, (2, 0): np.lib.format.write_array_header_2_0}
    writers[version](buffer, header)
    return buffer.getvalue() + bytes(4)


def _npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def _sealed(**arrays):
    buffer = io.BytesIO()
    write_sealed(buffer, {"meta": np.array("{}"), **arrays})
    return buffer.getvalue()


def _checkpoint(path):
    with open_archive(path) as archive:
        archive.tensor("w", (2,))


READERS = {
    "checkpoint": (_checkpoint, _sealed(w=np.ones(2, np.float32)), CheckpointError),
    "package": (lambda path: ArrayReader(path.open("rb"), "it")["x"], _npz(x=_claiming((1,))), ArtifactError),
    "images": (read_npz, _npz(x=_claiming((1,)), y=_claiming((1,))), DataError),
    "arrays": (lambda path: read_arrays([path], (1,)), _npz(x=_claiming((1,))), DataError),
    "array": (lambda path: read_arrays([path], (1,)), _claiming((1,)), DataError),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_lack_of_memory_is_not_the_fault_of_the_file(kind, tmp_path, monkeypatch):
    def refuse(*words, **options):
        raise MemoryError

    read, data, _ = READERS[kind]
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(np.lib.format, "read_array", refuse)
    monkeypatch.setattr(np, "load", refuse if kind == "array" else np.load)
    with pytest.raises(MemoryError):
        read(tmp_path / "file")


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "checkpoint"])
def test_a_false_claim_is_the_fault_of_the_file(kind, tmp_path):
    read, _, expected = READERS[kind]
    bad = _claiming(TOO_MANY)
    (tmp_path / "file").write_bytes(bad if kind == "array" else _npz(x=bad, y=bad))
    with pytest.raises(expected, match=rf"its header claims \d{{17}} bytes, found {len(bad)}"):
        read(tmp_path / "file")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_fits_is_read(version):
    data = _claiming((1,), version)
    np.testing.assert_array_equal(load(io.BytesIO(data)), [0.0])
    with load(io.BytesIO(_npz(x=data))) as npz:
        np.testing.assert_array_equal(read_member(npz.zip, "x"), [0.0])
    assert load(io.BytesIO(data)).dtype == np.float32


def test_a_format_of_structures_is_refused():
    data = bytearray(_claiming((1,)))
    data[6] = 3
    with pytest.raises(ValueError, match=r"format 3\.0 of numpy is not read here"):
        load(io.BytesIO(data))


def test_a_checkpoint_whose_seal_claims_too_much_is_damaged(tmp_path):
    good = _sealed(w=np.ones(2, np.float32))
    path = tmp_path / "last.npz"
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, _claiming(TOO_MANY) if name == "sha256.npy" else old.read(name))
    with pytest.raises(CheckpointError, match="its header claims"):
        _checkpoint(path)
