"""Class weights and label smoothing against PyTorch and scikit-learn's formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lance_edge.names import TARGET_OFF, TARGET_ON
from lance_edge.targets import Targets, balanced_weights


def mean_loss(targets, logits, labels):
    """The formula of the module's docstring, in float64."""
    arrays = targets.arrays()
    target = arrays[TARGET_OFF] + np.eye(logits.shape[1])[labels] * arrays[TARGET_ON]  # [N, classes]
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(target * log_softmax).sum() / targets.total_weight(labels)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 7), st.integers(1, 9), st.floats(0, 0.9), st.integers(0, 99))
def test_the_loss_is_that_of_pytorch(classes, samples, smoothing, seed):
    random = np.random.default_rng(seed)
    weights = random.uniform(0.1, 4, classes)
    logits, labels = random.normal(size=(samples, classes)), random.integers(0, classes, samples)
    expected = functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(weights), label_smoothing=smoothing
    )
    # The vectors are float32.
    assert mean_loss(Targets(weights, smoothing), logits, labels) == pytest.approx(expected.item(), rel=1e-6)


def test_plain_targets_are_ones_and_zeros():
    plain = Targets.plain(3)
    assert plain.is_plain
    assert plain.arrays()[TARGET_ON].tolist() == [1, 1, 1]
    assert plain.arrays()[TARGET_OFF].tolist() == [0, 0, 0]
    assert plain.total_weight(np.array([0, 2, 2])) == 3
    assert not Targets(np.ones(3), 0.1).is_plain
    assert not Targets(np.array([1, 2, 1.0])).is_plain


def test_balanced_weights_make_classes_equal():
    labels = np.repeat([0, 1, 2], [2, 10, 4])
    weights = balanced_weights(labels, 3)
    np.testing.assert_allclose(np.bincount(labels, weights[labels]), 16 / 3)  # as sklearn's "balanced"
    assert weights[labels].mean() == pytest.approx(1)


def test_balanced_weights_of_a_class_without_samples_are_finite():
    np.testing.assert_allclose(balanced_weights(np.array([0, 0, 2]), 3), [0.5, 1, 1])
