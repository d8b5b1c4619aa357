"""How much memory the next task's subspaces take on a board: what docs/continual.md says, measured."""

import subprocess
import sys
import tracemalloc

import pytest
from test_collect import LAYERS

from lance_device.moments_pass import moment_bytes
from lance_edge.moments import LayerMoments

MIB = 1 << 20
# Prints by how much the process grew, in bytes, while a layer's memory was extended and its spectrum taken.
# A first, small call has the libraries allocate what they keep.
GROWTH = """
import resource, numpy as np
from lance_edge.manifest import Layer
from lance_edge.memory import empty_layer, extend_layer
from lance_edge.protected_spectra import layer_spectra_of
def run(size):
    layer = Layer("l", "l.weight", (4, size), (size,), (4,), (), (), (), 1)
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((size, size // 2)) * 0.99 ** np.arange(size // 2)
    moment = (factor @ factor.T)[None]
    del factor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = extend_layer(empty_layer(1, size), moment, 0.9)
    moments = {0: np.eye(8), 1: moment}
    spectra = layer_spectra_of(layer, "patch", 8, moments, memory, 0.95)
    spectra[1].projection(spectra[1].rank(0.95))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
run(64)
print(run(SIZE))
"""


@pytest.mark.parametrize(
    ("size", "matrices"),
    [
        (768, 6),  # exact: six D x D float64
        pytest.param(2048, 6, marks=pytest.mark.slow),
        pytest.param(2304, 4, marks=pytest.mark.slow),  # randomised: columns follow the rank, here below D / 4
    ],
)
def test_eigenvectors_take_what_the_docs_say(size, matrices):
    code = GROWTH.replace("SIZE", str(size))
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) <= matrices * 8 * size**2 + 8 * MIB  # allocators keep some


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("protected_only", [False, True])
def test_moments_keep_what_a_pass_counts(layer, protected_only):
    batch = 16
    tracemalloc.start()
    try:
        moments = LayerMoments(layer, "patch", batch, None, protected_only)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    channels, rows, columns = layer.input_shape
    inputs = 4 * batch * channels * rows * columns
    assert moments.batches == 0
    assert (
        abs(kept + inputs - moment_bytes(layer, "patch", batch, protected_only)) < 8192
    )  # Python's own objects
