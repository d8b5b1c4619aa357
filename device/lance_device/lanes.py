"""Samples side by side: several runs of a graph at once, each on its own samples and its own core.

A run that spreads every operator over the cores waits for the slowest of them after each one, a thousand times
a batch, and threads that sleep between operators wake up late.  Runs that share nothing wait once, at their
end: the frozen part of MCUNet takes a tenth to a third less time on 2 cores, with as many images in memory.
The small graphs of the trained part gain nothing: Python's lock and twice the calls cost more there.
"""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(lanes: int, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Results for all items, in their order, `lanes` at a time.

    Raises:
        Exception: what the first item that failed raised, once everything has come to an end.
    """
    if lanes == 1:
        return [function(item) for item in items]
    futures = [_pool(lanes).submit(function, item) for item in items]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


@functools.cache
def _pool(lanes: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(lanes, thread_name_prefix="lane")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork, their pool would
