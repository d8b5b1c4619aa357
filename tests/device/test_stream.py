import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_device.stream import SampleStream, permutation


def _stream(count=45, batch_size=16, seed=0, shuffle=True, flip=True):
    return SampleStream(count, batch_size, seed, shuffle, flip)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 70), batch=st.integers(1, 70), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_sample_is_seen_at_least_once_an_epoch(count, batch, epochs, seed):
    batch = min(batch, count)
    stream = _stream(count, batch, seed)
    steps = stream.total_steps(epochs)
    assert steps == math.ceil(epochs * count / batch)
    seen = np.concatenate([stream.indices(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    counts = np.bincount(seen, minlength=count)
    assert counts.min() >= epochs
    assert counts.max() <= epochs + 1
    assert [stream.ends_epoch(step + 1) for step in range(steps)].count(True) == epochs


def test_without_shuffling_the_order_is_that_of_the_part():
    stream = _stream(count=5, batch_size=4, shuffle=False)
    assert [stream.indices(step).tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


def test_a_step_needs_no_history():
    one, other = _stream(), _stream()
    for step in range(9):
        one.indices(step)
    np.testing.assert_array_equal(one.indices(7), other.indices(7))
    np.testing.assert_array_equal(one.flips(7), other.flips(7))


def test_seeds_and_epochs_differ_and_last():
    assert permutation(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]  # the same with any numpy, on any board
    orders = {tuple(permutation(seed, epoch, 8)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_about_half_are_flipped_anew_each_epoch():
    stream = _stream(count=1000, batch_size=1000)
    first, second = stream.flips(0), stream.flips(1)
    assert 400 < first.sum() < 600  # six standard deviations
    assert 300 < (first != second).sum() < 700
    assert not _stream(flip=False).flips(0).any()


@pytest.mark.parametrize(("steps", "epochs"), [(2, 0), (3, 1), (5, 1), (6, 2)])
def test_complete_epochs(steps, epochs):
    assert _stream().complete_epochs(steps) == epochs


def test_seeds_of_dropout_differ_by_sample_and_epoch_and_need_no_history():
    stream = _stream(count=1000, batch_size=1000)
    seeds = [stream.seeds(step) for step in range(3)]
    together = np.concatenate(seeds)
    assert together.dtype == np.int64
    assert together.min() >= 0
    assert together.max() < 2**31 - 1
    assert len(np.unique(together)) > 2990  # two of 3,000 draws out of 2^31 meet about once in 500 times
    np.testing.assert_array_equal(_stream(count=1000, batch_size=1000).seeds(2), seeds[2])
