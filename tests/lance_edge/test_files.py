"""A file is the old one or the new one: on a full disk, after a failure, under a reader's eyes."""

import errno
import os
import subprocess
import sys

import pytest

from lance_edge.errors import StorageError
from lance_edge.files import atomic_writer

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(path, data):
    with atomic_writer(path) as file:
        file.write(data)


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_new_file_in_a_new_folder(tmp_path):
    write(tmp_path / "deep/er/file", b"new")
    assert (tmp_path / "deep/er/file").read_bytes() == b"new"
    assert listing(tmp_path / "deep/er") == ["file"]


def test_the_old_file_stands_until_the_block_ends(tmp_path):
    path = tmp_path / "file"
    write(path, b"old")
    with path.open("rb") as reader:
        with atomic_writer(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"
        assert reader.read() == b"old"  # who had it open keeps the old one


def test_the_umask_decides_who_may_read(tmp_path):
    previous = os.umask(0o027)
    try:
        write(tmp_path / "file", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt()])
def test_any_other_failure_passes_and_leaves_nothing(tmp_path, failure):
    path = tmp_path / "file"
    write(path, b"old")

    def stop_half_way():
        with atomic_writer(path) as file:
            file.write(b"half")
            raise failure

    with pytest.raises(type(failure)):
        stop_half_way()
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


def raise_full(*arguments, **options):
    raise FULL


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_disk_full_at_the_end(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write(path, b"old")
    monkeypatch.setattr(call, raise_full)
    with pytest.raises(StorageError) as raised:
        write(path, b"new")
    monkeypatch.undo()
    assert str(raised.value) == (
        f"{path}: cannot write (No space left on device); free some space or choose another place"
    )
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


LIMITED = """
import resource, sys
from pathlib import Path
from lance_edge.errors import StorageError
from lance_edge.files import atomic_writer

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_writer(Path(sys.argv[1])) as file:
        for _ in range(100):
            file.write(bytes(10_000))
except StorageError as error:
    print(error)
"""


def test_the_system_refuses_to_write_more(tmp_path):
    """A real write that fails half way, as on a full card."""
    path = tmp_path / "file"
    write(path, b"old")
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert process.stdout == (
        f"{path}: cannot write (File too large); free some space or choose another place\n"
    )
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


def test_a_full_device(tmp_path, monkeypatch):
    """`/dev/full` accepts to be opened and fails every write."""
    real_open = type(tmp_path).open
    monkeypatch.setattr(
        "pathlib.Path.open", lambda path, mode: real_open(type(path)("/dev/full"), "r+b", buffering=0)
    )
    with pytest.raises(StorageError, match="No space left on device"):
        write(tmp_path / "file", b"data")
    assert listing(tmp_path) == []


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_bytes(b"old")
    for path, reason in (
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "plain/file", "File exists|Not a directory"),
        (tmp_path / ("long" * 70), "File name too long"),
    ):
        with pytest.raises(StorageError, match=f"cannot write \\(({reason})\\); free some space or choose"):
            write(path, b"new")
    assert listing(tmp_path) == ["folder", "plain"]
    assert (tmp_path / "plain").read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_folders_that_cannot_be_synced(tmp_path, monkeypatch, number):
    """Some file systems have no such thing; a failing card is another matter."""
    real_fsync = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 - a link's target
            raise OSError(number, os.strerror(number))
        real_fsync(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(StorageError, match="Input/output error"):
            write(tmp_path / "file", b"new")
    else:
        write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
