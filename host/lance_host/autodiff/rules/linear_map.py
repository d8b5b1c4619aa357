"""Operators that are a linear map along each axis: average pooling, resizing, padding by the border.

How such an operator weighs its inputs (modes, rounding, windows at the border) takes pages to specify, but
a linear map is known by what it does to unit vectors.  So the operator itself is run on them, here on the
workstation, and the gradient is the product with the transposed matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lance_host.autodiff.conv import MAX_POSITION_PAIRS
from lance_host.autodiff.emit import Emit, static_dims
from lance_host.autodiff.rules.common import rank_of
from lance_host.runtime import open_session

Matrix = NDArray[np.float32]


def responses(node: ir.Node, inputs: Sequence[NDArray[Any] | None], attributes: Mapping[str, Any]) -> Matrix:
    """What the node's operator makes of unit vectors: `[in, out]`.

    Args:
        inputs: its inputs, the first of them unit vectors `[in, ...]` (as many samples as entries).
        attributes: its attributes, instead of the node's own.
    """
    names = ["" if array is None else f"input{index}" for index, array in enumerate(inputs)]
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name)) if array is not None else None
        for name, array in zip(names, inputs, strict=True)
    ]
    probe = ir.Node("", node.op_type, values, attributes=ir.convenience.convert_attributes(attributes))
    probe.outputs[0].name = "response"
    probe.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [],
        probe.outputs,
        nodes=[probe],
        initializers=[value for value in values if value is not None],
        opset_imports=node.graph.opset_imports if node.graph is not None else {},
        name="probe",
    )
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=8))
    (response,) = open_session(proto.SerializeToString(), threads=1).run(None, {})
    matrix: Matrix = response.reshape(len(response), -1)
    return matrix


def adjoint(emit: Emit, dy: ir.Value, x: ir.Value, maps: Mapping[int, Matrix]) -> ir.Value:
    """The gradient with respect to `x` of an operator that multiplies each axis of `maps` by `[in, out]`."""
    rank = rank_of(x)
    if set(maps) == {rank - 2, rank - 1}:
        rows, columns = maps[rank - 2], maps[rank - 1]
        if rows.size * columns.size <= MAX_POSITION_PAIRS:
            return _adjoint_of_positions(emit, dy, x, np.kron(rows, columns))
    for axis, matrix in maps.items():
        if axis == rank - 1:
            dy = emit("MatMul", dy, emit.constant(matrix.T.copy()))
        elif axis == rank - 2:
            dy = emit("MatMul", emit.constant(matrix), dy)
        else:
            swap = [rank - 1 if a == axis else axis if a == rank - 1 else a for a in range(rank)]
            moved = emit("MatMul", emit.transpose(dy, *swap), emit.constant(matrix.T.copy()))
            dy = emit.transpose(moved, *swap)
    return dy


def _adjoint_of_positions(emit: Emit, dy: ir.Value, x: ir.Value, matrix: Matrix) -> ir.Value:
    """On a small map one product over all pairs of positions is faster than one for each channel."""
    rank = rank_of(x)
    kept = [0] * (rank - 2)
    flat = emit.reshape(dy, *kept, matrix.shape[1])
    product = emit("MatMul", flat, emit.constant(matrix.T.copy()))  # [..., P]
    return emit.reshape(product, *kept, *static_dims(x, rank - 2))
