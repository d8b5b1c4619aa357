"""Fixtures of the host tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once(operators_read_once: None) -> None:
    """For every test here, most of which export."""


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """On small tensors threads only wait for each other: on a busy machine, a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
