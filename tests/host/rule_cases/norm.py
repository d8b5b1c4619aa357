"""Normalisations.

Their gradients subtract means of the same size as what remains, so more of float32's digits are lost.  All are
lost where only two values are normalised: they become 1 and -1 whatever they were, so the gradient is 0.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st

from rule_cases.case import Case, shapes

TOLERANCE = 1e-4
EPSILONS = st.sampled_from([1e-5, 1e-3, 0.1])


@st.composite
def batch_norm(draw: st.DrawFn) -> Case:
    """Frozen, with gradients of its statistics as well; or with the batch's."""
    shape = ("N", draw(st.integers(1, 4)), *[draw(st.integers(2, 4)) for _ in range(draw(st.integers(0, 2)))])
    epsilon = draw(EPSILONS)
    channel = [-1, *[1] * (len(shape) - 2)]

    def frozen(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        gamma, beta, mean, variance = (value.reshape(channel) for value in rest)
        return (x - mean) * gamma / (variance + epsilon).sqrt() + beta

    inputs = {"x": shape} | dict.fromkeys(("gamma", "beta", "mean", "variance"), (shape[1],))
    return Case(inputs, frozen, attributes={"epsilon": epsilon}, positive=("variance",), tolerance=TOLERANCE)


@st.composite
def batch_norm_of_batch(draw: st.DrawFn) -> Case:
    """Statistics of the batch: the gradient passes through them."""
    channels = draw(st.integers(1, 4))
    shape = ("N", channels, *[draw(st.integers(3, 4)) for _ in range(draw(st.integers(1, 2)))])
    epsilon = draw(EPSILONS)

    def function(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=epsilon)

    statistics = {"mean": torch.zeros(channels).numpy(), "variance": torch.ones(channels).numpy()}
    return Case(
        {"x": shape, "gamma": (channels,), "beta": (channels,)},
        function,
        statistics,
        {"epsilon": epsilon, "training_mode": 1},
        outputs=("y", "running_mean", "running_variance"),
        tolerance=TOLERANCE,
    )


@st.composite
def layer_norm(draw: st.DrawFn) -> Case:
    shape = draw(shapes(2, 4))
    axis = draw(st.integers(1, len(shape) - 1))
    last = [*(int(dim) for dim in shape[axis:-1]), int(shape[-1]) + 4]
    epsilon = draw(EPSILONS)
    signed = axis - len(shape) if draw(st.booleans()) else axis
    return Case(
        {"x": (*shape[:axis], *last), "gamma": last, "beta": last},
        lambda x, gamma, beta: F.layer_norm(x, last, gamma, beta, epsilon),
        attributes={"axis": signed, "epsilon": epsilon},
        tolerance=TOLERANCE,
    )


@st.composite
def group_norm(draw: st.DrawFn) -> Case:
    """Before opset 21 the operator has a scale for each group, since then one for each channel."""
    groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = [draw(st.integers(5, 6)) for _ in range(draw(st.integers(1, 2)))]
    epsilon, opset = draw(EPSILONS), draw(st.sampled_from([18, 21]))
    entries = groups if opset == 18 else groups * each

    def function(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        per_channel = [v.repeat_interleave(groups * each // entries) for v in (gamma, beta)]
        return F.group_norm(x, groups, *per_channel, epsilon)

    return Case(
        {"x": ("N", groups * each, *size), "gamma": (entries,), "beta": (entries,)},
        function,
        attributes={"num_groups": groups, "epsilon": epsilon},
        opset=opset,
        tolerance=TOLERANCE,
    )


@st.composite
def instance_norm(draw: st.DrawFn) -> Case:
    channels, epsilon = draw(st.integers(1, 4)), draw(EPSILONS)
    size = [draw(st.integers(5, 6)) for _ in range(draw(st.integers(1, 2)))]
    return Case(
        {"x": ("N", channels, *size), "gamma": (channels,), "beta": (channels,)},
        lambda x, gamma, beta: F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon),
        attributes={"epsilon": epsilon},
        tolerance=TOLERANCE,
    )


FIXED: dict[str, list[Case]] = {}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "BatchNormalization": st.one_of(batch_norm(), batch_norm_of_batch()),
    "LayerNormalization": layer_norm(),
    "GroupNormalization": group_norm(),
    "InstanceNormalization": instance_norm(),
}
