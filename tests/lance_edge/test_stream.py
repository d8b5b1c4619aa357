import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_edge.stream import SampleStream, permutation


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


def test_dropout_seeds_need_no_history_and_are_those_of_the_step():
    assert _stream(batch_size=3).dropout_seeds(5).tolist() == [
        191877565,
        499344637,
        49800520,
    ]  # as long as runs resume
    drawn = np.concatenate([_stream(seed=seed).dropout_seeds(step) for seed in range(2) for step in range(50)])
    assert drawn.dtype == np.int64
    assert len(set(drawn.tolist())) == len(drawn), "30 bits: 1,600 rarely meet"
    assert 0 <= drawn.min() < 2**22
    assert 2**30 - 2**22 < drawn.max() < 2**30


@pytest.mark.parametrize(("steps", "epochs"), [(2, 0), (3, 1), (5, 1), (6, 2)])
def test_complete_epochs(steps, epochs):
    assert _stream().complete_epochs(steps) == epochs
