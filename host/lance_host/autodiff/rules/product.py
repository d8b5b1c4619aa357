"""Matrix products."""

from collections.abc import Sequence

import onnx_ir as ir

from lance_host.autodiff.emit import Emit, dims, static_dim
from lance_host.autodiff.rules.common import (
    Thunk,
    operand,
    rank_of,
    result,
    scale_by,
    sum_dims,
    sum_to,
    unsupported,
)


def matmul(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Y = A B: dA = dY B^T, dB = A^T dY.

    A vector in front is a matrix of one row, a vector behind one of one column.
    """
    a, b = operand(node, 0), operand(node, 1)
    rows, columns = [-2] * (rank_of(a) == 1), [-1] * (rank_of(b) == 1)  # axes that Y has not
    dims_a, dims_b = (1,) * len(rows) + dims(a), dims(b) + (1,) * len(columns)
    lead_y = dims(result(node))[: rank_of(result(node)) - 2 + len(rows) + len(columns)]

    def swapped(value: ir.Value, rank: int) -> ir.Value:
        return emit.transpose(value, *range(rank - 2), rank - 1, rank - 2)

    def da() -> ir.Value:
        product = emit(
            "MatMul", _matrix(emit, dy, [*rows, *columns]), swapped(_matrix(emit, b, columns), len(dims_b))
        )
        gradient = sum_dims(emit, product, lead_y, dims_a[:-2])  # [..., m, k]
        return emit("Squeeze", gradient, emit.constant(rows)) if rows else gradient

    def db() -> ir.Value:
        if len(dims_b) == 2 and len(dims_a) > 2 and not columns:  # a shared matrix: one product over all rows
            flat = emit.reshape(a, -1, static_dim(a, -1))
            return emit("Gemm", flat, emit.reshape(dy, -1, static_dim(b, 1)), transA=1)
        product = emit(
            "MatMul", swapped(_matrix(emit, a, rows), len(dims_a)), _matrix(emit, dy, [*rows, *columns])
        )
        gradient = sum_dims(emit, product, lead_y, dims_b[:-2])  # [..., k, n]
        return emit("Squeeze", gradient, emit.constant(columns)) if columns else gradient

    return da, db


def _matrix(emit: Emit, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    """A value with the axes of size 1 that MatMul takes a vector to have."""
    return emit("Unsqueeze", value, emit.constant(axes)) if axes else value


def gemm(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Y = alpha A' B' + beta C, where A' and B' may be transposed."""
    a, b = operand(node, 0), operand(node, 1)
    get = node.attributes.get_int
    trans_a, trans_b = get("transA", 0), get("transB", 0)
    alpha = float(node.attributes.get_float("alpha", 1.0))
    beta = float(node.attributes.get_float("beta", 1.0))

    def da() -> ir.Value:
        if trans_a:
            return emit("Gemm", b, dy, transA=trans_b, transB=1, alpha=alpha)
        return emit("Gemm", dy, b, transB=1 - trans_b, alpha=alpha)

    def db() -> ir.Value:
        if trans_b:
            return emit("Gemm", dy, a, transA=1, transB=trans_a, alpha=alpha)
        return emit("Gemm", a, dy, transA=1 - trans_a, alpha=alpha)

    def dc() -> ir.Value:
        return scale_by(emit, sum_to(emit, dy, result(node), operand(node, 2)), beta)

    return da, db, dc


def einsum(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """`ab,bc->ac`: the gradient of an operand is the sum with operand and result exchanged, `ac,bc->ab`."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")

    def thunk(index: int) -> Thunk:
        def dx() -> ir.Value:
            others = [number for number in range(len(terms)) if number != index]
            known = set(right).union(*(terms[number] for number in others))
            repeated = any(len(set(term)) != len(term) for term in (*terms, right))
            if not arrow or "." in equation or repeated or not known.issuperset(terms[index]):
                raise unsupported(
                    node,
                    f"Einsum {equation} is not supported (each letter of an operand must be in the result"
                    " or in another operand, once)",
                )
            exchanged = ",".join([right, *(terms[number] for number in others)]) + "->" + terms[index]
            return emit("Einsum", dy, *(operand(node, number) for number in others), equation=exchanged)

        return dx

    return [thunk(index) for index in range(len(terms))]
