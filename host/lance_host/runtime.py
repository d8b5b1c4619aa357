"""ONNX Runtime on the workstation: calibration and verification run their graphs here."""

import os
from typing import Any


def open_session(model: bytes, threads: int = 0) -> Any:
    """A session of a serialised model on the CPU; 0 threads: as many as the runtime likes.

    The runtime is imported here and nowhere else, because its telemetry must be switched off before.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
