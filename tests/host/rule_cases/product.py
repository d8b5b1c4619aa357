"""Matrix products."""

from typing import Any

import hypothesis.extra.numpy as hnp
import torch
from graph_runner import Shape
from hypothesis import strategies as st

from rule_cases.case import Case


def gemm(a: Shape, b: Shape, c: Shape | None = None, **attributes: Any) -> Case:
    """Y = alpha A' B' + beta C."""

    def product(a: torch.Tensor, b: torch.Tensor, *c: torch.Tensor) -> torch.Tensor:
        left = a.T if attributes.get("transA") else a
        right = b.T if attributes.get("transB") else b
        result = attributes.get("alpha", 1.0) * left @ right
        return result + attributes.get("beta", 1.0) * c[0] if c else result

    inputs = {"a": a, "b": b} | ({"c": c} if c is not None else {})
    return Case(inputs, product, attributes=attributes)


@st.composite
def gemms(draw: st.DrawFn) -> Case:
    """Any attributes, and C of any shape that broadcasts."""
    m, k, n = (draw(st.integers(1, 5)) for _ in range(3))
    trans_a, trans_b = draw(st.booleans()), draw(st.booleans())
    c = draw(st.sampled_from([None, (), (n,), (m, 1), (m, n)]))
    return gemm(
        (k, m) if trans_a else (m, k),
        (n, k) if trans_b else (k, n),
        c,
        transA=int(trans_a),
        transB=int(trans_b),
        alpha=draw(st.sampled_from([1.0, 0.5, -2.0])),
        beta=draw(st.sampled_from([1.0, 0.25, 3.0])),
    )


def matmuls() -> st.SearchStrategy[Case]:
    """Matrices, or vectors on either side."""
    drawn = hnp.mutually_broadcastable_shapes(signature="(m?,k),(k,n?)->(m?,n?)", max_dims=2, max_side=4)
    return drawn.map(lambda found: Case(dict(zip("ab", found.input_shapes, strict=True)), torch.matmul))


EINSUMS: dict[str, tuple[Shape, ...]] = {
    "nij,nkj->nik": (("N", 3, 4), ("N", 2, 4)),
    "nchw,nc->nhw": (("N", 3, 2, 4), ("N", 3)),
    "nhid,jd->nhij": (("N", 2, 3, 4), (5, 4)),
    "ni,nj,ij->n": (("N", 2), ("N", 3), (2, 3)),
    "nij->nji": (("N", 2, 3),),
}


def einsum(equation: str) -> Case:
    inputs = dict(zip("abc", EINSUMS[equation], strict=False))
    return Case(inputs, lambda *operands: torch.einsum(equation, *operands), attributes={"equation": equation})


FIXED: dict[str, list[Case]] = {
    "MatMul": [
        Case({"a": ("N", 4), "b": (4, 3)}, torch.matmul),
        Case({"a": ("N", 5, 4), "b": (4, 3)}, torch.matmul),
        Case({"a": ("N", 2, 5, 4), "b": (4, 3)}, torch.matmul),
        Case({"a": (5, 4), "b": ("N", 4, 3)}, torch.matmul),
        Case({"a": ("N", 2, 5, 4), "b": ("N", 2, 4, 3)}, torch.matmul),
        Case({"a": ("N", 1, 5, 4), "b": (2, 4, 3)}, torch.matmul),
        Case({"a": ("N", 4), "b": (4,)}, torch.matmul),
        Case({"a": ("N", 5, 4), "b": (4,)}, torch.matmul),
        Case({"a": (5,), "b": ("N", 5, 4)}, torch.matmul),
        Case({"a": (4,), "b": (4, 3)}, torch.matmul),
        Case({"a": (4,), "b": (4,)}, torch.matmul),
    ],
    "Gemm": [
        gemm(("N", 4), (4, 3), (3,)),
        gemm(("N", 4), (3, 4), (3,), transB=1),
        gemm((4, "N"), (4, 3), (1, 3), transA=1, alpha=0.5),
        gemm((4, "N"), (3, 4), ("N", 1), transA=1, transB=1, alpha=-2.0, beta=0.25),
        gemm(("N", 4), (4, 3), ("N", 3), alpha=1.5, beta=3.0),
    ],
    "Einsum": [einsum(equation) for equation in EINSUMS],
}
RANDOM: dict[str, st.SearchStrategy[Case]] = {
    "MatMul": matmuls(),
    "Gemm": gemms(),
    "Einsum": st.sampled_from(sorted(EINSUMS)).map(einsum),
}
