import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from lance_device.graphs import load_graph, load_projections, starting_parameters
from lance_device.session import Graph, fits
from lance_device.step import training_step
from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError, PlatformError
from lance_edge.manifest import TensorSpec


@pytest.fixture
def bundle(package):
    with Bundle(package.path) as bundle:
        yield bundle


@pytest.fixture
def variant(bundle):
    return bundle.manifest.variant("lance")


def test_graphs_are_fed_what_they_declare_and_nothing_else(bundle, variant):
    prefix = load_graph(bundle, variant, "prefix", 1)
    assert prefix.inputs == ("images",)
    assert prefix.outputs == ("features",)
    values = prefix.run({"images": np.zeros((2, 3, 12, 12), np.float32), "unused": np.zeros(1)})
    assert values["features"].shape == (2, 6, 6, 6)


def test_a_missing_input_is_named(bundle, variant):
    with pytest.raises(ArtifactError, match=r"graphs/prefix.onnx: input 'images' is provided by no graph"):
        load_graph(bundle, variant, "prefix", 1).run({})


def test_an_input_that_does_not_fit_ends_in_one_line(bundle, variant):
    with pytest.raises(ArtifactError, match=r"graphs/prefix.onnx: onnxruntime cannot run this graph") as caught:
        load_graph(bundle, variant, "prefix", 1).run({"images": np.zeros((2, 5, 12, 12), np.float32)})
    assert "\n" not in str(caught.value)


def test_what_is_no_graph_is_named():
    with pytest.raises(ArtifactError, match=r"^pkg.tar: x.onnx: not a graph that lance-edge runs \(") as caught:
        Graph(b"junk", "pkg.tar: x.onnx", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("Failed to allocate memory for 1e12 bytes")])
def test_too_little_memory_is_named(bundle, variant, monkeypatch, error):
    graph = load_graph(bundle, variant, "prefix", 1)

    def fail(feeds, names):
        raise error

    monkeypatch.setattr(graph, "_fetch", fail)
    with pytest.raises(PlatformError, match=r"not enough memory .* smaller --micro-batch"):
        graph.run({"images": np.zeros((1, 3, 12, 12), np.float32)})


def test_graphs_and_manifest_must_fit_together(bundle, variant):
    parameters = starting_parameters(bundle, variant)
    plain = {role: member for role, member in variant.graphs.items() if role != "gradient"}
    with pytest.raises(ArtifactError, match=r"no graph of method lance gives conv.weight/grad"):
        training_step(bundle, dataclasses.replace(variant, graphs=plain), parameters, 1)
    del plain["forward"]
    with pytest.raises(ArtifactError, match="method lance has no forward graph"):
        training_step(bundle, dataclasses.replace(variant, graphs=plain), parameters, 1)


def test_projections_of_another_batch_are_refused(bundle, variant):
    swapped = dataclasses.replace(variant, batch_projections=("conv/U1",), projections=())
    with pytest.raises(ArtifactError, match="projection conv/U1 has 6 rows, expected one for each of the 16"):
        load_projections(bundle, swapped)


def test_weights_of_another_shape_are_refused(bundle, variant, monkeypatch):
    specs = tuple(dataclasses.replace(spec, shape=(2,)) for spec in bundle.manifest.parameters)
    monkeypatch.setattr(bundle, "manifest", dataclasses.replace(bundle.manifest, parameters=specs))
    with pytest.raises(ArtifactError, match=r"conv.weight is float32 \[8, 6, 1, 1\], expected float32 \[2\];"):
        starting_parameters(bundle, variant)


def test_a_runtime_that_does_not_load_is_named():
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime.capi":
            raise ImportError("libc.so.6: version `GLIBC_2.28' not found")
sys.meta_path.insert(0, Broken())
from lance_device.session import runtime_version
from lance_edge.errors import PlatformError
try:
    runtime_version()
except PlatformError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "onnxruntime is installed but does not load here (libc.so.6: version `GLIBC_2.28'" in done.stdout


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        (("N", 3), (5, 3), True),
        (("N", 3), (5, 4), False),
        (("N", 3), (5, 3, 1), False),
        (("N", "N"), (5, 5), True),
        (("N", "N"), (5, 4), False),
        (("4*N", 3, "N"), (20, 3, 5), True),
        (("4*N", 3), (18, 3), False),
        (("N", "4*N"), (5, 16), False),
        (("r", "r"), (2, 2), True),
        (("r", "N", "r"), (2, 5, 3), False),
    ],
)
def test_shapes_of_names_and_multiples(shape, sizes, expected):
    spec = TensorSpec("x", shape, "float32")
    assert fits(np.zeros(sizes, np.float32), spec, {}) == expected
    assert not fits(np.zeros(sizes, np.float64), spec, {})


def test_a_name_means_the_same_in_all_arrays():
    dims = {}
    assert fits(np.zeros((5, 2), np.float32), TensorSpec("x", ("N", 2), "float32"), dims)
    assert not fits(np.zeros(4, np.float32), TensorSpec("y", ("N",), "float32"), dims)
    assert fits(np.zeros(10, np.float32), TensorSpec("z", ("2*N",), "float32"), dims)
