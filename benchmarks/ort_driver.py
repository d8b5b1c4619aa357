"""Run by an interpreter with onnxruntime-training and nothing of ours: `python ort_driver.py order.json`.

The order is a JSON object; its `work` says what:

    generate   `network`: the ONNX file; `trained`: names of parameters; `frozen`: names of others that become
               inputs of the graphs too, not constants; `clip`; `artifacts`: the folder to write.
    train      `artifacts`; `batches`: npz with images `[S, B, 3, R, R]` and labels `[S, B]`, taken in turn;
               `steps`, `learning_rate`, `threads`; `result`: npz to write: `loss` and `latency_ms` `[steps]`,
               `eval_loss` `[]` of the first batch at the end, if `evaluate`, `weights/<parameter>`,
               at the end, and `gradients/<parameter>`, of the first step; `inference`: where the library is to
               write the trained network, images to logits, or null.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def generate(order: dict[str, Any]) -> None:
    """ONNX Runtime's own artifacts, for cross-entropy and plain SGD."""
    from onnxruntime.training import artifacts, onnxblock

    folder = Path(order["artifacts"])
    folder.mkdir()
    clip = onnxblock.optim.ClipGradNorm(order["clip"]) if order["clip"] else None
    artifacts.generate_artifacts(
        order["network"],
        requires_grad=order["trained"],
        frozen_params=order["frozen"],
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=onnxblock.optim.SGD(clip_grad=clip),
        artifact_directory=folder,
        additional_output_names=["logits"],
    )


def train(order: dict[str, Any]) -> None:
    """Steps of the training API, as its documentation has them."""
    import onnxruntime
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    folder = Path(order["artifacts"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = order["threads"]
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx", session_options=options)
    optimizer = Optimizer(folder / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(order["learning_rate"])
    batches = np.load(order["batches"])
    images, labels = batches["images"], batches["labels"]
    losses, latencies, gradients = [], [], dict[str, NDArray[Any]]()
    module.train()
    for step in range(order["steps"]):
        rows = step % len(images)
        began = time.perf_counter()
        loss, *_ = module(images[rows], labels[rows])
        if step == 0:
            gradients = {f"gradients/{name}": np.array(one.grad) for name, one in _trained(state)}
        optimizer.step()
        module.lazy_reset_grad()
        latencies.append((time.perf_counter() - began) * 1000)
        losses.append(float(loss))
    eval_loss = _eval_loss(module, images[0], labels[0]) if order["evaluate"] else np.nan
    weights = {f"weights/{name}": np.array(one.data) for name, one in _trained(state)}
    numbers = {"loss": losses, "latency_ms": latencies, "eval_loss": eval_loss}
    arrays: Arrays = {name: np.asarray(value) for name, value in numbers.items()}
    if order["inference"]:
        module.export_model_for_inferencing(order["inference"], ["logits"])
    np.savez(order["result"], **(arrays | weights | gradients))  # type: ignore[arg-type]


def _eval_loss(module: Any, images: NDArray[Any], labels: NDArray[Any]) -> float:
    module.eval()
    loss, *_ = module(images, labels)
    return float(loss)


def _trained(state: Any) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in state.parameters if one.requires_grad]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    {"generate": generate, "train": train}[asked["work"]](asked)
