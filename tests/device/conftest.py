"""Makes the helpers of this folder importable, and gives small packages and image folders."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_package import TinyPackage, write_images, write_tiny_package

with contextlib.suppress(ValueError):  # not in the main thread
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # as a terminal leaves it: nohup has it ignored, in children too


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> TinyPackage:
    """A package with the methods bp and lance, for batches of 16."""
    return write_tiny_package(tmp_path_factory.mktemp("package") / "pkg.tar")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 20 images a class: 15 to train on (12 and 3 for validation), 5 to test on."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that goes on, for tests of its page."""
    from report_rows import RECORD, write_run

    return write_run(tmp_path / "run", steps=5, record={**RECORD, "status": "running"})


@pytest.fixture
def address(run: Path) -> Iterator[Any]:
    """Where its page is served."""
    from page_harness import LOOPBACK

    from lance_device.serve import Address, serving

    with serving(Address(LOOPBACK, 0), run) as found:
        yield found
