"""Shapes and sizes of every value of a graph, with the micro-batch dimension named.

ONNX shape inference with a symbolic batch loses track at some reshapes; with numbers it does not.  So it
runs for two batch sizes, and what differs between them is the batch dimension.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

import onnx
import onnx_ir as ir

from lance_edge.manifest import TensorSpec, batch_multiple
from lance_edge.names import BATCH_DIM

PROBES = (5, 7)
DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.BOOL: "bool",
}


def infer_specs(model: ir.Model, multiples: bool = True) -> dict[str, TensorSpec]:
    """The tensor of every input, output and intermediate value, by name.

    Values of which a dimension neither is a number nor a multiple of the batch (one is appended to it) have
    no entry, and are never saved.

    Args:
        multiples: whether values with a dimension such as `4*N` have an entry.

    Raises:
        onnx.shape_inference.InferenceError: if the graph is not consistent.
    """
    first, second = (_infer(model, batch) for batch in PROBES)
    specs = {}
    for name, (dtype, shape) in first.items():
        merged = tuple(dimension(*pair, PROBES) for pair in zip(shape, second[name][1], strict=True))
        factors = [1 if isinstance(dim, int) else batch_multiple(dim) for dim in merged]
        if None not in factors and (multiples or set(factors) <= {1}):
            specs[name] = TensorSpec(name, merged, dtype)
    return specs


def infer_shapes(
    model: ir.Model, batch: int, sizes: Mapping[str, int] = MappingProxyType({})
) -> dict[str, tuple[int, ...]]:
    """The shape of every value, by name, when the micro-batch has `batch` samples.

    Args:
        sizes: of other named dimensions of the inputs.
    """
    return {name: shape for name, (_, shape) in _infer(model, batch, sizes).items()}


def dimension(first: int, second: int, batches: tuple[int, int]) -> int | str:
    """What a dimension is, that has these sizes for two batch sizes: a number, `N`, `4*N` or `N+1`."""
    factor, rest = divmod(second - first, batches[1] - batches[0])
    if rest:
        return "?"
    if factor == 0:
        return first
    offset = first - factor * batches[0]
    return (BATCH_DIM if factor == 1 else f"{factor}*{BATCH_DIM}") + (f"{offset:+d}" if offset else "")


def _infer(
    model: ir.Model, batch: int, sizes: Mapping[str, int] = MappingProxyType({})
) -> dict[str, tuple[str, tuple[int, ...]]]:
    proto = ir.serde.serialize_model(model)
    for info in proto.graph.input:
        _set_batch(info, batch)
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    computed = {name for node in proto.graph.node for name in node.output}
    known = [info for info in proto.graph.value_info if info.name in computed and _set_batch(info, batch)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(known)  # where inference cannot know, what `simplify` measured stands
    for info in proto.graph.output:
        info.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    found = {}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = info.type.tensor_type
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
        if tensor.elem_type in DTYPES and tensor.HasField("shape") and all(dim >= 0 for dim in dims):
            found[info.name] = (DTYPES[tensor.elem_type], dims)
    return found


def _set_batch(info: onnx.ValueInfoProto, batch: int) -> bool:
    """Write numbers for dimensions such as `N` or `4*N+1`; whether all are numbers now."""
    dims = info.type.tensor_type.shape.dim
    for dim in dims:
        found = re.fullmatch(rf"(?:(\d+)\*)?{BATCH_DIM}([+-]\d+)?", dim.dim_param)
        if found is not None:
            factor, offset = (
                int(text) if text else neutral for text, neutral in zip(found.groups(), (1, 0), strict=True)
            )
            dim.dim_value = factor * batch + offset
    return info.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
