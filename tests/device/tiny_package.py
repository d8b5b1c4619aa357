"""A package small enough to train within a test, its graphs and backward passes written by hand.

prefix   images [N,3,12,12] -> conv 3x3, stride 2 -> relu -> features [N,6,6,6]
tail     features -> conv 1x1 (trained) -> relu -> global average -> Gemm (trained) -> logits [N,3]

`lance` keeps the core of `features` instead of `features`; both variants share prefix and predict.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from lance_edge.bundle import describe, npz_bytes, write_bundle
from lance_edge.input_spec import Preprocessing, Split
from lance_edge.manifest import SCHEMA_VERSION, Layer, LayerPlan, Manifest, Schedule, TensorSpec, Variant
from lance_edge.names import PROJECTIONS_MEMBER, WEIGHTS_MEMBER

CLASSES = ("blue", "green", "red")
CHANNELS, FEATURES, SIDE = 8, 6, 6
RANKS = (5, 3, 4, 2)
PREPROCESSING = Preprocessing(resolution=12, resize=13, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SPLIT = Split(seed=0, test_fraction=0.25, validation_fraction=0.2)
PARAMETERS = ("conv.weight", "head.weight", "head.bias")
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
DTYPES = {"labels": "int64", "mask": "bool"}

SHAPES = {
    "images": ("N", 3, "R", "R"),
    "features": ("N", FEATURES, SIDE, SIDE),
    "hidden": ("N", CHANNELS, SIDE, SIDE),
    "conv/A": ("N", FEATURES, SIDE, SIDE),
    "pooled": ("N", CHANNELS),
    "logits": ("N", 3),
    "loss": (),
    "scale": (),
    "target/on": (3,),
    "target/off": (3,),
    "labels": ("N",),
    "conv.weight": (CHANNELS, FEATURES, 1, 1),
    "head.weight": (3, CHANNELS),
    "head.bias": (3,),
    "conv/U0": ("N", RANKS[0]),
    "conv/U1": (FEATURES, RANKS[1]),
    "conv/U2": (SIDE, RANKS[2]),
    "conv/U3": (SIDE, RANKS[3]),
    "conv/G": RANKS,
    "conv/D": (RANKS[0], CHANNELS, SIDE, SIDE),
    "conv/narrow": (CHANNELS, RANKS[1]),
    "mask": ("N", CHANNELS, SIDE, SIDE),
    "filters": (CHANNELS, FEATURES, 1, 1),
}
SHAPES |= {f"{name}/grad": SHAPES[name] for name in PARAMETERS}


@dataclass(frozen=True)
class TinyPackage:
    """Where it is, and the arrays that went into it."""

    path: Path
    batch_size: int
    weights: dict[str, NDArray[np.float32]]
    projections: dict[str, NDArray[np.float32]]


def write_tiny_package(
    path: Path,
    batch_size: int = 16,
    split: Split = SPLIT,
    seed: int = 0,
    pool: int = 1,
    schedule: Schedule = "one pass",
) -> TinyPackage:
    """Make the package.

    Args:
        pool: images are larger by this factor and averaged down to 12 x 12.
        schedule: of the lance variant.
    """
    two = schedule == "two passes"
    random = np.random.default_rng(seed)
    weights = {
        "stem.weight": random.normal(0, 0.3, (FEATURES, 3, 3, 3)),
        "conv.weight": random.normal(0, 0.5, SHAPES["conv.weight"]),
        "head.weight": random.normal(0, 0.5, SHAPES["head.weight"]),
        "head.bias": random.normal(0, 0.1, SHAPES["head.bias"]),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    sizes = (batch_size, FEATURES, SIDE, SIDE)
    projections = {
        f"conv/U{mode}": _orthonormal(random, size, rank)
        for mode, (size, rank) in enumerate(zip(sizes, RANKS, strict=True))
    }
    contents = {
        "graphs/prefix.onnx": prefix_graph(weights["stem.weight"], pool),
        "graphs/predict.onnx": _predict(),
        "graphs/inputs.onnx": _inputs(),
        "graphs/bp-forward.onnx": _forward(core=False),
        "graphs/bp-backward.onnx": _backward(core=False),
        "graphs/lance-forward.onnx": _forward(core=True, prepared=two),
        "graphs/lance-backward.onnx": _backward_of_complete_core() if two else _backward(core=True),
        "graphs/lance-gradient.onnx": _gradient_of_narrow() if two else _gradient(),
        WEIGHTS_MEMBER: npz_bytes(weights),
        PROJECTIONS_MEMBER: npz_bytes(projections),
    }
    if two:
        contents["graphs/lance-prepare.onnx"] = _prepare()
    write_bundle(path, _manifest(batch_size, split, pool, contents, schedule), contents)
    return TinyPackage(path, batch_size, weights, projections)


def write_images(root: Path, per_class: int = 20, side: int = 16) -> Path:
    """Class folders of noisy images of one colour each."""
    for label, name in enumerate(reversed(CLASSES)):  # red is channel 0
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            digest = hashlib.sha256(f"{name}{number}".encode()).digest()
            random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            pixels = random.integers(0, 160, (side, side, 3), dtype=np.uint8)
            pixels[: side // 2, :, label] += 70
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")
    return root


def dtype_of(name: str) -> str:
    return DTYPES.get(name.rpartition("/")[2], "float32")


def _orthonormal(random: np.random.Generator, size: int, rank: int) -> NDArray[np.float32]:
    return np.linalg.qr(random.normal(size=(size, rank)))[0].astype(np.float32)


def graph_bytes(nodes, inputs, outputs, constants=None, shapes=SHAPES) -> bytes:
    def info(name):
        kind = {"float32": FLOAT, "int64": INT64, "bool": BOOL}[dtype_of(name)]
        return helper.make_tensor_value_info(name, kind, shapes[name])

    initializers = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        nodes, "tiny", [info(i) for i in inputs], [info(o) for o in outputs], initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def prefix_graph(stem: NDArray[np.float32], pool: int) -> bytes:
    nodes = [
        node("AveragePool", "images", "small", kernel_shape=[pool, pool], strides=[pool, pool]),
        node("Conv", "small stem", "stem_out", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", "stem_out", "features"),
    ]
    return graph_bytes(nodes, ["images"], ["features"], {"stem": stem})


def _tail_nodes():
    return [
        node("Conv", "features conv.weight", "linear"),
        node("Relu", "linear", "hidden"),
        node("ReduceMean", "hidden axes23", "pooled", keepdims=0),
        node("Gemm", "pooled head.weight head.bias", "logits", transB=1),
    ]


AXES = {"axes23": np.array([2, 3])}


def _predict() -> bytes:
    return graph_bytes(_tail_nodes(), ["features", *PARAMETERS], ["logits"], AXES)


def _inputs() -> bytes:
    return graph_bytes([node("Identity", "features", "conv/A")], ["features"], ["conv/A"])


def _prepare() -> bytes:
    """What depends on the parameters alone; here the weights themselves."""
    return graph_bytes([node("Identity", "conv.weight", "filters")], ["conv.weight"], ["filters"])


def _forward(core: bool, prepared: bool = False) -> bytes:
    """With `prepared` weights it gives a mask for `hidden`, as a package in two passes does."""
    nodes = [
        *_tail_nodes(),
        *loss_nodes(),
    ]
    inputs, outputs = ["features", *PARAMETERS, *TARGET_INPUTS], ["loss", "logits", "hidden", "pooled"]
    if prepared:
        nodes[0] = node("Conv", "features filters", "linear")
        nodes.append(node("Cast", "hidden", "mask", to=BOOL))
        inputs[1], outputs[2] = "filters", "mask"
    if core:
        inputs += [f"conv/U{mode}" for mode in range(4)]
        outputs.append("conv/G")
        nodes += [
            node("Einsum", "features conv/U1", "p1", equation="nchw,cq->nqhw"),
            node("Einsum", "p1 conv/U2", "p2", equation="nqhw,hr->nqrw"),
            node("Einsum", "p2 conv/U3", "p3", equation="nqrw,ws->nqrs"),
            node("Einsum", "conv/U0 p3", "conv/G", equation="np,nqrs->pqrs"),
        ]
    return graph_bytes(nodes, inputs, outputs, AXES | CLASS_CONSTANTS)


TARGET_INPUTS = ["labels", "target/on", "target/off"]
TARGET_NODES = [
    node("OneHot", "labels depth off_on", "one_hot", axis=1),
    node("Mul", "one_hot target/on", "weighted"),
    node("Add", "weighted target/off", "target"),
]
CLASS_CONSTANTS = {"depth": np.array(len(CLASSES)), "off_on": np.array([0, 1], np.float32)}


def loss_nodes():
    """The sum over samples of `-target . log softmax(logits)`."""
    return [
        *TARGET_NODES,
        node("LogSoftmax", "logits", "log_probabilities", axis=1),
        node("Mul", "log_probabilities target", "negative_terms"),
        node("Neg", "negative_terms", "terms"),
        node("ReduceSum", "terms", "loss", keepdims=0),
    ]


def logit_gradient_nodes():
    return [
        *TARGET_NODES,
        node("Softmax", "logits", "probabilities", axis=1),
        node("ReduceSum", "target axis1", "target_sum", keepdims=1),
        node("Mul", "probabilities target_sum", "expected"),
        node("Sub", "expected target", "difference"),
        node("Mul", "difference scale", "d_logits"),
        node("Gemm", "d_logits pooled", "head.weight/grad", transA=1),
        node("ReduceSum", "d_logits axis0", "head.bias/grad", keepdims=0),
        node("MatMul", "d_logits head.weight", "d_pooled"),
        node("Mul", "d_pooled mean", "d_mean"),
        node("Unsqueeze", "d_mean axes23", "d_hidden"),
    ]


def _delta_nodes():
    return [*logit_gradient_nodes(), node("Mul", "d_hidden slope", "delta")]


DELTA_INPUTS = ["logits", *TARGET_INPUTS, "scale", "pooled", "head.weight"]
DELTA_OUTPUTS = ["head.weight/grad", "head.bias/grad"]


def logit_gradient_constants():
    return (
        AXES
        | CLASS_CONSTANTS
        | {
            "axis0": np.array([0]),
            "axis1": np.array([1]),
            "mean": np.array(1 / SIDE**2, np.float32),
        }
    )


def _backward(core: bool) -> bytes:
    nodes, constants = [node("Sign", "hidden", "slope"), *_delta_nodes()], logit_gradient_constants()
    inputs, outputs = [*DELTA_INPUTS, "hidden"], DELTA_OUTPUTS
    if core:
        nodes.append(node("Einsum", "conv/U0 delta", "conv/D", equation="np,nohw->pohw"))
        return graph_bytes(nodes, [*inputs, "conv/U0"], [*outputs, "conv/D"], constants)
    nodes.append(node("Einsum", "delta features", "dw", equation="nohw,nchw->oc"))
    nodes.append(node("Unsqueeze", "dw axes23", "conv.weight/grad"))
    return graph_bytes(nodes, [*inputs, "features"], [*outputs, "conv.weight/grad"], constants)


def _backward_of_complete_core() -> bytes:
    nodes = [
        node("Cast", "mask", "slope", to=FLOAT),
        *_delta_nodes(),
        node("Einsum", "conv/U0 conv/G conv/U2 conv/U3", "rebuilt", equation="np,pqrs,hr,ws->nqhw"),
        node("Einsum", "delta rebuilt", "conv/narrow", equation="nohw,nqhw->oq"),
    ]
    inputs = [*DELTA_INPUTS, "mask", "conv/G", "conv/U0", "conv/U2", "conv/U3"]
    return graph_bytes(nodes, inputs, [*DELTA_OUTPUTS, "conv/narrow"], logit_gradient_constants())


def _gradient_of_narrow() -> bytes:
    nodes = [
        node("Einsum", "conv/narrow conv/U1", "dw", equation="oq,cq->oc"),
        node("Unsqueeze", "dw axes23", "conv.weight/grad"),
    ]
    return graph_bytes(nodes, ["conv/narrow", "conv/U1"], ["conv.weight/grad"], AXES)


def _gradient() -> bytes:
    nodes = [
        node("Einsum", "conv/G conv/U1", "r1", equation="pqrs,cq->pcrs"),
        node("Einsum", "r1 conv/U2", "r2", equation="pcrs,hr->pchs"),
        node("Einsum", "r2 conv/U3", "r3", equation="pchs,ws->pchw"),
        node("Einsum", "conv/D r3", "dw", equation="pohw,pchw->oc"),
        node("Unsqueeze", "dw axes23", "conv.weight/grad"),
    ]
    inputs = ["conv/G", "conv/D", "conv/U1", "conv/U2", "conv/U3"]
    return graph_bytes(nodes, inputs, ["conv.weight/grad"], AXES)


def _spec(name: str) -> TensorSpec:
    return TensorSpec(name, SHAPES[name], dtype_of(name))


def _specs(*names: str) -> tuple[TensorSpec, ...]:
    return tuple(_spec(name) for name in names)


def _variant(method: str, batch_size: int, schedule: Schedule) -> Variant:
    is_core = method == "lance"
    two = is_core and schedule == "two passes"
    elements = batch_size * FEATURES * SIDE**2
    if is_core:
        sizes = (batch_size, FEATURES, SIDE, SIDE)
        elements = int(np.prod(RANKS)) + sum(size * rank for size, rank in zip(sizes, RANKS, strict=True))
    roles = ("forward", "backward", "gradient") if is_core else ("forward", "backward")
    roles += ("prepare",) if two else ()
    graphs = {role: (f"graphs/{method}-{role}.onnx",) for role in roles}
    plan = LayerPlan("conv", RANKS if is_core else (), (0.7,) * 4 if is_core else (), 4 * elements, 1, 1)
    saved = ("logits", "pooled", "hidden") if is_core else ("logits", "pooled", "hidden", "features")
    own = ("conv/G", "conv/D") if is_core else ("conv.weight/grad",)
    if two:
        saved, own = ("logits", "pooled", "mask"), ("conv/G", "conv/narrow")
    return Variant(
        method=method,
        energy=0.7 if method == "lance" else None,
        schedule="two passes" if two else "one pass",
        graphs={role: (f"graphs/{role}.onnx",) for role in ("prefix", "predict", "inputs")} | graphs,
        parameters=PARAMETERS,
        layers=(plan,),
        boundary=_specs("features"),
        activations=(),
        saved=_specs(*saved),
        statistics=_specs("head.weight/grad", "head.bias/grad", *own),
        batch_projections=("conv/U0",) if is_core else (),
        projections=("conv/U1", "conv/U2", "conv/U3") if is_core else (),
        graph_macs={},
    )


def _manifest(
    batch_size: int, split: Split, pool: int, contents: dict[str, bytes], schedule: Schedule
) -> Manifest:
    return tiny_manifest(
        contents,
        batch_size=batch_size,
        split=split,
        preprocessing=replace(PREPROCESSING, resolution=12 * pool, resize=13 * pool),
        parameters=_specs(*PARAMETERS),
        layers=(pointwise_layer("conv", FEATURES, CHANNELS),),
        variants=tuple(_variant(method, batch_size, schedule) for method in ("lance", "bp")),
    )


def pointwise_layer(name: str, channels: int, out_channels: int) -> Layer:
    return Layer(
        name=name,
        weight=f"{name}.weight",
        weight_shape=(out_channels, channels, 1, 1),
        input_shape=(channels, SIDE, SIDE),
        output_shape=(out_channels, SIDE, SIDE),
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
    )


def tiny_manifest(contents: dict[str, bytes], **fields) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by="tests",
        model="tiny",
        weights_source="random",
        classes=CLASSES,
        seed=0,
        mode="channel",
        energy=0.7,
        calibration_batches=1,
        head=("head.weight", "head.bias"),
        members=tuple(describe(name, data) for name, data in contents.items()),
        **fields,
    )
