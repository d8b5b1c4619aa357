"""Batch-norm with the statistics of the batch, against PyTorch in training mode."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graph_runner import (
    append_gradients,
    declare_float,
    graph_of_nodes,
    open_session,
    relative_error,
    run_session,
)
from onnx import helper
from torch import nn

from lance_host.autodiff.batch_statistics import lower_batch_norm, needs_whole_batches, use_batch_statistics

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# float32 against float64; the gradient subtracts means of the size of what remains.
TOLERANCE = 1e-5
CHANNELS, SIZE = 3, (4, 5)


def norm_between_products() -> ir.Model:
    """y = w relu(BN(w x)), with everything of the batch-norm as inputs."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["scaled"]),
        helper.make_node("BatchNormalization", ["scaled", "gamma", "beta", "mean", "variance"], ["norm"]),
        helper.make_node("Relu", ["norm"], ["positive"]),
        helper.make_node("Mul", ["positive", "w"], ["y"]),
    ]
    per_channel = dict.fromkeys(("gamma", "beta", "mean", "variance"), (CHANNELS,))
    return graph_of_nodes(nodes, {"x": ("N", CHANNELS, *SIZE), "w": SIZE, **per_channel}, {})


def test_gradients_and_running_statistics_are_pytorchs() -> None:
    model = norm_between_products()
    assert not needs_whole_batches(model.graph)
    use_batch_statistics([node for node in model.graph if node.op_type == "BatchNormalization"])
    assert needs_whole_batches(model.graph)
    wrt = ["x", "w", "gamma", "beta"]
    append_gradients(model, wrt)
    running = lower_batch_norm(model.graph)
    model.graph.outputs.extend(declare_float(statistic.updated) for statistic in running)
    assert [statistic.buffer.name for statistic in running] == ["mean", "variance"]
    assert "BatchNormalization" not in {node.op_type for node in model.graph}
    session = open_session(model)
    for batch in (2, 7):
        rng = np.random.default_rng(batch)
        shapes = {"x": (batch, CHANNELS, *SIZE), "w": SIZE, "dy": (batch, CHANNELS, *SIZE)}
        shapes |= dict.fromkeys(("gamma", "beta", "mean", "variance"), (CHANNELS,))
        values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        values["variance"] = np.abs(values["variance"])
        found = run_session(session, values)
        leaves = {name: torch.from_numpy(array).double() for name, array in values.items()}
        norm = nn.BatchNorm2d(CHANNELS).double().train()
        for name, buffer in (("mean", norm.running_mean), ("variance", norm.running_var)):
            assert buffer is not None
            buffer.copy_(leaves[name])
        norm.weight.data, norm.bias.data = leaves["gamma"], leaves["beta"]
        x, w = leaves["x"].requires_grad_(), leaves["w"].requires_grad_()
        y = torch.relu(norm(x * w)) * w
        truth = torch.autograd.grad(y, [x, w, norm.weight, norm.bias], leaves["dy"])
        for name, expected in zip(wrt, truth, strict=True):
            assert relative_error(found[f"grad_{name}"], expected) < TOLERANCE, f"{name}, batch {batch}"
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert relative_error(found["mean/updated"], norm.running_mean) < TOLERANCE
        assert relative_error(found["variance/updated"], norm.running_var) < TOLERANCE
