"""Files made by strangers: whatever is in them, the end is a good run or one line and the exit code of a
`LanceError`.

Each case is tried in a process of its own with 1 GiB of memory.  It may not die, hang, take more memory than it
has, write beside its folder or run anything.  Some hundred cases here, always the same; `-m slow` tries 10,000
others every time.
"""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from device_harness import started, train
from hostile import (
    Worker,
    members_of,
    mutate_checkpoint,
    other_arrays,
    other_graph,
    other_manifest,
    raw_package,
    tar_structure,
)
from hostile_graphs import mutate_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layered_package import write_layered_package
from onnx import numpy_helper
from tiny_package import CLASSES, PREPROCESSING

from lance_edge.records import to_json

SLOW_S = 30.0  # a good case takes 0.2 s
PEAK_KIB = 1_300_000  # the limit of the worker, and what a process has beside its data
CASES = 40
MANY_CASES = 1_150  # nine of them: 10,350

# What is mutated, of which package: methods that stream micro-batches, or go by layer.
PACKAGES = {
    "bytes": (raw_package, "package"),
    "tar": (tar_structure, "package"),
    "manifest": (other_manifest, "package"),
    "arrays": (other_arrays, "package"),
    "graph": (other_graph, "package"),
    "manifest by layer": (other_manifest, "layered"),
    "graph by layer": (other_graph, "layered"),
}


@pytest.fixture(scope="module")
def good(package, tmp_path_factory):
    """The packages that are mutated."""
    layered = write_layered_package(tmp_path_factory.mktemp("layered") / "pkg.tar")
    return {"package": package.path, "layered": layered.path}


@pytest.fixture(scope="module")
def members(good):
    return {kind: members_of(path) for kind, path in good.items()}


@pytest.fixture(scope="module")
def checkpoint(package, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("good") / "run"
    started(train(package, images, out, "--steps", 2, "--lr", 0.1, "--eval-every", 0, "--quiet"))
    return (out / "last.npz").read_bytes()


@pytest.fixture(scope="module")
def exported(package, members):
    """The network as one inference graph, as `lance-host merge` writes it."""
    files = [members["package"][f"graphs/{name}.onnx"] for name in ("prefix", "predict")]
    parts = [onnx.load_model_from_string(file) for file in files]
    model = onnx.compose.merge_models(*parts, io_map=[("features", "features")])
    for value in [value for value in model.graph.input if value.name != "images"]:
        model.graph.input.remove(value)
        model.graph.initializer.append(numpy_helper.from_array(package.weights[value.name], value.name))
    texts = {"classes": json.dumps(CLASSES), "preprocessing": json.dumps(to_json(PREPROCESSING))}
    onnx.helper.set_model_props(model, texts)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def worker(package, images, tmp_path_factory):
    worker = Worker(images, package.path, tmp_path_factory.mktemp("home"))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cases")


def _try(worker, folder, kind, content):
    """One case; what came of it."""
    case = folder / "case"
    case.write_bytes(content)
    answer = worker.try_case(kind, case)
    outcome = answer["outcome"]
    assert outcome == "used" or outcome.startswith("error: "), outcome
    assert "\n" not in outcome
    assert answer["seconds"] < SLOW_S
    assert answer["peak_kib"] < PEAK_KIB
    assert [entry.name for entry in folder.iterdir()] == ["case"], "it wrote beside its folder"
    assert not any(place.exists() for place in worker.outside), "it ran code, or wrote outside its folder"
    return outcome


def _settings(count):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count,
        derandomize=count == CASES,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


def test_what_is_mutated_here_is_good(worker, folder, good, checkpoint, exported):
    for kind, path in good.items():
        assert _try(worker, folder, kind, path.read_bytes()) == "used"
    assert _try(worker, folder, "checkpoint", checkpoint) == "used"
    assert _try(worker, folder, "graph", exported) == "used"


def test_code_that_runs_would_be_seen(package, images, folder, tmp_path):
    """A worker that unpickles whatever it gets, given what `mutate_npz` hides in an array."""
    worker = Worker(images, package.path, tmp_path, prelude="import pickle; pickle.loads(PAYLOAD)")
    try:
        with pytest.raises(AssertionError, match="it ran code"):
            _try(worker, folder, "checkpoint", b"")
    finally:
        worker.close()


@pytest.mark.parametrize("count", [CASES, pytest.param(MANY_CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", PACKAGES)
def test_packages(worker, folder, members, kind, count):
    @_settings(count)
    @given(data=st.data())
    def fuzz(data):
        mutate, package = PACKAGES[kind]
        _try(worker, folder, package, mutate(data.draw, dict(members[package])))

    fuzz()


@pytest.mark.parametrize("count", [CASES, pytest.param(MANY_CASES, marks=pytest.mark.slow)])
def test_checkpoints(worker, folder, checkpoint, count):
    @_settings(count)
    @given(data=st.data())
    def fuzz(data):
        _try(worker, folder, "checkpoint", mutate_checkpoint(data.draw, checkpoint))

    fuzz()


@pytest.mark.parametrize("count", [CASES, pytest.param(MANY_CASES, marks=pytest.mark.slow)])
def test_graphs(worker, folder, exported, count):
    @_settings(count)
    @given(data=st.data())
    def fuzz(data):
        _try(worker, folder, "graph", mutate_graph(data.draw, exported))

    fuzz()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["package", "checkpoint", "graph"])
def test_guided_by_coverage(good, members, checkpoint, kind, tmp_path):
    """By atheris, in the readers alone; `scripts/fuzz.py` does it for as long as one likes."""
    pytest.importorskip("atheris")
    seeds = {
        "package": [path.read_bytes() for path in good.values()],
        "checkpoint": [checkpoint],
        "graph": [data for name, data in members["package"].items() if name.endswith(".onnx")],
    }[kind]
    (tmp_path / "seeds").mkdir()
    for number, data in enumerate(seeds):
        (tmp_path / "seeds" / str(number)).write_bytes(data)
    script = Path(__file__).parents[2] / "scripts" / "fuzz.py"
    command = [sys.executable, str(script), kind, "--package", str(good["package"]), str(tmp_path / "seeds")]
    done = subprocess.run([*command, "-runs=20000"], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done 20000 runs" in done.stderr
