"""Run by an interpreter that has onnxruntime-training, which need not have lance-edge.

    python write_checkpoint.py FOLDER

reads the parameters FOLDER/parameters/*.pb (an ONNX `TensorProto` each), lets the library write
FOLDER/checkpoint, and loads all four artifacts as a user would.  Exits with 3 where the library is not
installed, with 1 where it refuses the artifacts; the last line of stderr says why.
"""

import os
import sys
from pathlib import Path

NOT_INSTALLED, REFUSED = 3, 1


def main(folder: Path) -> None:
    """Write the checkpoint, then load everything."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # for whatever version stands in for it
    try:
        import onnx
        from onnxruntime.training import onnxblock
        from onnxruntime.training.api import CheckpointState, Module, Optimizer
    except ImportError as error:
        _fail(NOT_INSTALLED, error)
    try:
        tensors = [
            onnx.TensorProto.FromString(file.read_bytes()) for file in sorted(folder.glob("parameters/*.pb"))
        ]
        onnxblock.save_checkpoint((tensors, []), folder / "checkpoint")
        state = CheckpointState.load_checkpoint(folder / "checkpoint")
        module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
        Optimizer(folder / "optimizer_model.onnx", module)
    except Exception as error:  # the library's own have no common base
        _fail(REFUSED, error)


def _fail(code: int, error: Exception) -> None:
    sys.stderr.write(" ".join(str(error).split()) + "\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
