"""Who may import whom.  `tests/device/test_imports.py` shows the same of the device by running it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lance_device
import lance_edge
import lance_host

PACKAGES = {"lance_edge": lance_edge, "lance_host": lance_host, "lance_device": lance_device}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "networkx", "safetensors", "matplotlib")
CLICK_MODULES = {
    *("lance_device.bench_cli", "lance_device.cli", "lance_device.cli_board"),
    *("lance_device.cli_common", "lance_device.cli_tasks", "lance_device.cli_train", "lance_device.cli_types"),
    *("lance_host.cli", "lance_host.cli_benchmark", "lance_host.cli_calibrate", "lance_host.cli_continual"),
    *("lance_host.cli_export", "lance_host.cli_keys", "lance_host.cli_options", "lance_host.cli_package"),
    *("lance_host.cli_report", "lance_host.cli_reproduce"),
}


def source_files(package: str) -> dict[str, Path]:
    """Module name -> file."""
    folder = Path(PACKAGES[package].__path__[0])
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        files[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return files


MODULES = {name: path for package in PACKAGES for name, path in source_files(package).items()}


def imported(path: Path) -> Iterator[str]:
    """The full name of everything that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            yield str(node.module)


def top_level_imports(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def of_package(package: str) -> list[str]:
    return [name for name in MODULES if name.partition(".")[0] == package]


def test_there_is_something_to_look_at():
    assert {"lance_edge.manifest", "lance_host.autodiff.rules", "lance_device.session"} <= set(MODULES)


@pytest.mark.parametrize("name", of_package("lance_edge"))
def test_the_shared_core_imports_only_numpy_pillow_and_the_standard_library(name):
    allowed = {"lance_edge", "numpy", "PIL", *sys.stdlib_module_names}
    assert top_level_imports(MODULES[name]) <= allowed


@pytest.mark.parametrize("name", of_package("lance_device"))
def test_the_device_imports_neither_the_workstation_nor_its_libraries(name):
    assert not top_level_imports(MODULES[name]) & {"lance_host", *HEAVY}


@pytest.mark.parametrize("name", of_package("lance_host"))
def test_the_workstation_does_not_import_the_device(name):
    assert "lance_device" not in top_level_imports(MODULES[name])


def test_only_the_command_lines_import_click():
    assert {name for name, path in MODULES.items() if "click" in top_level_imports(path)} == CLICK_MODULES


def test_only_the_session_of_the_device_imports_onnxruntime():
    users = [name for name in of_package("lance_device") if "onnxruntime" in top_level_imports(MODULES[name])]
    assert users == ["lance_device.session"]


def test_the_workstation_imports_onnxruntime_behind_the_switch_of_its_telemetry():
    """In one place; and in a script for the interpreter of another environment."""
    users = [name for name in of_package("lance_host") if "onnxruntime" in top_level_imports(MODULES[name])]
    assert users == ["lance_host.ort_training.write_checkpoint", "lance_host.runtime"]
    for name, statement in zip(
        users, ("from onnxruntime.training import", "import onnxruntime\n"), strict=True
    ):
        source = MODULES[name].read_text(encoding="utf-8")
        assert source.index('"ORT_DISABLE_TELEMETRY"') < source.index(statement)


def test_the_entry_of_the_workstation_imports_nothing_that_could_be_missing():
    assert top_level_imports(MODULES["lance_host.entry"]) <= {*sys.stdlib_module_names, "lance_host"}


def test_nothing_unpickles():
    """`allow_pickle` and `weights_only` are written out wherever numpy or torch could unpickle."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("np.load", "torch.load"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = {"np.load": ("allow_pickle", "False"), "torch.load": ("weights_only", "True")}[called]
                assert safe in options.items(), f"{name} line {node.lineno}"
        assert "pickle" not in top_level_imports(path), name


def test_device_and_core_run_where_the_workstations_libraries_cannot_be_imported():
    names = [name for name in MODULES if not name.startswith("lance_host")]
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} must not be imported here")
sys.meta_path.insert(0, Blocker())
for name in {names!r}:
    importlib.import_module(name)
assert not set(sys.modules) & set({HEAVY!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
