"""Compressed weight gradients of linear layers over modes (batch, tokens, features), or (batch, features).

Space are the tokens, with q = r1 components (1 without tokens), and they stand outside: the coefficients
are K_b = A_b projected on U1 (tokens) and U2 (features), `[q, N, r]`.  A map of features contracts its tokens
with the same basis on both sides, so the output gradient is projected on U1 as well.
"""

import onnx_ir as ir

from lance_host.autodiff.emit import Emit
from lance_host.autodiff.linear import LinearGeometry
from lance_host.forms import Form, LayerContext


def linear_form(layer: LayerContext, geo: LinearGeometry) -> Form[LinearGeometry]:
    """The form for any linear layer; without fixed ranks a sum over the batch has to be the whole gradient."""
    return NARROW if layer.ranks else WHOLE


def _features(layer: LayerContext) -> ir.Value:
    """The basis of the last mode, `[F, r]`."""
    return layer.projections[max(layer.projections)]


def _tokens_outside(emit: Emit, value: ir.Value, geo: LinearGeometry) -> ir.Value:
    """`[N, q, .] -> [q, N, .]`; without tokens `[N, .] -> [1, N, .]`."""
    if geo.tokens is None:
        return emit("Unsqueeze", value, emit.constant([0]))
    return emit.transpose(value, 1, 0, 2)


def _on_tokens(emit: Emit, layer: LayerContext, geo: LinearGeometry, value: ir.Value) -> ir.Value:
    """`[N, T, .] -> [N, q, .]`."""
    if geo.tokens is None:
        return value
    return emit("MatMul", emit.transpose(layer.projections[1], 1, 0), value)


def _coefficients(emit: Emit, layer: LayerContext, geo: LinearGeometry, x: ir.Value) -> ir.Value:
    """K `[q, N, r]`: the input on both bases, in the order with fewer multiply-adds."""
    if projects_features_first(layer, geo):
        value = _on_tokens(emit, layer, geo, emit("MatMul", x, _features(layer)))
    else:
        value = emit("MatMul", _on_tokens(emit, layer, geo, x), _features(layer))
    return _tokens_outside(emit, value, geo)


def projects_features_first(layer: LayerContext, geo: LinearGeometry) -> bool:
    """Whether T F r + q T r multiply-adds are no more than q T F + q F r."""
    if geo.tokens is None:
        return True
    _, q, rank = layer.ranks
    return rank * geo.tokens * (geo.in_features + q) <= q * geo.in_features * (geo.tokens + rank)


def _core(emit: Emit, layer: LayerContext, core: ir.Value) -> ir.Value:
    """`[r1, r0, r2]` as it is; without tokens `[r1, r0] -> [1, r0, r1]`."""
    has_tokens = max(layer.projections) > 1
    return core if has_tokens else emit("Unsqueeze", emit.transpose(core, 1, 0), emit.constant([0]))


def _project(emit: Emit, layer: LayerContext, geo: LinearGeometry, dy: ir.Value) -> ir.Value:
    """`[q, N, O]`."""
    apart = emit.reshape(dy, -1, *geo.output_shape)  # [N, T, O]
    return _tokens_outside(emit, _on_tokens(emit, layer, geo, apart), geo)


def _over_samples_and_tokens(
    emit: Emit, layer: LayerContext, geo: LinearGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """`[O, r]`."""
    return emit("Gemm", *(emit("Flatten", value, axis=2) for value in (projected, coefficients)), transA=1)


def _all_features(emit: Emit, layer: LayerContext, geo: LinearGeometry, narrow: ir.Value) -> ir.Value:
    """`[O, r] -> [O, F]`."""
    return emit("Gemm", narrow, _features(layer), transB=1)


def _whole(
    emit: Emit, layer: LayerContext, geo: LinearGeometry, coefficients: ir.Value, projected: ir.Value
) -> ir.Value:
    """`[O, F]`."""
    narrow = _over_samples_and_tokens(emit, layer, geo, coefficients, projected)
    return _all_features(emit, layer, geo, narrow)


def _as_it_is(emit: Emit, layer: LayerContext, geo: LinearGeometry, narrow: ir.Value) -> ir.Value:
    return narrow


NARROW = Form[LinearGeometry](_coefficients, _core, _project, _over_samples_and_tokens, _all_features)
WHOLE = Form[LinearGeometry](_coefficients, _core, _project, _whole, _as_it_is)
