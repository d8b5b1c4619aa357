"""Matrix products."""

from collections.abc import Sequence

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.emit import Emit, dims, static_dim
from lance_host.autodiff.rules.common import Thunk, operand, rank_of, result, scale_by, sum_to, unsupported


def matmul(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Y = A B: dA = dY B^T, dB = A^T dY."""
    a, b = operand(node, 0), operand(node, 1)
    rank_a, rank_b = rank_of(a), rank_of(b)
    if min(rank_a, rank_b) < 2:
        raise ModelError(f"{node.name}: MatMul with a vector is not supported; reshape it to a matrix")

    def swapped(value: ir.Value, rank: int) -> ir.Value:
        return emit.transpose(value, *range(rank - 2), rank - 1, rank - 2)

    def da() -> ir.Value:
        return _sum_leading(emit, emit("MatMul", dy, swapped(b, rank_b)), result(node), a)

    def db() -> ir.Value:
        if rank_b == 2 and rank_a > 2:  # a shared matrix: one product over all rows instead of many
            rows = emit.reshape(a, -1, static_dim(a, rank_a - 1))
            dy_rows = emit.reshape(dy, -1, static_dim(b, 1))
            return emit("Gemm", rows, dy_rows, transA=1)
        return _sum_leading(emit, emit("MatMul", swapped(a, rank_a), dy), result(node), b)

    return da, db


def _sum_leading(emit: Emit, gradient: ir.Value, output: ir.Value, operand: ir.Value) -> ir.Value:
    """Undo the broadcasting of MatMul's leading dimensions."""
    wide, narrow = dims(output)[:-2], dims(operand)[:-2]
    lead = len(wide) - len(narrow)
    stretched = [lead + i for i, dim in enumerate(narrow) if dim == 1 and wide[lead + i] != 1]
    if stretched:
        gradient = emit.sum(gradient, *stretched, keepdims=True)
    return emit.sum(gradient, *range(lead)) if lead else gradient


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
