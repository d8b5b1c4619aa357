import numpy as np
import pytest
import torch

from lance_device.optimizer import SGD
from lance_device.schedule import SCHEDULES
from lance_edge.errors import NumericalError

SHAPES = {"conv.weight": (8, 6, 3, 3), "head.weight": (3, 8), "head.bias": (3,)}


def _draw(random, scale):
    return {name: random.normal(0, scale, shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("clip", [0.0, 2.0])
def test_updates_equal_pytorch(momentum, weight_decay, clip):
    random = np.random.default_rng(0)
    parameters, velocity = _draw(random, 1.0), {}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
    reference = torch.optim.SGD(tensors.values(), lr=0.05, momentum=momentum, weight_decay=weight_decay)
    sgd = SGD(momentum, weight_decay, clip)
    for step in range(20):
        gradients = _draw(random, 0.01 if step % 3 == 0 else 1.0)  # below and above the clipping norm
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradients[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        reference.step()
        sgd.update(parameters, velocity, gradients, 0.05)
    for name, tensor in tensors.items():  # a few roundings of values near 1 apart
        np.testing.assert_allclose(parameters[name], tensor.detach().numpy(), rtol=0, atol=1e-6)
    assert set(velocity) == (set(SHAPES) if momentum else set())


def test_weights_are_updated_in_place():
    parameters = {"w": np.ones(3, np.float32)}
    kept = parameters["w"]
    SGD(0.9, 0, 0).update(parameters, {}, {"w": np.ones(3, np.float32)}, 0.5)
    assert parameters["w"] is kept
    np.testing.assert_array_equal(kept, [0.5, 0.5, 0.5])
    assert kept.dtype == np.float32


@pytest.mark.parametrize("clip", [0.0, 2.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value, clip):
    """`numerics.check_gradients` names its layer before; if it did not, nothing would be spoilt."""
    parameters = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    velocity = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    gradients = {"a": np.ones(2, np.float32), "b": np.array([1, value], np.float32)}
    with pytest.raises(NumericalError, match="the update of b is not finite in float32"):
        SGD(0.9, 0, clip).update(parameters, velocity, gradients, 0.1)
    for tensors in (parameters, velocity):
        for tensor in tensors.values():
            np.testing.assert_array_equal(tensor, 1)


def test_an_update_beyond_float32_changes_nothing():
    parameters, velocity = {"a": np.ones(2, np.float32)}, {}
    with pytest.raises(NumericalError, match="the update of a is not finite in float32"):
        SGD(0.9, 0, 0).update(parameters, velocity, {"a": np.full(2, 1e30, np.float32)}, 1e9)
    np.testing.assert_array_equal(parameters["a"], 1)
    assert velocity == {}


def test_cosine_equals_pytorch_and_ends_at_one_percent():
    tensor = torch.zeros(1, requires_grad=True)
    reference = torch.optim.SGD([tensor], lr=0.05)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=37, eta_min=0.0005)
    for step in range(38):
        assert SCHEDULES["cosine"](0.05, step, 37) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
        reference.step()
        rates.step()
    assert SCHEDULES["cosine"](0.05, 37, 37) == pytest.approx(0.0005)
    assert SCHEDULES["constant"](0.05, 12, 37) == 0.05
