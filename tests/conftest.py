"""Makes the host tests' helpers importable and finds the folder of optional large files."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "host"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published checkpoints and photographs; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("LANCE_SHARED", TESTS.parent.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set LANCE_SHARED to the folder that holds weights/ and data/")
    return folder
