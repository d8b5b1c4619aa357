"""A file in another's place, and files that are not there: said by name, and before PyTorch is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lance_edge.memory import empty_memory, write_memory
from lance_edge.sealed import write_sealed
from lance_edge.statistics import Statistics, write_statistics

MEMORY = "this is a memory of earlier tasks: --memory"
STATISTICS = "this is a stats file of lance-device collect: --stats"
CHECKPOINT = "this is a checkpoint of a run: --checkpoint"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """`memory.npz`, `stats.npz`, `last.npz`, `data/`, and `empty/` with a class without images."""
    folder = tmp_path_factory.mktemp("files")
    write_memory(folder / "memory.npz", empty_memory("patch", "net.py:make"))
    moments = Statistics("one", ("a", "b"), "patch", "", "", "", 2, 1, {"conv": {1: np.eye(3)[None]}})
    write_statistics(folder / "stats.npz", moments)
    with (folder / "last.npz").open("wb") as file:
        meta = json.dumps({"schema_version": 3, "run_id": "x", "artifact_sha256": "0" * 64})
        write_sealed(file, {"meta": np.array(meta), "weight": np.zeros(3, np.float32)})
    for name in ("data/a", "data/b", "empty/a", "empty/b"):
        (folder / name).mkdir(parents=True)
    for name in (
        "data/a/1.png",
        "data/a/2.png",
        "data/b/1.png",
        "data/b/2.png",
        "empty/a/1.png",
        "empty/a/2.png",
    ):
        (folder / name).write_bytes(b"not looked at")
    return folder


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("memory", "--checkpoint", "gone.npz", "--data", "data"), 4, "cannot open the checkpoint"),
        (("memory", "--checkpoint", "memory.npz", "--data", "data"), 4, f"{MEMORY}, not the checkpoint"),
        (("memory", "--checkpoint", "stats.npz", "--data", "data"), 4, f"{STATISTICS}, not the checkpoint"),
        (("memory", "--checkpoint", "last.npz", "--memory", "stats.npz"), 3, f"{STATISTICS}, not the memory"),
        (("memory", "--checkpoint", "last.npz", "--memory", "last.npz"), 3, f"{CHECKPOINT}, not the memory"),
        (("memory", "--checkpoint", "last.npz", "--memory", "gone.npz"), 3, "cannot open the memory"),
        (("memory", "--checkpoint", "last.npz", "--stats", "memory.npz"), 3, f"{MEMORY}, not the statistics"),
        (("calibrate", "--checkpoint", "last.npz", "--stats", "last.npz"), 3, f"{CHECKPOINT}, not the stat"),
        (
            ("calibrate", "--checkpoint", "last.npz", "--memory", "stats.npz"),
            3,
            f"{STATISTICS}, not the memory",
        ),
        (
            ("calibrate", "--checkpoint", "last.npz", "--data", "empty"),
            5,
            "empty/b: no images in this class folder",
        ),
        (("calibrate", "--data", "gone"), 5, "gone"),
    ],
)
def test_the_file_is_named_and_said_to_be_what_it_is(files, lance_host, monkeypatch, words, code, message):
    monkeypatch.chdir(files)
    result = lance_host(*words, "-o", "never")
    assert result.exit_code == code, (result.output, result.exception)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (files / "never").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("memory", "--checkpoint", "last.npz", "--memory", "stats.npz"),
        ("calibrate", "--checkpoint", "last.npz", "--data", "empty"),
    ],
)
def test_it_is_said_before_pytorch_is_imported(files, words):
    code = """
import atexit, sys
atexit.register(lambda: print(sorted({"torch", "onnx"} & set(sys.modules))))
from lance_host.cli import cli
cli()
"""
    command = [sys.executable, "-c", code, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=files)
    assert result.returncode in (3, 5), result.stderr
    assert result.stdout == "[]\n"
