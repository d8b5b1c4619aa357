"""The nodes of trainable layers in the captured graph: a Conv, or for a linear layer a Gemm over rows."""

import math
from collections.abc import Sequence

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_edge.manifest import Layer, batch_multiple
from lance_edge.names import BATCH_DIM
from lance_host.autodiff import conv, linear
from lance_host.autodiff.conv import ConvGeometry
from lance_host.autodiff.emit import Emit, dims, static_dim, static_dims
from lance_host.autodiff.linear import LinearGeometry
from lance_host.forms import Geometry


def find_node(graph: ir.Graph, name: str) -> ir.Node:
    """The node of a layer, its weight the second input.

    A linear layer of more than rows, `MatMul(x, Transpose(W))`, becomes a Gemm over rows.

    Raises:
        ModelError: if the layer's weight is used in any other way.
    """
    weight = graph.initializers.get(f"{name}.weight")
    users = [] if weight is None else [use.node for use in weight.uses()]
    if len(users) == 1:
        (user,) = users
        if user.op_type == "Conv" or _is_linear(user):
            return user
        readers = [use.node for use in user.outputs[0].uses()]
        if user.op_type == "Transpose" and [reader.op_type for reader in readers] == ["MatMul"]:
            return _over_rows(graph, name, readers[0])
    found = [node.op_type for node in users] or "nothing"
    raise ModelError(
        f"{name}.weight: expected one Conv, Gemm or MatMul that uses it in the exported graph, found {found};"
        " this layer cannot be trained: choose others with --layers"
    )


def _is_linear(node: ir.Node) -> bool:
    """Whether a Gemm is `X W^T + b`."""
    get, scale = node.attributes.get_int, node.attributes.get_float
    is_scaled = scale("alpha", 1.0) != 1.0 or scale("beta", 1.0) != 1.0
    return node.op_type == "Gemm" and not is_scaled and (get("transA", 0), get("transB", 0)) == (0, 1)


def _over_rows(graph: ir.Graph, name: str, product: ir.Node) -> ir.Node:
    """Put a Gemm over rows `[N T, F]` in the place of a MatMul, and of the Add of its bias."""
    x, weight = product.inputs[0], graph.initializers[f"{name}.weight"]
    assert x is not None
    last, bias = product, graph.initializers.get(f"{name}.bias")
    readers = [use.node for use in product.outputs[0].uses()]
    if bias is not None and [reader.op_type for reader in readers] == ["Add"] and bias in readers[0].inputs:
        (last,) = readers
    emit = Emit(graph, f"{name}/")
    rows = _shaped(emit.reshape(x, -1, static_dim(x, -1)), x, _row_dims(x))
    operands = (rows, weight) if last is product else (rows, weight, bias)
    y = last.outputs[0]
    flat = _shaped(emit("Gemm", *operands, transB=1), x, _row_dims(y))
    whole = _shaped(emit.reshape(flat, -1, *static_dims(y, start=1)), x, dims(y))
    node = flat.producer()
    assert node is not None
    node.metadata_props.update(product.metadata_props)  # whose module it is
    ir.convenience.replace_all_uses_with(y, whole, replace_graph_outputs=True)
    graph.sort()
    graph.remove([last] if last is product else [last, product], safe=True)
    return node


def _row_dims(value: ir.Value) -> tuple[int | str, int | str]:
    """`(T*N, F)` for `[N, ..., F]`."""
    first, *middle, last = dims(value)
    factor = batch_multiple(str(first))
    if factor is None or not all(isinstance(dim, int) for dim in middle):
        raise linear.not_apart(value)
    rows = factor * math.prod(int(dim) for dim in middle)
    return (BATCH_DIM if rows == 1 else f"{rows}*{BATCH_DIM}", last)


def _shaped(value: ir.Value, like: ir.Value, shape: Sequence[int | str]) -> ir.Value:
    value.type, value.shape = like.type, ir.Shape(shape)
    return value


def geometry(node: ir.Node) -> Geometry:
    """The geometry of a layer's node.

    Raises:
        ModelError: if the layer is of no kind that can be trained.
    """
    return linear.geometry(node) if node.op_type == "Gemm" else conv.geometry(node)


def input_of(emit: Emit, node: ir.Node, geo: Geometry) -> ir.Value:
    """What a method compresses: `[N, C, H, W]`, `[N, T, F]` or `[N, F]`."""
    if isinstance(geo, LinearGeometry):
        return linear.samples(emit, node, geo)
    x = node.inputs[0]
    assert x is not None
    return x


def describe(name: str, node: ir.Node) -> Layer:
    """The layer as the manifest has it."""
    geo = geometry(node)
    if isinstance(geo, LinearGeometry):
        weight, shapes = f"{name}.weight", (geo.weight_shape, geo.input_shape, geo.output_shape)
        return Layer(name, weight, *shapes, stride=(), padding=(), dilation=(), groups=1)
    return _describe_conv(name, geo)


def _describe_conv(name: str, geo: ConvGeometry) -> Layer:
    return Layer(
        name=name,
        weight=f"{name}.weight",
        weight_shape=geo.weight_shape,
        input_shape=(geo.in_channels, *geo.in_size),
        output_shape=(geo.out_channels, *geo.out_size),
        stride=geo.stride,
        padding=geo.padding,
        dilation=geo.dilation,
        groups=geo.groups,
    )
