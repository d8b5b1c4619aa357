"""Sealed archives: read by numpy like any other, and not one changed byte of content passes."""

import io
import re
import zipfile

import numpy as np
import pytest

from lance_edge.sealed import SealError, check_seal, write_sealed

ARRAYS = {
    "weights": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not C-contiguous
    "meta": np.array('{"step": 3}'),
    "empty": np.zeros((0, 2), np.int64),
}


def sealed(arrays=ARRAYS):
    buffer = io.BytesIO()
    write_sealed(buffer, arrays)
    return buffer.getvalue()


def check(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_seal(archive, len(data))


def test_numpy_reads_it_and_the_same_arrays_give_the_same_bytes():
    data = sealed()
    check(data)
    assert data == sealed()
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        for name, value in ARRAYS.items():
            np.testing.assert_array_equal(archive[name], value)
        assert re.fullmatch("[0-9a-f]{64}", str(archive["sha256"]))
        assert len(archive.files) == 4


def test_every_flipped_byte_is_found_or_changes_no_content():
    data, found = sealed(), 0
    for position in range(len(data)):
        changed = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        try:
            check(changed)
        except Exception:  # zipfile has many kinds for its own structures
            found += 1
            continue
        with np.load(io.BytesIO(changed), allow_pickle=False) as archive:
            assert archive.files == [*ARRAYS, "sha256"]
            for name, value in ARRAYS.items():
                np.testing.assert_array_equal(archive[name], value)
    assert found > len(data) // 2


def rewritten(change, compression=zipfile.ZIP_STORED):
    """The members of a sealed archive, changed and packed again with right checksums of the zip."""
    with zipfile.ZipFile(io.BytesIO(sealed())) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in change(members):
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda members: members[:-1], "its last array is not sha256"),
        (lambda members: [], "its last array is not sha256"),
        (lambda members: [*members, ("more.npy", b"")], "its last array is not sha256"),
        (lambda members: members[1:], "its content is not what sha256 declares"),
        (lambda members: [members[1], members[0], *members[2:]], "its content is not what sha256 declares"),
        (lambda members: [("other.npy", members[0][1]), *members[1:]], "not what sha256 declares"),
        (lambda members: [(members[0][0], members[0][1] + b"x"), *members[1:]], "not what sha256 declares"),
        (lambda members: [*members[:-1], (members[-1][0], bytes(2000))], "its last array is not sha256"),
    ],
)
def test_another_content_is_found(change, words):
    with pytest.raises(SealError, match=words):
        check(rewritten(change))


def test_a_compressed_archive_is_refused_before_it_is_unpacked():
    with pytest.raises(SealError, match="it is compressed, so its arrays could be of any size"):
        check(rewritten(lambda members: members, zipfile.ZIP_DEFLATED))


def test_members_that_claim_more_than_the_file_holds():
    with zipfile.ZipFile(io.BytesIO(sealed())) as archive:
        archive.infolist()[0].file_size = 1 << 40
        with pytest.raises(SealError, match="its arrays together are larger than the file"):
            check_seal(archive, len(sealed()))


def test_nothing_is_pickled():
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        sealed({"evil": np.array([{}], dtype=object)})
