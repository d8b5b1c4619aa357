"""Makes the helpers of this folder importable, and gives small packages and image folders."""

import contextlib
import signal
import sys
from pathlib import Path

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
