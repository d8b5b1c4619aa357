import numpy as np
import pytest
import torch
from tiny_package import CHANNELS, CLASSES, PREPROCESSING, SIDE, SPLIT, write_tiny_package
from tiny_training import features_of, logits_of, loss_of, rebuilt, trainable

from lance_device.features import Batch
from lance_device.graphs import starting_parameters
from lance_device.measure import PhaseMeter
from lance_device.probe import MemoryProbe
from lance_device.step import training_step
from lance_device.step_graphs import micro_batches
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import Interrupted, NumericalError
from lance_edge.images import load_batch

TWO_PASSES = "lance in two passes"
METHODS = ("bp", "lance", TWO_PASSES)


@pytest.fixture(scope="session")
def two_passes(tmp_path_factory):
    return write_tiny_package(tmp_path_factory.mktemp("two") / "pkg.tar", schedule="two passes")


@pytest.fixture
def run(package, two_passes, images):
    part = open_dataset(images, SPLIT).train

    def run(method, micro_batch, change=None, before_each=lambda: None, seed=3):
        path = two_passes.path if method == TWO_PASSES else package.path
        method = method.partition(" ")[0]
        with Bundle(path) as bundle:
            variant = bundle.manifest.variant(method)
            parameters = starting_parameters(bundle, variant)
            if change is not None:
                change(parameters)
            step = training_step(bundle, variant, parameters, threads=1)
        random = np.random.default_rng(seed)
        indices, flips = random.permutation(len(part))[:16], random.random(16) < 0.5
        batch = Batch(part, indices, flips, PREPROCESSING)
        meter = PhaseMeter(MemoryProbe())
        outcome = step.run(batch, micro_batch, meter, before_each)
        return outcome, variant, meter, (load_batch(part, indices, PREPROCESSING, flips), part.labels[indices])

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batch", [16, 5])
def test_loss_and_gradients_equal_pytorch(package, run, method, micro_batch):
    outcome, _, _, (images, labels) = run(method, micro_batch)
    weights = trainable(package)
    loss = loss_of(package, weights, method.partition(" ")[0], images, labels)
    loss.backward()
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in weights.items():
        expected = weight.grad.numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(outcome.gradients[name], expected, rtol=0, atol=1e-4 * scale, err_msg=name)
    features = features_of(package, images)
    logits = logits_of(features, weights, features).detach().numpy()
    assert outcome.correct == (logits.argmax(axis=1) == labels).sum()


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_any_size_give_the_same(run, method):
    whole, *_ = run(method, 16)
    for size in (1, 3, 8):
        parts, *_ = run(method, size)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        assert parts.correct == whole.correct
        for name, gradient in whole.gradients.items():
            difference = np.abs(parts.gradients[name] - gradient).max()
            assert difference <= 1e-5 * np.abs(gradient).max(), (name, size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batch", [16, 5])
def test_measured_saved_bytes_are_those_of_the_plan(run, method, micro_batch):
    outcome, variant, *_ = run(method, micro_batch)
    assert outcome.saved_bytes == variant.saved_bytes(micro_batch, 16)


def test_two_passes_keep_a_bit_for_each_value_of_a_mask(run):
    outcome, variant, *_ = run(TWO_PASSES, 4)
    mask = 16 * CHANNELS * SIDE**2 // 8
    rest = 4 * 16 * (len(CLASSES) + CHANNELS)  # logits and pooled features, float32
    statistics = sum(spec.nbytes(4) for spec in variant.statistics)
    assert outcome.saved_bytes == mask + rest + statistics + variant.factor_bytes


@pytest.mark.parametrize("method", METHODS)
def test_a_step_can_be_left_before_any_micro_batch_of_any_pass(run, method):
    calls = []
    run(method, 4, before_each=lambda: calls.append(1))
    assert len(calls) == (8 if method == TWO_PASSES else 4)


def test_phases_are_timed_over_all_micro_batches(run):
    _, _, meter, _ = run("lance", 4)
    costs = meter.take_step()
    assert set(costs) == {"data", "prefix", "forward", "backward", "step"}
    assert all(cost.latency_ns > 0 for cost in costs.values())
    assert costs["step"].latency_ns == sum(cost.latency_ns for name, cost in costs.items() if name != "step")


def test_a_loss_that_is_no_number_is_named(run):
    def spoil(parameters):
        parameters["head.bias"][0] = np.nan

    with pytest.raises(NumericalError, match="the loss is nan"):
        run("bp", 8, spoil)


def test_a_step_can_be_left_between_micro_batches(run):
    calls = []

    def stop_at_third():
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run("bp", 4, before_each=stop_at_third)
    assert len(calls) == 3


def test_micro_batches_cover_every_row():
    assert list(micro_batches(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]


def test_reference_is_literal():
    """With full bases the stand-in is the activation itself, so LANCE is plain backpropagation."""
    torch.manual_seed(0)
    activation = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    bases = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in activation.shape]
    torch.testing.assert_close(rebuilt(activation, bases), activation)
