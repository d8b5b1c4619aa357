"""Multiply-adds, counted by hand from the definition of each operator."""

import onnx.parser
import onnx_ir as ir
import pytest

from lance_host.graph_cost import graph_macs

HEADER = '<ir_version: 8, opset_import: ["" : 18]>'


def parse(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(HEADER + text))


CASES = {
    "pointwise convolution": (
        "g (float[N,6,5,4] x, float[7,6,1,1] w) => (float[N,7,5,4] y) { y = Conv(x, w) }",
        lambda n: n * 7 * 5 * 4 * 6,
    ),
    # 9 rows, padded to 11, a kernel of 3, stride 2: 5 rows; 7 columns stay 7.  Each output reads 6/2 channels.
    "grouped, strided, padded convolution": (
        "g (float[N,6,9,7] x, float[4,3,3,3] w) => (float[N,4,a,b] y)"
        " { y = Conv<group=2, strides=[2,1], pads=[1,1,1,1]>(x, w) }",
        lambda n: n * 4 * 5 * 7 * 3 * 3 * 3,
    ),
    # A dilated kernel of 3 spans 5 of 8 positions: 4 are left.  Depthwise: one input channel per output.
    "depthwise, dilated convolution": (
        "g (float[N,6,8,8] x, float[6,1,3,3] w) => (float[N,6,a,b] y)"
        " { y = Conv<group=6, dilations=[2,2]>(x, w) }",
        lambda n: n * 6 * 4 * 4 * 3 * 3,
    ),
    # Every one of the 6 x 5 x 4 inputs meets a 2 x 3 kernel for each of the 8/2 outputs of its group.
    "grouped, transposed convolution": (
        "g (float[N,6,5,4] x, float[6,4,2,3] w) => (float[N,8,a,b] y)"
        " { y = ConvTranspose<group=2, strides=[2,2]>(x, w) }",
        lambda n: n * 6 * 5 * 4 * 4 * 2 * 3,
    ),
    "batched matrix product": (
        "g (float[N,6,5] x, float[5,3] w) => (float[N,6,3] y) { y = MatMul(x, w) }",
        lambda n: n * 6 * 5 * 3,
    ),
    "matrix product with the batch as inner dimension": (
        "g (float[6,N] x, float[N,3] w) => (float[6,3] y) { y = MatMul(x, w) }",
        lambda n: 6 * n * 3,
    ),
    "Gemm": (
        "g (float[N,6] x, float[6,3] w, float[3] b) => (float[N,3] y) { y = Gemm(x, w, b) }",
        lambda n: n * 6 * 3,
    ),
    "Gemm, both transposed": (
        "g (float[N,6] x, float[3,N] w) => (float[6,3] y) { y = Gemm<transA=1, transB=1>(x, w) }",
        lambda n: 6 * n * 3,
    ),
    "elementwise operators and data movement": (
        "g (float[N,6] x) => (float[6,N] y) { z = Mul(x, x)  s = Add(z, x)  y = Transpose<perm=[1,0]>(s) }",
        lambda n: 0,
    ),
    "the sum of a graph's nodes": (
        "g (float[N,6] x, float[6,3] w) => (float[N,3] y, float[N,6] z)"
        " { y = MatMul(x, w)  t = Transpose<perm=[1,0]>(w)  r = Relu(y)  z = MatMul(r, t) }",
        lambda n: 2 * n * 6 * 3,
    ),
    "a weight that is a constant": (
        "g (float[N,2] x) => (float[N,3] y) <float[2,3] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }",
        lambda n: n * 2 * 3,
    ),
}


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_multiply_adds_are_those_counted_by_hand(case, batch):
    text, by_hand = CASES[case]
    assert graph_macs(parse(text), batch) == by_hand(batch)
