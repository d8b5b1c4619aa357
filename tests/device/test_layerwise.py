"""Methods asi and hosvd through the whole runtime, against their formulas in PyTorch in float64."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from device_harness import arrays, assert_same_arrays, refused, spawn, started, table, train, train_words
from layered_package import (
    BATCH,
    ENERGY,
    PARAMETERS,
    RANKS,
    literal_bytes,
    without,
    write_layered_package,
)
from literal_codecs import literal_asi, literal_hosvd, project, rebuild
from threadpoolctl import threadpool_info, threadpool_limits
from tiny_package import CLASSES, PREPROCESSING, SIDE, SPLIT
from torch.nn import functional

from lance_device import codecs, layerwise
from lance_device.codecs import make_codec
from lance_device.features import Batch
from lance_device.graphs import starting_parameters
from lance_device.measure import PhaseMeter
from lance_device.probe import MemoryProbe
from lance_device.session import Graph
from lance_device.step import training_step
from lance_device.step_graphs import StepGraphs
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import ArtifactError, Interrupted, NumericalError
from lance_edge.images import load_batch
from lance_edge.sealed import SEAL, write_sealed

METHODS = ("asi", "hosvd")
LAYERS = ("one", "two")
STEPS, RATE = 4, 0.3


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    return write_layered_package(tmp_path_factory.mktemp("layered") / "pkg.tar")


@pytest.fixture
def opened(layered, images):
    """A step, its weights, and batches by number."""
    part = open_dataset(images, SPLIT).train

    def open_step(method):
        with Bundle(layered.path) as bundle:
            variant = bundle.manifest.variant(method)
            parameters = starting_parameters(bundle, variant)
            return training_step(bundle, variant, parameters, threads=1), parameters, variant

    def batch(number):
        random = np.random.default_rng(number)
        return Batch(part, random.permutation(len(part))[:BATCH], random.random(BATCH) < 0.5, PREPROCESSING)

    return open_step, batch


def run(step, batch, micro_batch=BATCH, before_each=lambda: None):
    return step.run(batch, micro_batch, PhaseMeter(MemoryProbe()), before_each)


# --- the literal method ---------------------------------------------------------------------------------


class Literal:
    """The network in float64; each convolution's weight gradient is taken with its rebuilt input."""

    def __init__(self, package, compress):
        self.stem = torch.from_numpy(package.weights["stem.weight"]).double()
        self.weights = {
            name: torch.tensor(package.weights[name]).double().requires_grad_() for name in PARAMETERS
        }
        self.compress = compress  # (layer, activation) -> bases
        self.ranks = {}

    def loss(self, images, labels):
        features = torch.from_numpy(images).double()
        hidden = functional.relu(functional.conv2d(features, self.stem, stride=2, padding=1))
        for layer in LAYERS:
            hidden = functional.relu(self.conv(layer, hidden))
        logits = functional.linear(hidden.mean((2, 3)), self.weights["head.weight"], self.weights["head.bias"])
        return functional.cross_entropy(logits, torch.from_numpy(labels))

    def conv(self, layer, activation):
        weight = self.weights[f"{layer}.weight"]
        bases = self.compress(layer, activation.detach().float().numpy())
        core = project(activation.detach(), bases)
        self.ranks[layer] = tuple(core.shape)
        learned = functional.conv2d(rebuild(core, bases), weight)
        return functional.conv2d(activation, weight.detach()) + learned - learned.detach()

    def descend(self, batch):
        """A step of plain SGD: the loss before it, and the gradients."""
        images = load_batch(batch.part, batch.indices, PREPROCESSING, batch.flips)
        loss = self.loss(images, batch.labels(slice(0, BATCH)))
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        with torch.no_grad():
            for weight, gradient in zip(self.weights.values(), gradients, strict=True):
                weight -= RATE * gradient
        return loss.item(), dict(zip(self.weights, (g.numpy() for g in gradients), strict=True))


def literal(method, package, state):
    """From the same first subspaces, where the method has some."""
    bases = {
        layer: [
            torch.from_numpy(state[f"{layer}/U{mode}"]).double()
            for mode in range(4)
            if mode > 0 or layer == "one"
        ]
        for layer in (LAYERS if method == "asi" else ())
    }

    def asi(layer, activation):
        whole = [torch.eye(BATCH).double()] * (4 - len(bases[layer]))  # a batch mode that is not compressed
        followed = literal_asi(activation, [*whole, *bases[layer]])
        bases[layer] = followed[len(whole) :]
        return [*whole, *bases[layer]]

    return Literal(package, asi if method == "asi" else lambda _, a: literal_hosvd(a, ENERGY))


# --- loss, gradients, bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batch", [BATCH, 5])
def test_steps_are_those_of_the_literal_method(layered, opened, method, micro_batch):
    """Float32 against float64: about 1e-6 of the largest gradient in a step, a little more after four."""
    open_step, batch = opened
    step, parameters, _ = open_step(method)
    truth = literal(method, layered, step.state())
    seen = []
    for number in range(STEPS):
        outcome = run(step, batch(number), micro_batch)
        loss, gradients = truth.descend(batch(number))
        assert outcome.loss == pytest.approx(loss, rel=1e-5)
        for name, expected in gradients.items():
            difference = np.abs(outcome.gradients[name] - expected).max()
            assert difference <= 1e-4 * np.abs(expected).max(), (name, number)
            parameters[name] -= np.float32(RATE) * outcome.gradients[name]
        assert outcome.activation_bytes == sum(literal_bytes(truth.ranks[layer], layer) for layer in LAYERS)
        seen.append(dict(truth.ranks))
    if method == "asi":
        assert seen == [RANKS] * STEPS
    else:  # the comparison is not one of full ranks, which would be plain backpropagation
        assert all(ranks["one"][0] < BATCH and max(ranks["two"][2:]) < SIDE for ranks in seen)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_any_size_give_the_same(opened, method):
    """Another order of sums in float32; the codec sees the same batch."""
    open_step, batch = opened
    whole = run(open_step(method)[0], batch(0))
    for size in (1, 3, 8):
        outcome = run(open_step(method)[0], batch(0), size)
        assert outcome.loss == pytest.approx(whole.loss, rel=1e-5)
        assert (outcome.correct, outcome.activation_bytes) == (whole.correct, whole.activation_bytes)
        for name, gradient in whole.gradients.items():
            assert np.abs(outcome.gradients[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


@pytest.mark.parametrize("micro_batch", [BATCH, 8, 5])
@pytest.mark.parametrize("method", METHODS)
def test_saved_bytes_are_masks_of_bits_statistics_cores_and_factors(layered, opened, method, micro_batch):
    open_step, batch = opened
    step, _, variant = open_step(method)
    truth = literal(method, layered, step.state())
    truth.descend(batch(0))
    outcome = run(step, batch(0), micro_batch)
    sizes = [len(range(BATCH)[start : start + micro_batch]) for start in range(0, BATCH, micro_batch)]
    masks = sum(-(-8 * SIDE**2 * n // 8) + -(-5 * SIDE**2 * n // 8) for n in sizes)
    vectors = 4 * BATCH * (len(CLASSES) + 5)  # logits and pooled features
    statistics = 4 * (3 * 5 + 3 + 8 * 6 + 5 * truth.ranks["two"][1])  # head, `one`, and `two` on r1 channels
    assert outcome.saved_bytes == masks + vectors + statistics + outcome.activation_bytes
    if method == "asi":  # its ranks are those of the plan
        assert outcome.saved_bytes == variant.saved_bytes(micro_batch, BATCH)
        assert outcome.activation_bytes == variant.activation_bytes


# --- what is alive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batch", [BATCH, 5])
def test_an_activation_is_gone_when_it_is_compressed_and_read(opened, method, micro_batch, monkeypatch):
    """Weak references to every tensor of the whole batch, looked at while each graph runs."""
    open_step, batch = opened
    step, *_ = open_step(method)
    made, alive = {}, {}

    def look(at):
        alive[at] = {name for name, array in made.items() if array() is not None}

    def noted(function):
        def note(*arguments):
            tensors = function(*arguments)
            made.update({name: weakref.ref(array) for name, array in tensors.items() if array.ndim})
            return tensors

        return note

    run_graph = Graph.run

    def watched(self, values):
        look(self.outputs[0])
        return run_graph(self, values)

    compress = step._codec.compress

    def compressing(layer, activation):
        look(layer)
        return compress(layer, activation)

    monkeypatch.setattr(layerwise, "_run_in_parts", noted(layerwise._run_in_parts))
    monkeypatch.setattr(step, "_features", noted(step._features))
    monkeypatch.setattr(step._codec, "compress", compressing)
    monkeypatch.setattr(Graph, "run", watched)
    run(step, batch(0), micro_batch)
    assert alive["two/A"] == {"features"}
    assert alive["two"] == {"two/A"}
    assert alive["loss"] == {"two/A"}  # neither the features nor the unpacked mask of the first part
    assert alive["head.weight/grad"] <= {"logits", "pooled"}  # of which backward reads rows
    assert {"one/mask", "two/mask"} <= made.keys()


# --- leaving a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_step_can_be_left_before_any_micro_batch_of_any_part(opened, method):
    open_step, batch = opened
    calls = []
    run(open_step(method)[0], batch(0), 4, lambda: calls.append(1))
    assert len(calls) == 4 * 4 + 2  # features, two parts of forward, backward; each layer's compression
    for last in (1, 6, 9, 18):
        left = []

        def stop(left=left, last=last):
            left.append(1)
            if len(left) == last:
                raise Interrupted("stop")

        with pytest.raises(Interrupted):
            run(open_step(method)[0], batch(0), 4, stop)
        assert len(left) == last


@pytest.mark.parametrize("method", METHODS)
def test_an_activation_that_is_not_finite_is_named(opened, method):
    open_step, batch = opened
    step, parameters, _ = open_step(method)
    parameters["one.weight"][0] = np.nan
    with pytest.raises(NumericalError, match="the input of layer two: an activation is not finite"):
        run(step, batch(0))


# --- checkpoints ----------------------------------------------------------------------------------------

SUBSPACES = {"codec/one/U0": (16, 5), "codec/one/U1": (6, 3), "codec/one/U2": (6, 4), "codec/one/U3": (6, 2)}
SUBSPACES |= {"codec/two/U1": (8, 4), "codec/two/U2": (6, 3), "codec/two/U3": (6, 3)}
LENGTH = ("--epochs", 3, "--lr", 0.2)  # 7 steps


@pytest.fixture(scope="module")
def whole(layered, images, tmp_path_factory):
    """Runs without a break, by method."""
    outs = {method: tmp_path_factory.mktemp(method) / "run" for method in METHODS}
    for method, out in outs.items():
        started(train(layered, images, out, *LENGTH, "--method", method))
    return outs


def test_subspaces_are_in_the_checkpoint_where_there_are_any(whole):
    for name in ("last.npz", "best.npz"):
        found = {n: a.shape for n, a in arrays(whole["asi"] / name).items() if n.startswith("codec/")}
        assert found == SUBSPACES
        assert not [n for n in arrays(whole["hosvd"] / name) if n.startswith("codec/")]


def test_measured_bytes_are_in_the_rows(whole):
    columns = {
        m: [int(row["activation_bytes"]) for row in table(whole[m] / "steps.csv") if row["phase"] == "step"]
        for m in METHODS
    }
    planned = sum(literal_bytes(ranks, layer) for layer, ranks in RANKS.items())
    assert columns["asi"] == [planned] * 7
    assert len(set(columns["hosvd"])) > 1  # from step to step


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compression", [1, 9, 10])  # of each step's two; the ninth opens step 5
def test_a_stopped_run_resumes_to_the_same_bits(layered, images, whole, tmp_path, method, compression):
    """The signal comes amid a step, when the codec of one layer has moved on and the other's has not."""
    prelude = f"""
import os, signal
from lance_device import codecs
calls = []
def patched(kind):
    compress = kind.compress
    def signalling(self, *arguments):
        calls.append(1)
        if len(calls) == {compression}:
            os.kill(os.getpid(), signal.SIGINT)
        return compress(self, *arguments)
    kind.compress = signalling
patched(codecs.AsiLayers)
patched(codecs.HosvdLayers)
"""
    out, complete = tmp_path / "run", (compression - 1) // 2
    process = spawn(*train_words(layered, images, out), *LENGTH, "--method", method, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"stopped after step {complete} of 7" in errors
    started(train(layered, images, out, "--resume"))
    for name in ("last.npz", "best.npz"):
        assert_same_arrays(out / name, whole[method] / name)


def test_a_step_that_was_left_is_not_in_the_checkpoint(layered, images, tmp_path, monkeypatch):
    """Of two runs, one is left amid its third step: their subspaces are the same, those of step 2."""
    outs = [tmp_path / name for name in ("complete", "left")]
    flags = ("--method", "asi", "--lr", 0.2, "--schedule", "constant", "--cache", "off")
    started(train(layered, images, outs[0], *flags, "--steps", 2))
    calls, compress = [], codecs.AsiLayers.compress

    def interrupting(self, layer, activation):
        calls.append(layer)
        compressed = compress(self, layer, activation)
        if len(calls) == 5:
            raise Interrupted("stop")
        return compressed

    monkeypatch.setattr(codecs.AsiLayers, "compress", interrupting)
    assert train(layered, images, outs[1], *flags, "--steps", 3).exit_code == 130
    assert_same_arrays(outs[1] / "last.npz", outs[0] / "last.npz")


def copied_run(run_folder, to, **changes):
    """A copy of a run's folder with these arrays of its checkpoint replaced, or left out where `None`."""
    to.mkdir()
    for file in run_folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    with np.load(run_folder / "last.npz") as archive:
        stored = {name: archive[name] for name in archive.files if name != SEAL} | changes
    with (to / "last.npz").open("wb") as file:
        write_sealed(file, {name: value for name, value in stored.items() if value is not None})
    return to


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codec/one/U0": None}, "its tensors are not those of the package: codec/one/U0; use another"),
        (dict.fromkeys(SUBSPACES), f"not those of the package: {', '.join(sorted(SUBSPACES))}; use another"),
        ({"codec/two/U0": np.eye(16, dtype=np.float32)}, "not those of the package: codec/two/U0; use another"),
        (
            {"codec/two/U1": np.eye(8, 5, dtype=np.float32)},
            "codec/two/U1 is float32 [8, 5], expected finite float32 [8, 4]",
        ),
        (
            {"codec/two/U1": np.zeros((8, 4), np.float32)},
            "last.npz: layer two: ASI subspace U1: expected orthonormal columns, found others",
        ),
    ],
)
def test_subspaces_that_are_not_the_packages_are_refused(layered, images, whole, tmp_path, changes, words):
    out = copied_run(whole["asi"], tmp_path / "run", **changes)
    before = (out / "last.npz").read_bytes()
    assert words in refused(train(layered, images, out, "--resume"), 4)
    assert (out / "last.npz").read_bytes() == before


def test_subspaces_in_a_checkpoint_of_a_method_without_any_are_refused(layered, images, whole, tmp_path):
    subspace = {"codec/one/U1": np.eye(6, 3, dtype=np.float32)}
    out = copied_run(whole["hosvd"], tmp_path / "run", **subspace)
    line = refused(train(layered, images, out, "--resume"), 4)
    assert "its tensors are not those of the package: codec/one/U1; use another checkpoint" in line


# --- packages that cannot be trained from ----------------------------------------------------------------


def refusal_of(package, method):
    with Bundle(package.path) as bundle:
        variant = bundle.manifest.variant(method)
        with pytest.raises(ArtifactError) as caught:
            training_step(bundle, variant, starting_parameters(bundle, variant), threads=1)
    return str(caught.value)


def test_a_method_that_this_runtime_does_not_compress_with(layered):
    with Bundle(layered.path) as bundle, pytest.raises(ArtifactError) as caught:
        make_codec(bundle.manifest, replace(bundle.manifest.variant("asi"), method="wavelets"))
    assert str(caught.value) == (
        "method wavelets: this runtime compresses with asi, hosvd; install the lance-edge that the package"
        " was made with"
    )


def test_hosvd_without_an_energy(tmp_path):
    package = write_layered_package(tmp_path / "pkg.tar", lambda variant: replace(variant, energy=None))
    assert refusal_of(package, "hosvd") == (
        "method hosvd: the package says no energy threshold; rebuild it with lance-host"
    )


@pytest.mark.parametrize("ranks", [(), (5, 3, 4), (5, 9, 4, 2)])
def test_asi_with_ranks_that_do_not_fit(tmp_path, ranks):
    def change(variant):
        first, second = variant.layers
        return replace(variant, layers=(replace(first, ranks=ranks), second))

    line = refusal_of(write_layered_package(tmp_path / "pkg.tar", change), "asi")
    assert line == (
        "method asi: the package's ranks do not fit (ASI: expected for each mode of (16, 6, 6, 6) a rank from"
        f" 1 to its size, found {ranks}); rebuild it with lance-host"
    )


def test_a_statistic_that_is_of_another_shape_each_time(layered):
    """Numpy would broadcast one row over all: ranks of `hosvd` are of no fixed size, but of one in a batch."""
    with Bundle(layered.path) as bundle:
        variant = bundle.manifest.variant("hosvd")
        graphs = StepGraphs(bundle, variant, starting_parameters(bundle, variant), 1, None, None)
    totals, name = {}, variant.statistics[0].name
    graphs.accumulate(totals, {name: np.ones((5, 2), np.float32)})
    with pytest.raises(ArtifactError) as caught:
        graphs.accumulate(totals, {name: np.ones((1, 2), np.float32)})
    assert f"statistic {name} is [1, 2] after [5, 2] of another micro-batch; rebuild" in str(caught.value)


def test_an_activation_that_no_graph_gives(tmp_path):
    def change(variant):
        first, second = variant.activations
        return replace(variant, activations=(first, replace(second, name="two/B")))

    package = write_layered_package(tmp_path / "pkg.tar", change)
    assert refusal_of(package, "asi") == (
        f"{package.path}: no graph of method asi gives two/B; rebuild the package with lance-host"
    )


def test_a_part_of_forward_that_is_missing(tmp_path):
    package = write_layered_package(tmp_path / "pkg.tar", without("forward-2"))
    assert "no graph of method asi gives loss, logits; rebuild" in refusal_of(package, "asi")


def test_fewer_activations_than_layers(tmp_path, images):
    package = write_layered_package(
        tmp_path / "pkg.tar", lambda variant: replace(variant, activations=variant.activations[:1])
    )
    line = refused(train(package, images, tmp_path / "run", "--method", "asi"), 3)
    assert "expected an activation for each layer of a variant that goes by layer; rebuild" in line


def test_numpy_uses_as_many_threads_as_were_asked_for(opened):
    open_step, _ = opened
    with threadpool_limits(2, user_api="blas"):
        open_step("asi")  # with one thread
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
