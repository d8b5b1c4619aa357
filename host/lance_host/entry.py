"""`lance-host` before anything heavy is imported: is the workstation's extra installed?"""

import importlib.util
import sys

REQUIRED = ("torch", "onnx", "onnx_ir", "onnxscript", "networkx", "safetensors")


def main() -> None:
    """Run the command line, or say which command installs what it needs."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"error: {', '.join(missing)} not installed; lance-host needs the host extra:"
            " pip install '.[host]' in a clone of the project\n"
        )
        raise SystemExit(9)
    from lance_host.cli import cli

    cli()
