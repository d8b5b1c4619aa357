"""From a PyTorch network to the forward ONNX graph that everything else is built from.

The captured graph keeps each trainable parameter as an input under its state-dict name.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from lance_edge.errors import ModelError
from lance_edge.manifest import Layer
from lance_edge.names import BATCH_DIM, IMAGES, LABELS, LOGITS, LOSS, SCALE, TARGET_OFF, TARGET_ON
from lance_host.autodiff.dropout import drop_nothing, seed_dropouts
from lance_host.autodiff.emit import Emit, static_dims
from lance_host.extras import NOTHING_MORE, Extras, extra_parameters
from lance_host.fold import fold_batch_norm
from lance_host.layer_nodes import describe, find_node
from lance_host.simplify import simplify
from lance_host.text import one_line
from lance_host.traverse import descendants

OPSET = 18


@dataclass(frozen=True)
class Captured:
    """The forward graph with its loss.

    `model` has the inputs `images`, `labels` and the trainable parameters, and the outputs `loss` (summed
    over the micro-batch) and `logits`; `seed` is the gradient of the batch's mean loss with respect to the
    logits.  `nodes` are those of the trainable layers, `parameters` the trainable inputs in the order weights
    (module order), head weight, head bias, and the `extras`: biases, affine of norms.  `norms` has
    for each layer whose trained norm is folded into it the norm's name.  `head` names the parameters of the
    classifier that are among the trainable ones.  `targets` are the inputs that say what the target of each
    class is; `seeds` those that say what is dropped, where anything is.
    """

    model: ir.Model
    images: ir.Value
    layers: tuple[Layer, ...]
    nodes: tuple[ir.Node, ...]
    norms: dict[str, str]
    extras: frozenset[str]
    head: tuple[str, ...]
    parameters: tuple[ir.Value, ...]
    labels: ir.Value
    targets: tuple[ir.Value, ...]
    scale: ir.Value
    loss: ir.Value
    seed: ir.Value
    logits: ir.Value
    seeds: ir.Value | None


def clone(captured: Captured) -> Captured:
    """An independent copy: differentiation consumes the graph that it is given."""
    model = captured.model.clone()
    values = ir.convenience.create_value_mapping(model.graph)

    def same(value: ir.Value) -> ir.Value:
        assert value.name is not None
        return values[value.name]

    nodes = [same(node.outputs[0]).producer() for node in captured.nodes]
    return replace(
        captured,
        model=model,
        nodes=tuple(node for node in nodes if node is not None),
        parameters=tuple(same(value) for value in captured.parameters),
        images=same(captured.images),
        labels=same(captured.labels),
        targets=tuple(same(value) for value in captured.targets),
        scale=same(captured.scale),
        loss=same(captured.loss),
        seed=same(captured.seed),
        logits=same(captured.logits),
        seeds=None if captured.seeds is None else same(captured.seeds),
    )


def clone_of_evaluation(captured: Captured) -> Captured:
    """An independent copy from images to loss and logits in which nothing is dropped."""
    copy = clone(captured)
    drop_nothing(copy.model, copy.seeds)
    return replace(copy, logits=copy.model.graph.outputs[1], seeds=None)


def capture(
    network: torch.nn.Module,
    sample: int | Sequence[int],
    layers: Sequence[str],
    head: str | None,
    extras: Extras = NOTHING_MORE,
    has_dropout: bool = False,
) -> Captured:
    """Export a network, then `capture_layers`.

    Args:
        network: in evaluation mode; takes `[N, *sample]`, gives `[N, classes]`.
        sample: shape of one sample; a number R stands for a colour image, `[3, R, R]`.

    Raises:
        ModelError: if the export fails or a layer cannot be found in the exported graph.
    """
    shape = (3, sample, sample) if isinstance(sample, int) else sample
    return capture_layers(export(network, shape, has_dropout), layers, head, extras)


def capture_layers(
    exported: ir.Model, layers: Sequence[str], head: str | None, extras: Extras = NOTHING_MORE
) -> Captured:
    """Fold batch-norm, turn the trainable weights into inputs and append the loss.

    Args:
        exported: left as it is: several selections of layers start from one export.
        layers: module names of the trainable layers, in module order.
        head: module name of the final linear layer; `None` where it does not train.
        extras: what trains beside weights and head.

    Raises:
        ModelError: if a layer cannot be found in the exported graph.
    """
    model = exported.clone()
    graph = model.graph
    nodes = [find_node(graph, name) for name in layers]
    names = [f"{name}.weight" for name in layers]
    possible = () if head is None else (f"{head}.weight", f"{head}.bias")
    of_head = tuple(name for name in possible if name in graph.initializers)
    names += of_head
    more = extra_parameters(graph, layers, names, extras)
    names += more
    norms = fold_batch_norm(model, frozenset(names))
    described = tuple(describe(name, node) for name, node in zip(layers, nodes, strict=True))
    parameters = tuple(_as_input(graph, name) for name in names)
    seeds = seed_dropouts(graph, descendants(graph, parameters))
    passes.IdentityEliminationPass()(model)
    _fold_constants(model)
    labels, targets, scale, loss, seed = _append_loss(graph)
    return Captured(
        model=model,
        images=graph.inputs[0],
        layers=described,
        nodes=tuple(nodes),
        norms=norms,
        extras=frozenset(more),
        head=of_head,
        parameters=parameters,
        labels=labels,
        targets=targets,
        scale=scale,
        loss=loss,
        seed=seed,
        logits=graph.outputs[1],
        seeds=seeds,
    )


def export(network: torch.nn.Module, sample: Sequence[int], has_dropout: bool = False) -> ir.Model:
    """The network as ONNX simplified, with batch-norm as it is, opset 18, dynamic batch.

    Args:
        has_dropout: whether its `nn.Dropout` modules drop, as in training.
    """
    example = torch.zeros(2, *sample)
    try:
        with _quiet(), torch.no_grad(), _dropping(network, has_dropout):
            program = torch.onnx.export(
                network,
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
        raise ModelError(
            f"this network cannot be exported to ONNX: {one_line(error)}; check that torch.export.export works"
            " on it"
        ) from error
    assert program is not None
    model: ir.Model = program.model
    images = model.graph.inputs[0].shape
    if images is None or isinstance(images[0], int):
        raise ModelError(
            "this network cannot be exported for batches of any size: somewhere in forward the batch becomes a"
            " plain number, as in len(x); write x.shape[0]"
        )
    _fold_constants(model, keep=frozenset(dict(network.named_parameters())))
    passes.IdentityEliminationPass()(model)
    simplify(model)
    return model


def _fold_constants(model: ir.Model, keep: Collection[str] = ()) -> None:
    """Compute what depends on nothing but constants; what reads a weight of `keep` stays: it may yet train."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in keep for value in node.inputs) else None

    optimizer.fold_constants(model, onnx_shape_inference=bool(keep), should_fold=should_fold)
    passes.RemoveUnusedNodesPass()(model)


@contextlib.contextmanager
def _dropping(network: torch.nn.Module, is_on: bool) -> Iterator[None]:
    """The network in evaluation mode, its `nn.Dropout` modules in training mode for the time being."""
    network.eval()
    dropouts = [module for module in network.modules() if is_on and isinstance(module, torch.nn.Dropout)]
    try:
        for module in dropouts:
            module.train()
        yield
    finally:
        for module in dropouts:
            module.eval()


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


def _as_input(graph: ir.Graph, name: str) -> ir.Value:
    value = graph.initializers.pop(name)
    value.const_value = None
    graph.inputs.append(value)
    return value


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
    depth, off_on = emit("Shape", on), emit.constant(np.array([0, 1], np.float32))  # any number of classes
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
