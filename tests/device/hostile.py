"""Hostile packages, checkpoints and graphs: made by mutation of good ones, and tried in a process of their own.

Most mutations are sealed again (digests and sizes are made to fit), so that they reach what lies behind the
first check.
"""

import hashlib
import io
import json
import os
import select
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hostile_graphs import mutate_graph
from hostile_values import Draw, mutate_bytes, mutate_json
from hypothesis import strategies as st

from lance_edge.bundle import DIGEST_MEMBER, MANIFEST_MEMBER
from lance_edge.sealed import write_sealed

EVIL = f"/tmp/lance-edge-evil-{os.getpid()}"
PAYLOAD = b"cos\nsystem\n(S'touch evil'\ntR."  # a pickle that runs a program
TIMEOUT_S = 60.0  # of a case: a good one takes 0.1 s; the machine may be busy


@dataclass
class Worker:
    """A process that tries cases; a new one takes its place when it dies.

    Its folder is `home`: there a payload that runs leaves a file, and so do names that lead out of a case.
    """

    images: Path
    good: Path
    home: Path
    prelude: str = ""
    process: subprocess.Popen[str] | None = None

    @property
    def outside(self) -> tuple[Path, ...]:
        """Files that nothing in a case may make."""
        return (self.home / "evil", Path(EVIL))

    def try_case(self, kind: str, path: Path) -> dict[str, Any]:
        """`{"outcome": ..., "seconds": ..., "peak_kib": ...}`, where the outcome may be `died` or `hung`."""
        if self.process is None:
            self.process = self._start()
        self.process.stdin.write(f"{kind} {path}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.close()
        return {"outcome": "died" if ready else "hung", "seconds": TIMEOUT_S, "peak_kib": 0}

    def _start(self) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("hostile_worker.py")
        lines = f"""
PAYLOAD = {PAYLOAD!r}
{self.prelude}
import runpy
runpy.run_path({str(script)!r}, None, "__main__")
"""
        command = [sys.executable, "-c", lines, str(self.images), str(self.good)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, cwd=self.home, **pipes)
        assert process.stdout.readline() == "ready\n", "the worker does not start"
        return process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


# --- packages ---


def members_of(package: Path) -> dict[str, bytes]:
    """Name -> content, the manifest first."""
    with tarfile.open(package) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar.getmembers()}


def pack(members: dict[str, bytes], infos: Callable[[tarfile.TarInfo], None] = lambda info: None) -> bytes:
    """A package of these members as they are; `infos` may spoil their headers."""
    content = b""
    for name, data in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        infos(info)
        content += info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    end = -(len(content) + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
    return content + bytes(end)


def seal(members: dict[str, bytes], manifest: Any) -> dict[str, bytes]:
    """The same members with sizes and digests in the manifest that fit."""
    if isinstance(manifest, dict) and isinstance(manifest.get("members"), list):
        for entry in manifest["members"]:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry["name"] in members:
                data = members[entry["name"]]
                entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    encoded = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    line = f"{hashlib.sha256(encoded).hexdigest()}  {MANIFEST_MEMBER}\n".encode()
    rest = {name: data for name, data in members.items() if name not in (MANIFEST_MEMBER, DIGEST_MEMBER)}
    return {MANIFEST_MEMBER: encoded, DIGEST_MEMBER: line, **rest}


def raw_package(draw: Draw, members: dict[str, bytes]) -> bytes:
    """Bytes of the tar, changed anywhere."""
    return mutate_bytes(draw, pack(members))


NAMES = ["../evil", EVIL, "a/../../evil", "graphs\\evil", "x" * 99, "\u202eevil", "graphs", "."]
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"x", b"S", b"V"]


def tar_structure(draw: Draw, members: dict[str, bytes]) -> bytes:
    """Paths that escape, links, devices, sizes that lie, members that come twice."""
    chosen = draw(st.sampled_from(sorted(members)))
    kind = draw(st.sampled_from(["name", "type", "size", "order", "twice"]))

    def spoil(info: tarfile.TarInfo) -> None:
        if info.name != chosen:
            return
        if kind == "name":
            info.name = draw(st.sampled_from(NAMES))
        elif kind == "type":
            info.type, info.linkname = draw(st.sampled_from(KINDS)), draw(st.sampled_from(NAMES))
        elif kind == "size":
            info.size = draw(st.sampled_from([0, 1, 1 << 20, (1 << 33) - 1]))

    if kind == "order":
        return pack(dict(draw(st.permutations(sorted(members.items())))))
    data = pack(members, spoil)
    return data + pack(members) if kind == "twice" else data


def other_manifest(draw: Draw, members: dict[str, bytes]) -> bytes:
    """Another plan, well sealed."""
    return pack(seal(members, mutate_json(draw, json.loads(members[MANIFEST_MEMBER]))))


def _with_member(members: dict[str, bytes], name: str, data: bytes) -> bytes:
    return pack(seal({**members, name: data}, json.loads(members[MANIFEST_MEMBER])))


def other_arrays(draw: Draw, members: dict[str, bytes]) -> bytes:
    """Another content of an npz member, well sealed."""
    name = draw(st.sampled_from(sorted(name for name in members if name.endswith(".npz"))))
    return _with_member(members, name, mutate_npz(draw, members[name]))


def other_graph(draw: Draw, members: dict[str, bytes]) -> bytes:
    """Another graph, well sealed."""
    name = draw(st.sampled_from(sorted(name for name in members if name.endswith(".onnx"))))
    return _with_member(members, name, mutate_graph(draw, members[name]))


# --- arrays ---


def npy(header: dict[str, Any], data: bytes = b"") -> bytes:
    """An array of this header, whatever follows."""
    text = repr(header).encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 65536) + text + data


HUGE = st.sampled_from(
    [(1 << 40,), (1 << 62, 4), (-1,), (1 << 20, 1 << 20), (2**31, 2**31, 2**31), (0, 1 << 40)]
)


def mutate_npz(draw: Draw, data: bytes) -> bytes:
    """Other arrays, sizes that lie, compression, damage."""
    kind = draw(st.sampled_from(["bytes", "array", "header", "bomb", "names", "pickle"]))
    if kind == "bytes":
        return mutate_bytes(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(entries)))
    compression = zipfile.ZIP_STORED
    if kind == "array":
        entries[name] = _npy_bytes(_odd_array(draw))
    elif kind == "header":
        descr = draw(
            st.sampled_from(["<f4", "|O", "<U1000000", "<f8", ">f4", "|V8", "<M8[ns]", "junk", [("a", "<f4")]])
        )
        header = {"descr": descr, "fortran_order": draw(st.booleans()), "shape": draw(HUGE)}
        entries[name] = npy(header, bytes(draw(st.integers(0, 64))))
    elif kind == "bomb":
        entries[name], compression = bytes(draw(st.sampled_from([1 << 10, 32 << 20]))), zipfile.ZIP_DEFLATED
    elif kind == "names":
        entries[draw(st.sampled_from([*NAMES, "meta.npy", "optimizer/x.npy"]))] = entries.pop(name)
    else:
        entries[name] = npy({"descr": "|O", "fortran_order": False, "shape": (1,)}, PAYLOAD)
    return _zip_bytes(entries, compression)


def _odd_array(draw: Draw) -> Any:
    shape = draw(st.lists(st.integers(0, 9), max_size=5))
    dtype = draw(st.sampled_from(["<f4", "<f4", "<f8", "<i8", "|b1", "<U3", "<c8", "<f2"]))
    filled = np.zeros(shape, dtype)
    if dtype in ("<f4", "<f8"):
        filled[...] = draw(st.sampled_from([0, 1, np.nan, np.inf, 3e38, 1e-45]))
    return filled


def _npy_bytes(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _zip_bytes(entries: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return buffer.getvalue()


# --- checkpoints ---


def mutate_checkpoint(draw: Draw, data: bytes) -> bytes:
    """Damage, or other contents under a right seal."""
    kind = draw(st.sampled_from(["npz", "meta", "tensor"]))
    if kind == "npz":
        return mutate_npz(draw, data)
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "sha256"}
    if kind == "meta":
        meta = mutate_json(draw, json.loads(str(arrays["meta"])))
        arrays["meta"] = np.array(json.dumps(meta))
    else:
        arrays[draw(st.sampled_from([*sorted(arrays), "more"]))] = _odd_array(draw)
    buffer = io.BytesIO()
    write_sealed(buffer, arrays)
    return buffer.getvalue()
