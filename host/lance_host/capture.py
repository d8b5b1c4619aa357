"""From a PyTorch network to the forward ONNX graph that everything else is built from.

The captured graph keeps each trainable weight as an input under its state-dict name.  Batch-norm is
frozen and folded: into the numbers where the convolution is frozen, and as a visible `Mul` of weight and
scale where it is trained, so that differentiation gives the gradient of the original weight.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from lance_edge.errors import ModelError
from lance_edge.manifest import BATCH_DIM, IMAGES, LABELS, LOGITS, LOSS, SCALE, TARGET_OFF, TARGET_ON, Layer
from lance_host.autodiff.conv import geometry
from lance_host.autodiff.emit import Emit, static_dims
from lance_host.edit import constant
from lance_host.simplify import simplify

OPSET = 18


@dataclass(frozen=True)
class Captured:
    """The forward graph with its loss.

    `model` has the inputs `images`, `labels` and the trainable parameters, and the outputs `loss` (summed
    over the micro-batch) and `logits`; `seed` is the gradient of the batch's mean loss with respect to the
    logits.  `convs` are the nodes of the trainable layers, `parameters` the
    trainable inputs in the order convs (module order), head weight, head bias.  `targets` are the inputs
    that say what the target of each class is.
    """

    model: ir.Model
    images: ir.Value
    layers: tuple[Layer, ...]
    convs: tuple[ir.Node, ...]
    parameters: tuple[ir.Value, ...]
    labels: ir.Value
    targets: tuple[ir.Value, ...]
    scale: ir.Value
    loss: ir.Value
    seed: ir.Value
    logits: ir.Value


def clone(captured: Captured) -> Captured:
    """An independent copy: differentiation consumes the graph that it is given."""
    model = captured.model.clone()
    values = ir.convenience.create_value_mapping(model.graph)

    def same(value: ir.Value) -> ir.Value:
        assert value.name is not None
        return values[value.name]

    convs = [same(node.outputs[0]).producer() for node in captured.convs]
    return replace(
        captured,
        model=model,
        convs=tuple(node for node in convs if node is not None),
        parameters=tuple(same(value) for value in captured.parameters),
        images=same(captured.images),
        labels=same(captured.labels),
        targets=tuple(same(value) for value in captured.targets),
        scale=same(captured.scale),
        loss=same(captured.loss),
        seed=same(captured.seed),
        logits=same(captured.logits),
    )


def capture(
    network: torch.nn.Module, sample: int | Sequence[int], layers: Sequence[str], head: str | None
) -> Captured:
    """Export a network, then `capture_layers`.

    Args:
        network: in evaluation mode; takes `[N, *sample]`, gives `[N, classes]`.
        sample: shape of one sample; a number R stands for a colour image, `[3, R, R]`.

    Raises:
        ModelError: if the export fails or a layer cannot be found in the exported graph.
    """
    shape = (3, sample, sample) if isinstance(sample, int) else sample
    return capture_layers(export(network, shape), layers, head)


def capture_layers(exported: ir.Model, layers: Sequence[str], head: str | None) -> Captured:
    """Fold batch-norm, turn the trainable weights into inputs and append the loss.

    Args:
        exported: left as it is: several selections of layers start from one export.
        layers: module names of the trainable convolutions, in module order.
        head: module name of the final linear layer; `None` where it does not train.

    Raises:
        ModelError: if a layer cannot be found in the exported graph.
    """
    model = exported.clone()
    convs = [_conv_node(model.graph, f"{name}.weight") for name in layers]
    head_names = [
        f"{head}.{name}"
        for name in ("weight", "bias")
        if head is not None and f"{head}.{name}" in model.graph.initializers
    ]
    names = [f"{name}.weight" for name in layers] + head_names
    _fold_batch_norm(model, frozenset(names))
    described = tuple(_describe(name, conv) for name, conv in zip(layers, convs, strict=True))
    parameters = tuple(_as_input(model.graph, name) for name in names)
    labels, targets, scale, loss, seed = _append_loss(model.graph)
    return Captured(
        model=model,
        images=model.graph.inputs[0],
        layers=described,
        convs=tuple(convs),
        parameters=parameters,
        labels=labels,
        targets=targets,
        scale=scale,
        loss=loss,
        seed=seed,
        logits=model.graph.outputs[1],
    )


def export(network: torch.nn.Module, sample: Sequence[int]) -> ir.Model:
    """The network as ONNX simplified, with batch-norm as it is, opset 18, dynamic batch."""
    example = torch.zeros(2, *sample)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network.eval(),
                (example,),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=[IMAGES],
                output_names=[LOGITS],
                dynamic_shapes=({0: torch.export.Dim(BATCH_DIM)},),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; its last line names the construct
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"this network cannot be exported to ONNX: {reason}; check that torch.export.export works on it"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    images = model.graph.inputs[0].shape
    if images is None or isinstance(images[0], int):
        raise ModelError(
            "this network cannot be exported for batches of any size: somewhere in forward the batch becomes a"
            " plain number, as in len(x); write x.shape[0]"
        )
    optimizer.fold_constants(model, onnx_shape_inference=True)
    passes.RemoveUnusedNodesPass()(model)
    passes.IdentityEliminationPass()(model)
    simplify(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout, in logs and warnings; none of it is for our users."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _conv_node(graph: ir.Graph, weight: str) -> ir.Node:
    value = graph.initializers.get(weight)
    users = [] if value is None else [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != "Conv":
        found = [node.op_type for node in users] or "nothing"
        raise ModelError(
            f"{weight}: expected one Conv that uses it in the exported graph, found {found};"
            " this layer cannot be trained: choose others with --layers"
        )
    return users[0]


def _describe(name: str, node: ir.Node) -> Layer:
    geo = geometry(node)
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


def _as_input(graph: ir.Graph, name: str) -> ir.Value:
    value = graph.initializers.pop(name)
    value.const_value = None
    graph.inputs.append(value)
    return value


# --- batch-norm --------------------------------------------------------------------------------------


def _fold_batch_norm(model: ir.Model, trainable: frozenset[str]) -> None:
    """Conv(x, W) then BN  ->  Conv(x, s W, (b - mean) s + beta)  with s = gamma / sqrt(var + eps)."""
    graph = model.graph
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        source = norm.inputs[0]
        conv = source.producer() if source is not None else None
        if conv is None or conv.op_type != "Conv" or len(list(conv.outputs[0].uses())) != 1:
            continue
        weight = conv.inputs[1]
        assert weight is not None
        scale, shift = _affine_of(norm)
        bias = _numpy(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else 0.0
        folded_bias = _initializer(graph, f"{weight.name}/folded_bias", bias * scale + shift)
        if weight.name in trainable:
            folded = _scaled_weight(graph, conv, weight, scale)
        else:
            folded = _initializer(graph, f"{weight.name}/folded", _numpy(weight) * scale.reshape(-1, 1, 1, 1))
        conv.replace_input_with(1, folded)
        conv.resize_inputs(3)
        conv.replace_input_with(2, folded_bias)
        ir.convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0], replace_graph_outputs=True)
        graph.remove(norm, safe=True)


def _affine_of(norm: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of a frozen batch-norm, `[O]` each, float64."""
    gamma, beta, mean, variance = (_numpy(value) for value in norm.inputs[1:5])
    scale = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    return scale, beta - mean * scale


def _scaled_weight(graph: ir.Graph, conv: ir.Node, weight: ir.Value, scale: np.ndarray) -> ir.Value:
    factor = _initializer(graph, f"{weight.name}/scale", scale.reshape(-1, 1, 1, 1))
    folded = ir.Value(name=f"{weight.name}/scaled", type=weight.type, shape=weight.shape)
    graph.insert_before(conv, ir.Node("", "Mul", (weight, factor), outputs=[folded]))
    return folded


def _numpy(value: ir.Value | None) -> np.ndarray:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ModelError(
            f"{getattr(value, 'name', None)}: batch-norm statistics must be constants of the network"
        )
    return tensor.numpy().astype(np.float64)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return constant(graph, name, array.astype(np.float32))


# --- loss ---------------------------------------------------------------------------------------------


def _append_loss(
    graph: ir.Graph,
) -> tuple[ir.Value, tuple[ir.Value, ...], ir.Value, ir.Value, ir.Value]:
    """Cross-entropy with a target distribution for each class, summed over the micro-batch; its gradient.

    The target of a sample of class c is `off`, plus `on[c]` at c.  With class weights w and label smoothing
    s, as in PyTorch's CrossEntropyLoss, `on = (1 - s) w` and `off = w s / classes`, both `[classes]`.  Adds
    these inputs, `labels` `[N]` and `scale`, and the output `loss`.

    Returns:
        labels, (on, off), scale, loss, and the gradient of `scale * loss` with respect to the logits,
        `[N, classes]`.
    """
    logits = graph.outputs[0]
    (classes,) = static_dims(logits, start=1)
    labels = ir.Value(name=LABELS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([BATCH_DIM]))
    on, off = (_float_input(name, [classes]) for name in (TARGET_ON, TARGET_OFF))
    scale = _float_input(SCALE, [])
    graph.inputs.extend([labels, on, off, scale])
    emit = Emit(graph, "loss/")
    log_probabilities = emit("LogSoftmax", logits, axis=-1)
    depth, off_on = emit.constant([classes]), emit.constant(np.array([0, 1], np.float32))
    target = emit("Add", emit("Mul", emit("OneHot", labels, depth, off_on), on), off)  # [N, classes]
    loss = emit("Neg", emit("ReduceSum", emit("Mul", log_probabilities, target), keepdims=0))
    loss.name = LOSS
    graph.outputs[:] = [loss, logits]
    # d loss / d logits = softmax(logits) sum(target) - target
    spread = emit("Mul", emit("Exp", log_probabilities), emit.sum(target, 1, keepdims=True))
    seed = emit("Mul", emit("Sub", spread, target), scale)
    return labels, (on, off), scale, loss, seed


def _float_input(name: str, shape: Sequence[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
