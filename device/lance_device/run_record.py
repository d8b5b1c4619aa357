"""`run.json`: everything that one needs to know to read or repeat a measurement."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from lance_device.machine import cpu_entries, describe_self, governor
from lance_device.session import SESSION_CONFIG, SESSION_OPTIONS, runtime_version
from lance_edge.bundle import Bundle
from lance_edge.errors import DataError
from lance_edge.files import atomic_writer, file_digest

SCHEMA_VERSION = 1
PACKAGES = ("lance-edge", "numpy", "pillow", "psutil", "click", "threadpoolctl")
SEAL = "sha256"


def describe_machine() -> dict[str, Any]:
    """Board, processor, system; `None` where the machine does not say."""
    return {
        "board": describe_self(),
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_physical": psutil.cpu_count(logical=False),
        "ram_bytes": psutil.virtual_memory().total,
        "governor": governor(),
        "system": platform.system(),
        "kernel": platform.release(),
        "libc": "-".join(platform.libc_ver()) or None,
    }


def describe_software() -> dict[str, Any]:
    """Versions, and how ONNX Runtime is set up."""
    versions = {"python": platform.python_version(), "onnxruntime": runtime_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return {"versions": versions, "session_options": {**SESSION_OPTIONS, **SESSION_CONFIG}}


def describe_package(bundle: Bundle) -> dict[str, Any]:
    """Which package, by its digests; what its network reads, without the batch."""
    return {
        "path": str(bundle.path),
        "identity_sha256": bundle.sha256,
        "file_sha256": file_sha256(bundle.path),
        "input_shape": list(bundle.manifest.preprocessing.sample_shape),
    }


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    return file_digest(path).hexdigest()


def now_utc() -> str:
    """The time, `2025-01-31T12:00:00+00:00`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write, atomically, with a digest of itself as its last entry."""
    text = _text({"schema_version": SCHEMA_VERSION, **record})
    sealed = {**json.loads(text), SEAL: hashlib.sha256(text.encode()).hexdigest()}
    with atomic_writer(path) as file:
        file.write(f"{_text(sealed)}\n".encode())


def read_record(path: Path) -> dict[str, Any]:
    """What was written.

    Raises:
        DataError: if there is no record, or it is not what was written.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read ({error}); give the --out folder of a run") from None
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not the record of a run; give the --out folder of a run")
    if seal is not None and seal != hashlib.sha256(_text(value).encode()).hexdigest():
        raise DataError(
            f"{path}: not what was written: its {SEAL} differs; it was edited or damaged: copy it again"
        )
    return dict(value)


def _text(record: Any) -> str:
    return json.dumps(record, indent=1, default=str)


def _cpu_model() -> str | None:
    named = cpu_entries()
    if "model name" in named:
        return named["model name"]
    implementer, part = named.get("CPU implementer"), named.get("CPU part")  # ARM: 0x41, 0xd08
    return f"ARM implementer {implementer} part {part}" if part else platform.processor() or None
