"""Runs side by side: the same results in the same order, and nothing left running after an error."""

import os
import threading
import time

import numpy as np
import pytest

from lance_device.graphs import PREFIX_IMAGES, load_graph, load_prefix, run_prefix
from lance_device.lanes import side_by_side
from lance_edge.bundle import Bundle


@pytest.fixture
def bundle(package):
    with Bundle(package.path) as bundle:
        yield bundle


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_results_come_in_order(lanes):
    def slow_first(item):
        time.sleep(0.02 * (item == 0))
        return item, threading.get_ident()

    found = side_by_side(lanes, slow_first, range(5))
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in found}) <= lanes


def test_lanes_run_at_the_same_time():
    meet = threading.Barrier(2, timeout=30)  # breaks if one has to end before the other begins
    assert sorted(side_by_side(2, lambda _: meet.wait(), range(2))) == [0, 1]


def test_the_first_error_comes_when_all_have_ended():
    ended = []

    def work(item):
        if item < 2:
            raise ValueError(str(item))
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ValueError, match="0"):
        side_by_side(2, work, range(4))
    assert sorted(ended) == [2, 3]


def test_a_fork_has_lanes_of_its_own():
    """The plan of the memory measures in a fork, where the threads of this process do not exist."""
    assert side_by_side(2, abs, [-1, -2]) == [1, 2]
    child = os.fork()
    if child == 0:
        os._exit(side_by_side(2, abs, [-3, -4]) != [3, 4])
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("threads", "micro_batch", "lanes"), [(1, 8, 1), (2, 8, 2), (4, 3, 3), (4, 1, 1), (9, 8, 4)]
)
def test_the_prefix_gives_the_same_in_lanes(bundle, threads, micro_batch, lanes):
    variant = bundle.manifest.variant("lance")
    prefix = load_prefix(bundle, variant, threads, micro_batch)
    assert prefix.lanes == lanes
    images = np.random.default_rng(0).standard_normal((2 * PREFIX_IMAGES + 3, 3, 12, 12), np.float32)
    expected = load_graph(bundle, variant, "prefix", 1).run({"images": images})
    # The same float32 sums for each image; kernels may order them otherwise for another number of images.
    np.testing.assert_allclose(
        run_prefix(prefix, images)["features"], expected["features"], rtol=1e-5, atol=1e-6
    )
