"""Frozen batch-norm, folded into the convolution before it.

    Conv(x, W, b) then BN  ->  Conv(x, s W, (b - mean) s + beta)      with s = gamma / sqrt(var + eps)

Into the numbers where the convolution is frozen; as a visible `Mul` of weight and scale where it is trained,
so that differentiation gives the gradient of the original weight.  Where bias, gamma or beta train too, scale
and shift are visible as well, and the gradient of gamma comes out of the convolution's weight gradient:
nothing more is kept for it (of a compressed input, it is as exact as that gradient).  A trained norm behind a
frozen convolution stays as it is.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from lance_host.autodiff.emit import Emit, dims
from lance_host.edit import constant


def fold_batch_norm(model: ir.Model, trainable: Collection[str]) -> dict[str, str]:
    """Fold every batch-norm that follows a convolution.

    Returns:
        layer -> norm, by module name, where both train.
    """
    graph, folded = model.graph, dict[str, str]()
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        source = norm.inputs[0]
        conv = source.producer() if source is not None else None
        if conv is None or conv.op_type != "Conv" or len(list(conv.outputs[0].uses())) != 1:
            continue
        if not all(_is_parameter(value, trainable) for value in (*conv.inputs[1:], *norm.inputs[1:])):
            continue  # computed at every step, as by weight normalisation: the norm stays as it is
        weight, gamma, beta = str(_name(conv, 1)), str(_name(norm, 1)), str(_name(norm, 2))
        is_affine = gamma in trainable or beta in trainable
        if is_affine and weight not in trainable:
            continue
        if is_affine or _name(conv, 2) in trainable:
            new_weight, new_bias = _visibly(graph, conv, norm)
        else:
            new_weight, new_bias = _as_numbers(graph, conv, norm, weight in trainable)
        if gamma in trainable:
            folded[weight.removesuffix(".weight")] = gamma.removesuffix(".weight")
        conv.replace_input_with(1, new_weight)
        conv.resize_inputs(3)
        conv.replace_input_with(2, new_bias)
        ir.convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0], replace_graph_outputs=True)
        graph.remove(norm, safe=True)
    graph.sort()
    return folded


def _is_parameter(value: ir.Value | None, trainable: Collection[str]) -> bool:
    """Whether an operand is left out, trains, or is constant."""
    return value is None or value.name in trainable or ir.convenience.get_const_tensor(value) is not None


def _name(node: ir.Node, index: int) -> str | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.name


def _as_numbers(graph: ir.Graph, conv: ir.Node, norm: ir.Node, is_trained: bool) -> tuple[ir.Value, ir.Value]:
    """Weight and bias with scale and shift as constants."""
    gamma, beta, mean, inverse = _numbers(norm)
    scale, weight = gamma * inverse, conv.inputs[1]
    assert weight is not None
    bias = _numpy(conv.inputs[2]) if _name(conv, 2) is not None else 0.0
    name = norm.outputs[0].name  # a module that is called twice has one weight and two outputs
    new_bias = _initializer(graph, f"{name}/folded_bias", (bias - mean) * scale + beta)
    factor = scale.reshape(_per_filter(weight))
    if not is_trained:
        return _initializer(graph, f"{name}/folded", _numpy(weight) * factor), new_bias
    return _scaled(graph, weight, _initializer(graph, f"{name}/scale", factor)), new_bias


def _visibly(graph: ir.Graph, conv: ir.Node, norm: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Weight and bias as nodes that read bias, gamma and beta."""
    weight, gamma, beta = conv.inputs[1], norm.inputs[1], norm.inputs[2]
    assert weight is not None
    assert gamma is not None
    assert beta is not None
    bias = conv.inputs[2] if _name(conv, 2) is not None else None
    _, _, mean, inverse = _numbers(norm, affine=False)
    emit = Emit(graph, f"{weight.name}/")

    def known(value: ir.Value, *shape: int) -> ir.Value:
        value.type, value.shape = weight.type, ir.Shape(shape)
        return value

    size = len(mean)
    scale = known(emit("Mul", gamma, emit.constant(inverse.astype(np.float32))), size)
    centre = emit.constant((-mean).astype(np.float32))  # [O]
    if bias is not None:
        centre = known(emit("Add", bias, centre), size)
    shift = known(emit("Add", known(emit("Mul", centre, scale), size), beta), size)
    per_filter = _per_filter(weight)
    return _scaled(graph, weight, known(emit.reshape(scale, *per_filter), size, *per_filter[1:])), shift


def _numbers(norm: ir.Node, affine: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """gamma, beta, mean and 1 / sqrt(var + eps), `[O]` each, float64; without affine 1 and 0 for the first."""
    mean, variance = (_numpy(value) for value in norm.inputs[3:5])
    inverse = 1 / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    if not affine:
        return np.ones_like(mean), np.zeros_like(mean), mean, inverse
    return _numpy(norm.inputs[1]), _numpy(norm.inputs[2]), mean, inverse


def _per_filter(weight: ir.Value) -> tuple[int, ...]:
    """The shape of a number for each filter, `[O, 1, ...]`, beside a weight `[O, C / groups, k, ...]`."""
    return (-1, *[1] * (len(dims(weight)) - 1))


def _scaled(graph: ir.Graph, weight: ir.Value, factor: ir.Value) -> ir.Value:
    folded = ir.Value(name=f"{weight.name}/scaled", type=weight.type, shape=weight.shape)
    graph.append(ir.Node("", "Mul", (weight, factor), outputs=[folded]))
    return folded


def _numpy(value: ir.Value | None) -> np.ndarray:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None  # `_is_parameter`, and it does not train
    return tensor.numpy().astype(np.float64)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return constant(graph, name, array.astype(np.float32))
