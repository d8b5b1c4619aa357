"""Whether an ONNX graph is one that lance-edge would run: before a runtime loads it.

A package comes from anywhere, and an ONNX file may name custom operators, code of its own (functions),
files on the disk (external data) and loops.  None of these is needed to train, so all are refused:

1. every operator stands in `ALLOWED_OPS`, in ONNX's own domain;
2. no functions, no training information, no graphs within nodes (`If`, `Loop`, `Scan`), no sparse tensors;
3. every tensor lies in the file, is of numbers, and its shape is that of its data;
4. nothing else: a field that this module does not know is refused, and one that may stand once stands once.

Field numbers: onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

import math
from collections.abc import Mapping
from itertools import islice

from lance_edge.errors import ArtifactError
from lance_edge.wire import BYTES, FIXED32, FIXED64, VARINT, Field, WireError, fields, packed_varints

DOMAINS = (b"", b"ai.onnx")
MAX_DIMENSIONS = 16
ORT_FORMAT = b"ORTM"  # at byte 4: onnxruntime's own format, which it would read in place of ONNX

# Numbers in, numbers out: no control flow, no chance but that of Dropout, no text, no sequences, no files.
ALLOWED_OPS = frozenset(
    b"""
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu CenterCropPad Clip Col2Im
    Compress Concat Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul
    Neg NegativeLogLikelihoodLoss NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul
    QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)

# Message -> field number -> how often it may stand, and what stands there: a kind of `WIRES`, or a message.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {
        **{1: "once int", 2: "once text", 3: "once text", 4: "once text", 5: "once int", 6: "once text"},
        **{7: "many graph", 8: "many opset", 14: "many text"},  # graphs: the parts of one, which are merged
    },
    "opset": {1: "once text", 2: "once int"},
    "graph": {
        **{1: "many node", 2: "once text", 5: "many tensor", 10: "once text", 11: "many value"},
        **{12: "many value", 13: "many value", 14: "many text", 16: "many text"},
    },
    "node": {
        **{1: "many text", 2: "many text", 3: "once text", 4: "once text", 5: "many attribute"},
        **{6: "once text", 7: "once text", 8: "once text", 9: "many text"},
    },
    "attribute": {
        **{1: "once text", 2: "once float", 3: "once int", 4: "once text", 5: "once tensor", 7: "many floats"},
        **{8: "many ints", 9: "many text", 10: "many tensor", 13: "once text", 20: "once int"},
    },
    "tensor": {
        **{1: "many ints", 2: "once int", 4: "many floats", 5: "many ints", 7: "many ints", 8: "once text"},
        **{
            9: "once text",
            10: "many doubles",
            11: "many ints",
            12: "once text",
            14: "once int",
            16: "many text",
        },
    },
    "value": {1: "once text", 2: "once type", 3: "once text", 4: "many text"},
    "type": {1: "once text", 6: "once text"},
}
WIRES = {
    **{"int": (VARINT,), "ints": (VARINT, BYTES), "text": (BYTES,)},  # text: also bytes, and messages that
    **{"float": (FIXED32,), "floats": (FIXED32, BYTES), "doubles": (FIXED64, BYTES)},  # hold nothing to check
}
REFUSED = {
    ("model", 20): "training information",
    ("model", 25): "a function",
    ("graph", 15): "a sparse tensor",
    ("attribute", 6): "a graph within a node",
    ("attribute", 11): "a graph within a node",
    ("attribute", 21): "a reference to an attribute of a function",
    ("attribute", 22): "a sparse tensor",
    ("attribute", 23): "a sparse tensor",
    ("tensor", 3): "a tensor in segments",
    ("tensor", 6): "a tensor of text",
    ("tensor", 13): "a tensor outside of the file",
    ("type", 4): "a sequence",
    ("type", 5): "a map",
    ("type", 9): "an optional value",
}

# TensorProto.DataType -> bytes of an element: float, (u)int8 to 64, bool, float16, double, bfloat16.
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
TYPED_DATA = {4: 4, 10: 8}  # float_data and double_data: bytes of an element; the others are varints


def check_graph(model: bytes, where: str) -> None:
    """See that a runtime may load these bytes.

    Args:
        where: how messages call it, `pkg.tar: graphs/prefix.onnx`.

    Raises:
        ArtifactError: naming what it is that lance-edge does not run.
    """
    try:
        if model[4:8] == ORT_FORMAT:
            raise WireError("it is in the format of onnxruntime, not in ONNX's")
        _check("model", memoryview(model))
    except WireError as error:
        raise ArtifactError(
            f"{where}: not a graph that lance-edge runs ({error}); use files of lance-host only, from someone"
            " you trust"
        ) from None


def _check(kind: str, message: memoryview) -> None:
    """One message and all within it; the nesting is that of `MESSAGES`, so it ends."""
    known, found = MESSAGES[kind], set()
    for field in fields(message):
        if field.number not in known:
            raise WireError(f"found {REFUSED.get((kind, field.number), f'field {field.number} of a {kind}')}")
        often, what = known[field.number].split()
        if often == "once" and field.number in found:
            raise WireError(f"field {field.number} of a {kind} stands twice")
        found.add(field.number)
        if field.wire not in WIRES.get(what, (BYTES,)):
            raise WireError(f"field {field.number} of a {kind} has the wire type {field.wire}")
        if what in MESSAGES:
            _check(what, field.data)
    if kind in RULES:
        RULES[kind](message)


def _model(message: memoryview) -> None:
    found = {field.number for field in fields(message)}
    if not {7, 8} <= found:
        raise WireError("found no graph, or no version of its operators")


def _opset(message: memoryview) -> None:
    _expect_own_domain(_text(message, 1))


def _node(message: memoryview) -> None:
    name = _text(message, 4)
    _expect_own_domain(_text(message, 7))
    if name not in ALLOWED_OPS:
        raise WireError(f"found the operator {_printable(name)}")


def _expect_own_domain(domain: bytes) -> None:
    if domain not in DOMAINS:
        raise WireError(f"found operators of the domain {_printable(domain)}")


def _text(message: memoryview, number: int) -> bytes:
    return b"".join(bytes(field.data) for field in fields(message) if field.number == number)


def _printable(name: bytes) -> str:
    return repr(name[:40].decode("utf-8", "replace"))


def _tensor(message: memoryview) -> None:
    """Shape and type are those of the data that are there."""
    dims: list[int] = []
    kind, nbytes, elements = 0, 0, 0
    for field in fields(message):
        if field.number == 1:
            dims += islice(packed_varints(field), MAX_DIMENSIONS + 1)
            if len(dims) > MAX_DIMENSIONS:
                raise WireError(f"found a tensor of more than {MAX_DIMENSIONS} dimensions")
        elif field.number == 2:
            kind = field.value
        elif field.number == 9:
            nbytes = len(field.data)
        elif field.number == 14 and field.value:
            raise WireError("found a tensor outside of the file")
        elif field.number in (4, 5, 7, 10, 11):
            elements += _count(field)
    if kind not in ITEM_BYTES:
        raise WireError(f"found a tensor of type {kind}")
    if any(dim >= 1 << 63 for dim in dims):
        raise WireError(f"found a tensor of the shape {dims}")
    expected = math.prod(dims)
    if nbytes != expected * ITEM_BYTES[kind] * (elements == 0) or elements not in (0, expected):
        raise WireError(
            f"found a tensor of the shape {dims} with {nbytes} bytes and {elements} elements of data"
        )


def _count(field: Field) -> int:
    """Elements in one occurrence of a typed data field."""
    if field.wire != BYTES:
        return 1
    if field.number in TYPED_DATA:
        return len(field.data) // TYPED_DATA[field.number]
    return sum(byte < 0x80 for byte in field.data)  # a varint ends with such a byte


RULES = {"model": _model, "opset": _opset, "node": _node, "tensor": _tensor}
