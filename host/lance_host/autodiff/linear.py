"""A linear map of features, `Y = X W^T + b`: its geometry, and its weight gradient.

In the captured graph a trainable one is a Gemm over rows `[N T, F]`, a row for each token (or position) of a
sample.  What a method compresses is the input with the samples apart, `[N, T, F]`, or `[N, F]` without tokens.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_edge.names import BATCH_DIM
from lance_host.autodiff.emit import Emit, dims, static_dim, static_dims


@dataclass(frozen=True)
class LinearGeometry:
    """Shapes of a linear layer, batch left out; `tokens` is `None` where a sample is one row."""

    in_features: int
    out_features: int
    tokens: int | None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """`[O, F]`."""
        return (self.out_features, self.in_features)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """`[T, F]` or `[F]`."""
        return (self.in_features,) if self.tokens is None else (self.tokens, self.in_features)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """`[T, O]` or `[O]`."""
        return (*self.input_shape[:-1], self.out_features)


def geometry(node: ir.Node) -> LinearGeometry:
    """The geometry of a Gemm over rows.

    Raises:
        ModelError: if its rows do not belong to one sample after the other.
    """
    weight = node.inputs[1]
    assert weight is not None
    out_features, in_features = static_dims(weight)
    tokens = math.prod(static_dims(batch_first(node), start=1)) // in_features
    return LinearGeometry(in_features, out_features, None if tokens == 1 else tokens)


def batch_first(node: ir.Node) -> ir.Value:
    """The value whose rows the Gemm reads, with the samples in an axis of their own: `[N, ..., F]`.

    Raises:
        ModelError: if there is none.
    """
    value = node.inputs[0]
    assert value is not None
    features = static_dim(value, 1)
    while dims(value)[0] != BATCH_DIM:
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None
        if source is None or dims(source)[-1] != features:
            raise not_apart(value)
        value = source
    return value


def not_apart(value: ir.Value) -> ModelError:
    """What to raise for the input of a linear layer whose first axis does not count samples."""
    return ModelError(
        f"{value.name}: expected the rows of one sample after the other in the input of a linear layer, found"
        f" {list(dims(value))}; choose other --layers"
    )


def samples(emit: Emit, node: ir.Node, geo: LinearGeometry) -> ir.Value:
    """The input of the layer, `[N, T, F]` or `[N, F]`."""
    value = batch_first(node)
    is_as_it_should_be = dims(value)[1:] == geo.input_shape
    return value if is_as_it_should_be else emit.reshape(value, -1, *geo.input_shape)


def weight_gradient(emit: Emit, geo: LinearGeometry, x: ir.Value, dy: ir.Value) -> ir.Value:
    """Gradient with respect to the weight, summed over the batch: `[O, F]`."""
    rows = emit.reshape(x, -1, geo.in_features)  # [N T, F]
    return emit("Gemm", emit.reshape(dy, -1, geo.out_features), rows, transA=1)
