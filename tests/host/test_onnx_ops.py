"""Every operator of the table with which ONNX files become modules, against ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lance_edge.errors import ModelError
from lance_host.autodiff.rules import RULES
from lance_host.sources import open_source
from lance_host.sources.onnx_layers import LAYERS
from lance_host.sources.onnx_ops import OPS

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Two float32 runtimes: some 1e-6 of the largest value.
TOLERANCE = 1e-5
SAMPLE = (4, 6, 8)
OPSET = 21  # Gelu came with 20, the GroupNormalization of today with 21
RNG = np.random.default_rng(0)


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> NodeProto:
    """Operands by name; `-` stands for one that is left out."""
    operands = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, operands, outputs.split(), **{"name": f"the_{kind}", **attributes})


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS: dict[str, Any] = {
    "zero": np.float32(0), "half": np.float32(0.5), "two": np.float32(2), "vector": floats(8),
    "table": floats(4, 6, 8), "channel": floats(4, 1, 1), "w1": floats(8, 8, 1)[:, :6],
    "matrix": floats(8, 5), "columns": floats(3, 8), "row": floats(5), "scale4": floats(4),
    "shift4": floats(4), "mean4": floats(4), "var4": np.abs(floats(4)) + 0.5,
    "kernel": floats(6, 2, 3, 3), "kernel3": floats(3, 1, 2, 2, 2),
    "up": floats(4, 2, 3, 3), "bias6": floats(6), "i0": np.int64(0), "i2": np.int64(2),
    "axis1": np.array([1]), "axes23": np.array([2, 3]), "axes": np.array([-2, 1]),
    "none": np.array([], np.int64), "to": np.array([0, 4, 48]), "flat": np.array([-1, 192]),
    "shape": np.array([1, 4, 6, 8]), "start": np.array([1, -5]),
    "stop": np.array([3, 2**62]), "steps": np.array([1, 2]), "sizes": np.array([1, 3]),
    "order": np.array([[3, 0], [1, 1]]), "repeats": np.array([1, 2, 1, 3]), "pads": np.array([1, 0, 2, 1]),
    "pads8": np.array([0, 0, 1, 2, 0, 0, 0, 1]), "scales": np.array([1, 1, 2, 2], np.float32),
    "new": np.array([0, 0, 3, 16], np.float32), "at": np.array([[[0, 1]], [[3, 2]]]),
    "place": np.array([[1], [3]]), "all": np.array([-1]), "one": np.array([1, 4, 1, 8]),
}  # fmt: skip

POSITIVE = node("Abs", "x", "p")
CASES: dict[str, list[NodeProto]] = {
    **{kind: [node(kind, "x")] for kind in (
        *("Abs", "Cos", "Erf", "Exp", "HardSwish", "Identity", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Sin"),
        *("Softplus", "Softsign", "Tanh", "Dropout", "GlobalAveragePool", "GlobalMaxPool"),
    )},
    **{kind: [node(kind, "x table")] for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")},
    "Max of three": [node("Max", "x vector channel")], "Min of three": [node("Min", "x vector channel")],
    "Log": [POSITIVE, node("Add", "p half", "q"), node("Log", "q")],
    "Sqrt": [POSITIVE, node("Sqrt", "p")], "Pow": [POSITIVE, node("Pow", "p half")],
    "Reciprocal": [POSITIVE, node("Add", "p half", "q"), node("Reciprocal", "q")],
    "Cast": [node("Cast", "x", "i", to=TensorProto.INT64), node("Mul", "i i2", "j"),
             node("Cast", "j", to=TensorProto.FLOAT, name="back")],
    "Equal": [node("Relu", "x", "r"), node("Equal", "r zero", "b"), node("Cast", "b", to=TensorProto.FLOAT)],
    "Greater": [node("Greater", "x table", "b"), node("Cast", "b", to=TensorProto.FLOAT)],
    "Less": [node("Less", "x table", "b"), node("Cast", "b", to=TensorProto.FLOAT)],
    "Where": [node("Less", "x zero", "b"), node("Where", "b table x")],
    "Celu": [node("Celu", "x", alpha=0.5)], "Elu": [node("Elu", "x", alpha=0.5)],
    "LeakyRelu": [node("LeakyRelu", "x", alpha=0.3)], "PRelu": [node("PRelu", "x channel")],
    "HardSigmoid": [node("HardSigmoid", "x", alpha=0.3, beta=0.4)],
    "Gelu": [node("Gelu", "x")], "Gelu by tanh": [node("Gelu", "x", approximate="tanh")],
    "Clip": [node("Clip", "x zero half")], "Clip below": [node("Clip", "x - half")],
    # In the middle: at the end of a network they are left out.
    "Softmax": [node("Softmax", "x", "s", axis=1), node("Neg", "s")],
    "LogSoftmax": [node("LogSoftmax", "x", "s", axis=-2), node("Neg", "s")],
    "MatMul": [node("MatMul", "x matrix")], "MatMul from the left": [node("MatMul", "columns t")],
    "Gemm": [node("Reshape", "x flat", "f"), node("Gemm", "f big row", alpha=0.5, beta=2.0)],
    "Gemm of a computed matrix": [
        node("ReduceMean", "x axes23", "m", keepdims=0), node("Gemm", "gate m", transA=1, transB=1),
    ],
    "Einsum": [node("Einsum", "x vector", equation="nchw,w->nhc")],
    "Conv of a computed weight": [
        node("Mul", "kernel two", "k"), node("Abs", "k", "k2"),
        node("Conv", "x k2 bias6", group=2, strides=[2, 1], pads=[1, 0, 0, 2], dilations=[1, 2]),
    ],
    "Conv 3-D": [node("Unsqueeze", "x axis1", "u"), node("Conv", "u kernel3", pads=[0, 1, 1, 0, 0, 1])],
    "ConvTranspose": [
        node("ConvTranspose", "x up", group=2, strides=[2, 2], pads=[1, 0, 1, 2], output_padding=[1, 1])
    ],
    "BatchNormalization of a map of three": [
        node("Unsqueeze", "x all", "u"), node("BatchNormalization", "u scale4 shift4 mean4 var4", epsilon=0.1),
    ],
    "LayerNormalization": [node("LayerNormalization", "x table", axis=-3)],
    "GroupNormalization": [node("GroupNormalization", "x scale4 shift4", num_groups=2)],
    "InstanceNormalization": [node("InstanceNormalization", "x scale4 shift4")],
    **{kind: [node(kind, "x axes", keepdims=keep)] for keep, kind in enumerate(("ReduceMax", "ReduceMin"))},
    **{kind: [node(kind, "x axes", keepdims=0)] for kind in ("ReduceL1", "ReduceL2", "ReduceSumSquare")},
    **{kind: [node(kind, "x axes")] for kind in ("ReduceSum", "ReduceMean", "ReduceLogSumExp")},
    "ReduceL1 of nothing": [node("ReduceL1", "x none", noop_with_empty_axes=1)],
    "CumSum": [node("CumSum", "x i2")], "CumSum from the end": [node("CumSum", "x i2", reverse=1, exclusive=1)],
    "AveragePool": [node("AveragePool", "x", kernel_shape=[2, 3], strides=[2, 1], pads=[1, 1, 1, 1])],
    "AveragePool counted": [
        node("AveragePool", "x", kernel_shape=[2, 3], auto_pad="SAME_UPPER", count_include_pad=1)
    ],
    "MaxPool": [node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 3], ceil_mode=1)],
    "MaxPool 3-D": [node("Unsqueeze", "x axis1", "u"), node("MaxPool", "u", kernel_shape=[2, 3, 2])],
    "Resize": [node("Resize", "x - scales", mode="linear")],
    "Resize nearest": [
        node("Resize", "x - scales", mode="nearest", nearest_mode="floor",
             coordinate_transformation_mode="asymmetric")
    ],
    "Reshape": [node("Reshape", "x to")], "Flatten": [node("Flatten", "x")],
    "Flatten two axes": [node("Flatten", "x", axis=2)],
    "Squeeze": [node("ReduceSum", "x axis1", "s"), node("Squeeze", "s axis1")],
    "Unsqueeze": [node("Unsqueeze", "x axes")],
    "Transpose": [node("Transpose", "x", perm=[0, 2, 3, 1])],
    "Concat": [node("Concat", "x x", axis=1)],
    "Split": [node("Split", "x sizes", "a y", axis=1)],
    "Split in parts": [node("Split", "x", "a y", axis=2, num_outputs=2)],
    "Expand": [node("ReduceMax", "x axes23", "m"), node("Expand", "m shape")],
    "Tile": [node("Tile", "x repeats")],
    "DepthToSpace": [node("DepthToSpace", "x", blocksize=2)],
    "DepthToSpace CRD": [node("DepthToSpace", "x", blocksize=2, mode="CRD")],
    "SpaceToDepth": [node("SpaceToDepth", "x", blocksize=2)],
    "Slice": [node("Slice", "x start stop axes23 steps")],
    "Gather": [node("Gather", "x order", axis=1)], "Gather one": [node("Gather", "x i2", axis=-1)],
    "GatherND": [node("Transpose", "x", "t", perm=[1, 2, 3, 0]), node("GatherND", "t at")],
    "GatherND of a batch": [
        node("Transpose", "x", "t", perm=[1, 2, 3, 0]), node("GatherND", "t batches", batch_dims=1),
    ],
    "ScatterND": [
        node("Transpose", "x", "t", perm=[1, 0, 2, 3]), node("Gather", "t pair", "u", axis=0),
        node("Neg", "u", "n"), node("ScatterND", "t place n"),
    ],
    "ScatterND added": [
        node("Transpose", "x", "t", perm=[1, 0, 2, 3]), node("Gather", "t pair", "u", axis=0),
        node("ScatterND", "t place u", reduction="add"),
    ],
    "Trilu": [node("Trilu", "x i2")], "Trilu below": [node("Trilu", "x", upper=0)],
    "Pad": [node("Pad", "x pads8 half")], "Pad some axes": [node("Pad", "x pads - axes23", mode="reflect")],
    "Pad by the edge": [node("Pad", "x pads - axes23", mode="edge")],
}  # fmt: skip
CONSTANTS |= {
    "big": floats(192, 5), "gate": floats(4, 3), "pair": np.array([1, 3]),
    "batches": np.array([[[0]], [[1]], [[1]], [[0]]]),
}  # fmt: skip


def written(folder: Path, nodes: list[NodeProto]) -> Path:
    read = {name for part in nodes for name in part.input}
    used: Mapping[str, Any] = {name: value for name, value in CONSTANTS.items() if name in read}
    if "t" in read and not any("t" in part.output for part in nodes):
        nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), *nodes]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", *SAMPLE))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in used.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    axes = len(
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": floats(4, *SAMPLE)})[0].shape
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * axes))
    onnx.save(model, folder / "one.onnx")
    return folder / "one.onnx"


def test_every_operator_has_a_case() -> None:
    covered = {part.op_type for nodes in CASES.values() for part in nodes}
    assert set(OPS) <= covered


def test_what_can_be_differentiated_can_be_read() -> None:
    assert set(RULES) <= set(OPS) | set(LAYERS)


@pytest.mark.parametrize("case", CASES)
def test_an_operator_is_that_of_onnx_runtime(case: str, tmp_path: Path) -> None:
    path = written(tmp_path, CASES[case])
    network = open_source(str(path)).for_arrays().build(1).eval()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = np.random.default_rng(count).standard_normal((count, *SAMPLE)).astype(np.float32)
        (expected,) = session.run(None, {"x": x})
        with torch.no_grad():
            found = network(torch.from_numpy(x)).numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < TOLERANCE * max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [node("Pad", "x pads - axes23", mode="wrap")],
            "mode wrap is not supported; use constant, edge, reflect",
        ),
        (
            [node("Resize", "x - scales", mode="nearest")],
            "nearest with half_pixel and round_prefer_floor is not supported; use nearest with asymmetric and",
        ),
        (
            [node("Resize", "x - scales", mode="cubic")],
            "cubic with half_pixel is not supported; use nearest with",
        ),
        (
            [
                node("Transpose", "x", "t", perm=[1, 0, 2, 3]),
                node("Gather", "t pair", "u", axis=0),
                node("ScatterND", "t place u", reduction="mul"),
            ],
            "reduction mul is not supported; use none or add",
        ),
        (
            [node("ConvTranspose", "x up", auto_pad="VALID")],
            "auto_pad and output_shape are not supported; export",
        ),
        (
            [node("Cast", "x", "s", to=8), node("Cast", "s", to=1, name="back")],
            "to ONNX type 8, which no network here needs",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_entry_does_not_cover_is_said(nodes: list[NodeProto], message: str, tmp_path: Path) -> None:
    path = written(tmp_path, nodes)
    with pytest.raises(ModelError, match=rf"one.onnx: node the_(\w+) \(\1\): {message}"):
        open_source(str(path)).for_arrays().build(1)
