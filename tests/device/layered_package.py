"""A small package whose methods compress whole activations: two trained convolutions, forward in two parts.

prefix     images [N,3,12,12] -> conv 3x3, stride 2 -> relu -> features [N,6,6,6]
forward-1  features -> conv `one` 1x1 -> relu -> two/A [N,8,6,6], its mask with channels outside
forward-2  two/A -> conv `two` 1x1 -> relu -> global average -> Gemm -> logits, and a mask
backward   masks, cores and factors -> the weight gradient of `one`, and that of `two` on r1 channels

The batch mode of `one` is compressed; that of `two` is whole for asi, and what the energy asks for in hosvd.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny_package import (
    AXES,
    BOOL,
    CLASS_CONSTANTS,
    FEATURES,
    FLOAT,
    PREPROCESSING,
    SHAPES,
    SIDE,
    SPLIT,
    TARGET_INPUTS,
    TinyPackage,
    dtype_of,
    graph_bytes,
    logit_gradient_constants,
    logit_gradient_nodes,
    loss_nodes,
    node,
    pointwise_layer,
    prefix_graph,
    tiny_manifest,
)

from lance_edge.bundle import npz_bytes, write_bundle
from lance_edge.manifest import LayerPlan, TensorSpec, Variant
from lance_edge.names import WEIGHTS_MEMBER

BATCH = 16
CHANNELS = {"one": (FEATURES, 8), "two": (8, 5)}  # of input and output
RANKS = {"one": (5, 3, 4, 2), "two": (BATCH, 4, 3, 3)}
ENERGY = 0.9
PARAMETERS = ("one.weight", "two.weight", "head.weight", "head.bias")
SAVED = ("one/mask", "two/mask", "pooled", "logits")
STATISTICS = ("head.weight/grad", "head.bias/grad", "one/dw", "two/narrow")

LAYERED_SHAPES = {
    "features": SHAPES["features"],
    "two/A": ("N", 8, SIDE, SIDE),
    "one/mask": (8, "N", SIDE, SIDE),
    "two/mask": ("N", 5, SIDE, SIDE),
    "pooled": ("N", 5),
    "one.weight": (8, FEATURES, 1, 1),
    "one/filters": (8, FEATURES, 1, 1),
    "two.weight": (5, 8, 1, 1),
    "head.weight": (3, 5),
    "one/dw": (8, FEATURES),
    "two/narrow": (5, "two/r1"),
}
LAYERED_SHAPES |= {name: SHAPES[name] for name in ("logits", "loss", "scale", *TARGET_INPUTS, "head.bias")}
for _layer, (_channels, _) in CHANNELS.items():
    _ranks = [f"{_layer}/r{mode}" for mode in range(4)]
    LAYERED_SHAPES[f"{_layer}/G"] = (_ranks[1], _ranks[0], *_ranks[2:])
    for _mode, _size in enumerate(("N", _channels, SIDE, SIDE)):
        LAYERED_SHAPES[f"{_layer}/U{_mode}"] = (_size, _ranks[_mode])
LAYERED_SHAPES |= {f"{name}/grad": LAYERED_SHAPES[name] for name in PARAMETERS}


def write_layered_package(path: Path, change=lambda variant: variant, seed: int = 0) -> TinyPackage:
    """Make the package; `change` may spoil its variants."""
    random = np.random.default_rng(seed)
    weights = {
        "stem.weight": random.normal(0, 0.3, (FEATURES, 3, 3, 3)),
        "one.weight": random.normal(0, 0.5, LAYERED_SHAPES["one.weight"]),
        "two.weight": random.normal(0, 0.5, LAYERED_SHAPES["two.weight"]),
        "head.weight": random.normal(0, 0.5, LAYERED_SHAPES["head.weight"]),
        "head.bias": random.normal(0, 0.1, LAYERED_SHAPES["head.bias"]),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    contents = {
        "graphs/prefix.onnx": prefix_graph(weights["stem.weight"], pool=1),
        "graphs/predict.onnx": _predict(),
        "graphs/prepare.onnx": _graph(
            [node("Identity", "one.weight", "one/filters")], "one.weight", "one/filters"
        ),
        "graphs/forward-1.onnx": _first_part(),
        "graphs/forward-2.onnx": _second_part(),
        "graphs/backward.onnx": _backward(),
        "graphs/gradient.onnx": _gradient(),
        WEIGHTS_MEMBER: npz_bytes(weights),
    }
    manifest = tiny_manifest(
        contents,
        batch_size=BATCH,
        split=SPLIT,
        preprocessing=PREPROCESSING,
        parameters=tuple(spec(name) for name in PARAMETERS),
        layers=tuple(pointwise_layer(layer, *channels) for layer, channels in CHANNELS.items()),
        variants=tuple(change(_variant(method)) for method in ("asi", "hosvd")),
    )
    write_bundle(path, manifest, contents)
    return TinyPackage(path, BATCH, weights, {})


def spec(name: str) -> TensorSpec:
    shape = (5, RANKS["two"][1]) if name == "two/narrow" else LAYERED_SHAPES[name]
    return TensorSpec(name, shape, dtype_of(name))


def _graph(nodes, inputs: str, outputs: str, constants=None) -> bytes:
    return graph_bytes(nodes, inputs.split(), outputs.split(), constants, LAYERED_SHAPES)


def _head_nodes():
    return [
        node("Conv", "two/A two.weight", "linear"),
        node("Relu", "linear", "hidden"),
        node("ReduceMean", "hidden axes23", "pooled", keepdims=0),
        node("Gemm", "pooled head.weight head.bias", "logits", transB=1),
    ]


def _predict() -> bytes:
    first = [node("Conv", "features one.weight", "one/linear"), node("Relu", "one/linear", "two/A")]
    return _graph([*first, *_head_nodes()], f"features {' '.join(PARAMETERS)}", "logits", AXES)


def _first_part() -> bytes:
    nodes = [
        node("Conv", "features one/filters", "linear"),
        node("Relu", "linear", "two/A"),
        node("Cast", "linear_outside", "one/mask", to=BOOL),
    ]
    nodes.insert(2, node("Transpose", "two/A", "linear_outside", perm=[1, 0, 2, 3]))
    return _graph(nodes, "features one/filters", "two/A one/mask")


def _second_part() -> bytes:
    nodes = [
        *_head_nodes(),
        *loss_nodes(),
        node("Cast", "hidden", "two/mask", to=BOOL),
    ]
    inputs = f"two/A two.weight head.weight head.bias {' '.join(TARGET_INPUTS)}"
    return _graph(nodes, inputs, "loss logits pooled two/mask", AXES | CLASS_CONSTANTS)


def _rebuild_nodes(layer: str, *, channels: bool):
    factors, equation = f"{layer}/U0 {layer}/G {layer}/U2 {layer}/U3", "np,qprs,hr,ws->nqhw"
    rebuilt = [node("Einsum", factors, f"{layer}/space", equation=equation)]
    if channels:
        rebuilt.append(
            node("Einsum", f"{layer}/space {layer}/U1", f"{layer}/rebuilt", equation="nqhw,cq->nchw")
        )
    return rebuilt


def _backward() -> bytes:
    nodes = [
        *logit_gradient_nodes(),
        node("Cast", "two/mask", "two/slope", to=FLOAT),
        node("Mul", "d_hidden two/slope", "two/delta"),
        node("Squeeze", "two.weight axes23", "two/matrix"),
        node("Einsum", "two/delta two/matrix", "d_first", equation="nohw,oc->nchw"),
        node("Transpose", "one/mask", "one/inside", perm=[1, 0, 2, 3]),
        node("Cast", "one/inside", "one/slope", to=FLOAT),
        node("Mul", "d_first one/slope", "one/delta"),
        *_rebuild_nodes("one", channels=True),
        *_rebuild_nodes("two", channels=False),
        node("Einsum", "one/delta one/rebuilt", "one/dw", equation="nohw,nchw->oc"),
        node("Einsum", "two/delta two/space", "two/narrow", equation="nohw,nqhw->oq"),
    ]
    inputs = f"logits {' '.join(TARGET_INPUTS)} scale pooled head.weight two.weight"
    inputs += " one/mask two/mask one/G two/G"
    inputs += " one/U0 one/U1 one/U2 one/U3 two/U0 two/U2 two/U3"
    return _graph(nodes, inputs, " ".join(STATISTICS), logit_gradient_constants())


def _gradient() -> bytes:
    nodes = [
        node("Unsqueeze", "one/dw axes23", "one.weight/grad"),
        node("Einsum", "two/narrow two/U1", "dw", equation="oq,cq->oc"),
        node("Unsqueeze", "dw axes23", "two.weight/grad"),
    ]
    return _graph(nodes, "one/dw two/narrow two/U1", "one.weight/grad two.weight/grad", AXES)


def literal_bytes(ranks: tuple[int, ...], layer: str) -> int:
    """Core and factors, float32; none for a batch mode that is whole."""
    sizes = (BATCH, CHANNELS[layer][0], SIDE, SIDE)
    factors = [n * r for mode, (n, r) in enumerate(zip(sizes, ranks, strict=True)) if mode > 0 or r < BATCH]
    return 4 * (math.prod(ranks) + sum(factors))


def _variant(method: str) -> Variant:
    roles = ("prefix", "predict", "prepare", "forward-1", "forward-2", "backward", "gradient")
    plans = tuple(
        LayerPlan(layer, ranks, (0.7,) * 4, literal_bytes(ranks, layer), 1, 1) for layer, ranks in RANKS.items()
    )
    return Variant(
        method=method,
        energy=ENERGY,
        schedule="by layer",
        graphs={role: (f"graphs/{role}.onnx",) for role in roles},
        parameters=PARAMETERS,
        layers=plans,
        boundary=(spec("features"),),
        activations=(spec("features"), spec("two/A")),
        saved=tuple(spec(name) for name in SAVED),
        statistics=tuple(spec(name) for name in STATISTICS),
        batch_projections=(),
        projections=(),
        graph_macs={},
    )


def without(graph: str):
    """A change: the variants lack a graph."""
    return lambda variant: replace(variant, graphs={r: g for r, g in variant.graphs.items() if r != graph})
