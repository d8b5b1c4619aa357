import pkgutil
import subprocess
import sys

import lance_device

BLOCK = """
import sys
FORBIDDEN = {"torch", "onnx", "onnx_ir", "onnxscript", "networkx", "safetensors", "lance_host"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
"""
MODULES = sorted(f"lance_device.{module.name}" for module in pkgutil.iter_modules(lance_device.__path__))


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_every_module_imports_without_torch_and_onnx():
    assert "lance_device.train" in MODULES
    done = _python("import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in MODULES))
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    assert "torch must not be imported here" in _python("import torch").stderr


def test_help_works_without_torch_and_onnx():
    done = _python("from lance_device.cli import main; main()", "--help")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_a_run_needs_neither_torch_nor_onnx(package, images, tmp_path):
    words = ["train", "--artifact", package.path, "--data", images, "--out", tmp_path / "run", "--steps", 2]
    done = _python("from lance_device.cli import main; main()", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/last.npz").exists()


def test_only_session_imports_onnxruntime_and_help_imports_nothing_heavy():
    names = [name for name in MODULES if name != "lance_device.session"]
    code = "import importlib, sys\n" + "\n".join(f"importlib.import_module({name!r})" for name in names)
    done = _python(code + "\nassert 'onnxruntime' not in sys.modules")
    assert done.returncode == 0, done.stderr
    heavy = ("numpy", "PIL", "onnxruntime", "psutil")
    done = _python(
        f"import lance_device.cli, sys\nassert not set(sys.modules) & set({heavy}), sys.modules.keys()"
    )
    assert done.returncode == 0, done.stderr


def test_telemetry_is_off_before_the_runtime_loads():
    code = """
import os
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
seen = []
class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
import lance_device.session as session, importlib.util
session.require_runtime = lambda: None
sys.meta_path.insert(0, Watcher())
session.runtime_version()
assert seen == ["1"], seen
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
