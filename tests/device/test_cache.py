import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from lance_device import cache
from lance_device.cache import CacheUnavailable, Layout, RecordFile, remove_unused

SLOTS, RECORD_BYTES = 40, 96
LAYOUT = Layout({"prefix": "abc", "images": "def"}, SLOTS, RECORD_BYTES)
PLENTY = LAYOUT.nbytes(SLOTS)
RECORDS = np.random.default_rng(0).integers(0, 256, (SLOTS, RECORD_BYTES), dtype=np.uint8)
ALL = np.arange(SLOTS)


def written(path, slots=ALL, nbytes=PLENTY, layout=LAYOUT):
    """A closed file with the records of these slots."""
    file = RecordFile(path, layout, nbytes)
    file.write(slots, RECORDS[slots])
    file.close()
    return path


def read_all(path, nbytes=PLENTY, layout=LAYOUT):
    """Which slots are found, after a check that those hold the right bytes."""
    file = RecordFile(path, layout, nbytes)
    out = np.zeros((SLOTS, RECORD_BYTES), dtype=np.uint8)
    found = file.read(ALL, out)
    file.close()
    np.testing.assert_array_equal(out[found], RECORDS[found])
    return found


def test_records_come_back_in_a_later_process(tmp_path):
    some = np.array([7, 3, 22])
    path = written(tmp_path / "f.cache", some)
    assert np.flatnonzero(read_all(path)).tolist() == [3, 7, 22]
    written(path, np.array([8]))  # and the rest is added to them
    assert np.flatnonzero(read_all(path)).tolist() == [3, 7, 8, 22]
    assert path.stat().st_size == LAYOUT.nbytes(4)


def test_the_file_is_what_its_description_says(tmp_path):
    """Read by nothing but the text at the top of cache.py."""
    data = written(tmp_path / "f.cache", np.array([5, 2])).read_bytes()
    assert data[:8] == b"LANCEFC1"
    length = struct.unpack("<I", data[8:12])[0]
    assert json.loads(data[12 : 12 + length]) == {"prefix": "abc", "images": "def"}
    table = struct.unpack(f"<{2 * SLOTS}I", data[4096 : 4096 + 8 * SLOTS])
    for place, slot in enumerate((5, 2), start=1):
        record = data[8192 + (place - 1) * RECORD_BYTES :][:RECORD_BYTES]
        assert record == RECORDS[slot].tobytes()
        assert table[2 * slot : 2 * slot + 2] == (
            place,
            zlib.crc32(data[:4096] + struct.pack("<I", slot) + record),
        )
    assert sum(table[::2]) == 1 + 2


def test_it_is_no_memory_map(tmp_path):
    file = RecordFile(tmp_path / "f.cache", LAYOUT, PLENTY)
    file.write(ALL, RECORDS)
    file.prefetch(ALL)
    file.read(ALL, np.zeros_like(RECORDS))
    assert "f.cache" not in Path("/proc/self/maps").read_text()
    file.close()


def test_no_flipped_bit_anywhere_gives_wrong_data(tmp_path):
    whole = written(tmp_path / "f.cache").read_bytes()
    random = np.random.default_rng(1)
    table = range(4096, 4096 + 8 * SLOTS)
    positions = [*range(60), *table, *random.integers(8192, len(whole), 100)]
    for position in positions:
        data = bytearray(whole)
        data[position] ^= 1 << int(random.integers(8))
        path = tmp_path / "flipped.cache"
        path.write_bytes(data)
        found = read_all(path)  # compares what is found
        if position < 4096:
            assert not found.any(), position
        else:  # a place that turns into another's costs both
            assert SLOTS - 2 <= found.sum() < SLOTS, position


@pytest.mark.parametrize("length", [0, 5, 4095, 4096, 4100, 8191, 8192, 8200, 8192 + 10 * RECORD_BYTES + 1])
def test_a_torn_file_gives_what_is_whole(tmp_path, length):
    path = written(tmp_path / "f.cache")
    os.truncate(path, length)
    assert read_all(path).sum() == max(0, length - 8192) // RECORD_BYTES


def test_a_damaged_record_is_replaced_where_it_is(tmp_path):
    path = written(tmp_path / "f.cache")
    data = bytearray(path.read_bytes())
    data[8192 + 4 * RECORD_BYTES] ^= 1
    path.write_bytes(data)
    file = RecordFile(path, LAYOUT, PLENTY)
    assert file.read(ALL, np.zeros_like(RECORDS)).tolist() == [slot != 4 for slot in ALL]
    assert file.damaged == 1
    assert file.holds(np.array([4])).all()  # so it is no new one
    file.write(np.array([4]), RECORDS[4:5])
    file.close()
    assert read_all(path).all()
    assert path.stat().st_size == PLENTY


def test_a_record_under_another_slot_is_refused(tmp_path):
    """A table entry copied as a whole: place and check belong together, the slot does not."""
    path = written(tmp_path / "f.cache", np.array([1, 2]))
    data = bytearray(path.read_bytes())
    data[4096 + 8 * 9 : 4096 + 8 * 10] = data[4096 + 8 : 4096 + 16]
    data[4096 + 8 : 4096 + 16] = bytes(8)
    path.write_bytes(data)
    assert np.flatnonzero(read_all(path)).tolist() == [2]


def test_it_grows_to_its_limit_and_no_further(tmp_path):
    path, limit = tmp_path / "f.cache", LAYOUT.nbytes(10) + RECORD_BYTES - 1
    assert np.flatnonzero(read_all(written(path, nbytes=limit), limit)).tolist() == list(range(10))
    assert path.stat().st_size == LAYOUT.nbytes(10)


def test_a_smaller_limit_cuts_it_and_a_larger_one_lets_it_grow(tmp_path):
    path = written(tmp_path / "f.cache", ALL[::-1].copy())  # slot 39 has place 1
    assert np.flatnonzero(read_all(path, LAYOUT.nbytes(6))).tolist() == list(range(34, 40))
    assert path.stat().st_size == LAYOUT.nbytes(6)
    written(path)
    assert read_all(path).all()
    assert path.stat().st_size == PLENTY


def test_places_that_lost_their_entry_are_used_again(tmp_path):
    path = written(tmp_path / "f.cache")
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 80] = bytes(80)
    path.write_bytes(data)
    file = RecordFile(path, LAYOUT, PLENTY)
    assert (file.held, file.room) == (30, 10)
    file.write(ALL[:10], RECORDS[:10])
    assert (file.held, file.room) == (40, 0)
    file.close()
    assert read_all(path).all()
    assert path.stat().st_size == PLENTY


@pytest.mark.parametrize(
    ("identity", "differing"),
    [
        ({"prefix": "xyz", "images": "def"}, ("prefix",)),
        ({"prefix": "xyz", "images": "ghi"}, ("images", "prefix")),
        ({"prefix": "abc", "images": "def", "dtype": "float16"}, ("dtype",)),
    ],
)
def test_a_file_of_other_features_is_emptied(tmp_path, identity, differing):
    path = written(tmp_path / "f.cache")
    other = Layout(identity, SLOTS, RECORD_BYTES)
    file = RecordFile(path, other, PLENTY)
    assert file.stale == differing
    assert file.held == 0
    assert path.stat().st_size == other.nbytes(0)
    file.close()


@pytest.mark.parametrize("content", [b"x", b"\0" * 9000, b"LANCEFC1\xff\xff\xff\xff", b"LANCEFC1\x01\0\0\x005"])
def test_a_file_that_is_none_is_emptied(tmp_path, content):
    path = tmp_path / "f.cache"
    path.write_bytes(content)
    file = RecordFile(path, LAYOUT, PLENTY)
    assert file.stale == ("header",)
    file.write(ALL, RECORDS)
    file.close()
    assert read_all(path).all()


def test_only_one_run_at_a_time(tmp_path):
    path = tmp_path / "f.cache"
    first = RecordFile(path, LAYOUT, PLENTY)
    first.write(ALL, RECORDS)
    other = Layout({"prefix": "of another run"}, SLOTS, RECORD_BYTES)
    for layout in (LAYOUT, other):  # not even one that would empty it
        with pytest.raises(CacheUnavailable, match=r"f\.cache: another run is using this cache"):
            RecordFile(path, layout, PLENTY)
    assert not remove_unused(path)
    first.close()
    assert read_all(path).all()
    assert remove_unused(path)
    assert not path.exists()


def test_a_killed_writer_leaves_good_records(tmp_path):
    path = tmp_path / "f.cache"
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cache as t
file = t.RecordFile(t.Path({str(path)!r}), t.LAYOUT, t.PLENTY)
print("open", flush=True)
while True:
    for slot in t.ALL:
        file.write(t.ALL[slot:slot + 1], t.RECORDS[slot:slot + 1])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(CacheUnavailable, match="another run"):
        RecordFile(path, LAYOUT, PLENTY)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    read_all(path)  # whatever is found is right, and the lock is gone


def test_a_file_without_records_does_not_stay(tmp_path):
    RecordFile(tmp_path / "f.cache", LAYOUT, PLENTY).close()
    assert not (tmp_path / "f.cache").exists()
    file = RecordFile(written(tmp_path / "f.cache"), LAYOUT, PLENTY)
    file.close(discard=True)
    assert not (tmp_path / "f.cache").exists()


def test_a_nearly_full_disk_ends_the_filling_only(tmp_path, monkeypatch):
    file = RecordFile(tmp_path / "f.cache", LAYOUT, PLENTY)
    file.write(ALL[:3], RECORDS[:3])
    monkeypatch.setattr(cache, "RESERVE_BYTES", 1 << 62)
    with pytest.raises(CacheUnavailable, match=r"f\.cache: the disk is nearly full, no further features are"):
        file.write(ALL[3:], RECORDS[3:])
    assert file.read(ALL, np.zeros_like(RECORDS)).sum() == 3
    file.close()


def test_what_the_disk_does_not_permit_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheUnavailable, match=r"cannot use this cache \((File exists|Not a directory)\)"):
        RecordFile(tmp_path / "file" / "f.cache", LAYOUT, PLENTY)
    (tmp_path / "f.cache").mkdir()
    with pytest.raises(CacheUnavailable, match=r"f\.cache: cannot use this cache \(Is a directory\)"):
        RecordFile(tmp_path / "f.cache", LAYOUT, PLENTY)
    with pytest.raises(CacheUnavailable, match=r"g\.cache: no room for features here"):
        RecordFile(tmp_path / "g.cache", LAYOUT, LAYOUT.nbytes(1) - 1)
    assert not (tmp_path / "g.cache").exists()
