"""How much memory the next task's subspaces take on a board: what docs/continual.md says, measured."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from test_collect import LAYERS

from lance_device.moments_pass import moment_bytes
from lance_edge import moments
from lance_edge.manifest import Layer
from lance_edge.memory import pack
from lance_edge.moments import protected_shape

MIB = 1 << 20
# Prints by how much the process grew, in bytes, while a layer's memory was extended and its spectrum taken.
# A first, small call has the libraries allocate what they keep.
GROWTH = """
import numpy as np
from lance_device.guard import status_bytes
from lance_edge.manifest import Layer
from lance_edge.memory import empty_layer, extend_layer
from lance_edge.protected_spectra import layer_spectra_of
def run(size):
    layer = Layer("l", "l.weight", (4, size), (size,), (4,), (), (), (), 1)
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((size, size // 2)) * 0.99 ** np.arange(size // 2)
    moment = (factor @ factor.T)[None]
    del factor
    before = status_bytes("VmRSS")
    memory = extend_layer(empty_layer(1, size), moment, 0.9)
    moments = {0: np.eye(8), 1: moment}
    spectra = layer_spectra_of(layer, "patch", 8, moments, memory, 0.95)
    spectra[1].projection(spectra[1].rank(0.95))
    return status_bytes("VmHWM") - before
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
    assert 8 * size**2 < int(output) <= matrices * 8 * size**2 + 8 * MIB  # allocators keep some


# A sample's patches are many chunks, of one group and of many; moments of 2 MiB and more.
LARGE = (
    Layer("patches", "w", (8, 16, 3, 3), (16, 64, 64), (8, 64, 64), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    Layer("depthwise", "w", (64, 1, 5, 5), (64, 28, 28), (64, 28, 28), (1, 1), (2, 2, 2, 2), (1, 1), 64),
    Layer("features", "w", (8, 768), (4, 768), (4, 8), (), (), (), 1),
)
PYTHONS = 32 << 10  # its own objects


@pytest.mark.parametrize("layer", [*LAYERS, *LARGE], ids=lambda layer: layer.name)
@pytest.mark.parametrize("protected_only", [False, True])
@pytest.mark.parametrize("with_memory", [False, True])
def test_moments_take_what_a_pass_counts(monkeypatch, layer, protected_only, with_memory):
    """From the first to the last: what is kept, adding two batches, and the means."""
    monkeypatch.setattr(moments, "CHUNK_VALUES", 1 << 15)
    batch = 4
    groups, rows = protected_shape(layer, "patch")
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((rows, rows // 2)))[0]
    memory = pack([basis] * groups) if with_memory else None
    inputs = np.random.default_rng(1).standard_normal((batch, *layer.input_shape), dtype=np.float32)
    counted = moment_bytes(layer, "patch", batch, protected_only) - inputs.nbytes
    work = moments.work_bytes(layer, "patch", batch, protected_only)
    tracemalloc.start()
    try:
        running = moments.LayerMoments(layer, "patch", batch, memory, protected_only)
        kept, _ = tracemalloc.get_traced_memory()
        running.add(inputs)
        running.add(inputs)
        _, adding = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        found = running.moments()
        handed_over, reading = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(moment.nbytes for moment in found.values()) == counted
    assert abs(kept - counted) < PYTHONS
    assert adding < counted + work + PYTHONS
    assert reading < counted + 2 * 8 * moments.CHUNK_VALUES + PYTHONS
    assert handed_over < counted + PYTHONS
