"""The other environment: `LANCE_ORT_PYTHON` names its interpreter, `make test-ort-training` sets it."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

MadeOnce = Callable[[str, Callable[[Path], None]], Path]

DRIVER = Path(__file__).parents[2] / "benchmarks" / "ort_driver.py"


@pytest.fixture(scope="session")
def ort_python() -> str:
    """The interpreter that has onnxruntime-training; without one these tests have nothing to run on."""
    python = os.environ.get("LANCE_ORT_PYTHON")
    if not python:
        pytest.skip("needs onnxruntime-training; run make test-ort-training")
    return python


@pytest.fixture(scope="session")
def photo_package(
    ort_python: str, calibrate_words: Sequence[Any], lance_host: Callable[..., Result], made_once: MadeOnce
) -> Path:
    """That of the other tests, made once: whether calibration repeats itself is asked there."""

    def make(folder: Path) -> None:
        result = lance_host(*calibrate_words, "-o", folder / "pkg.tar")
        assert result.exit_code == 0, result.output

    return made_once("ort-package", make) / "pkg.tar"


@pytest.fixture(scope="session")
def run_there(ort_python: str) -> Callable[..., str]:
    """Run that interpreter; what it says on stdout."""

    def run(*words: Any) -> str:
        end = subprocess.run(
            [ort_python, *map(str, words)], capture_output=True, text=True, timeout=500, check=False
        )
        assert end.returncode == 0, (end.stdout[-1000:], end.stderr[-2000:])
        return end.stdout

    return run


@pytest.fixture(scope="session")
def drive(run_there: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Give the driver an order (see `benchmarks/ort_driver.py`)."""

    def give(**order: Any) -> None:
        file = tmp_path_factory.mktemp("order") / "order.json"
        file.write_text(json.dumps({name: _plain(value) for name, value in order.items()}))
        run_there(DRIVER, file)

    return give


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
