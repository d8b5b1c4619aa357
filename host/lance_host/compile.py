"""From a captured network and its spectra to the variants of a package: graphs and their plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from lance_edge import accounting
from lance_edge.errors import ModelError
from lance_edge.manifest import Layer, LayerPlan, Mode, Variant, kept_bytes
from lance_edge.names import BATCH_DIM, CLASSES_DIM, INPUTS_ROLE, activation_name
from lance_edge.patch_accounting import PatchCost
from lance_edge.spectrum import ModeSpectrum
from lance_host.any_rank import open_shapes
from lance_host.autodiff.emit import Emit, static_dim
from lance_host.capture import Captured, clone, clone_of_evaluation
from lance_host.graph_cost import graph_macs
from lance_host.layer_nodes import geometry, input_of
from lance_host.methods import METHODS, rank_names
from lance_host.shapes import infer_specs
from lance_host.stages import PLANNED_MICRO_BATCH, Stages, cut_stages, extract
from lance_host.step import Step, differentiate, lower_forward, split_prefix, tidy

UNCOUNTED_ROLES = ("tail", INPUTS_ROLE)  # no device runs them while it trains
# Kernels that only the training builds of onnxruntime have; no graph of ours may need one.
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})


@dataclass(frozen=True)
class Compiled:
    """A variant and the content of its graph members, by member name."""

    variant: Variant
    members: dict[str, bytes]

    def graph(self, role: str) -> bytes:
        """The graph of a role: its members joined."""
        return b"".join(self.members[name] for name in self.variant.graphs[role])


def compile_variant(
    captured: Captured,
    method: str,
    ranks: Mapping[str, tuple[int, ...]],
    spectra: Mapping[str, Sequence[ModeSpectrum]],
    batch_size: int,
    energy: float | None = None,
    budget: int | None = None,
    mode: Mode = "channel",
    takes_any_rank: bool = False,
) -> Compiled:
    """Differentiate, cut and check the graphs of one method.

    Args:
        captured: left as it is.
        ranks: of every trainable layer, all modes, batch first; none for plain backpropagation.  Where they
            differ from step to step they are an estimate.
        spectra: the eigenvalues that the ranks cut, where there are ranks.
        energy: the threshold ε that they keep, of fixed ranks or at every step.
        budget: the memory budget that the ranks were chosen for, in bytes.
        mode: which modes a convolution's input has.
        takes_any_rank: in patch mode, of graphs that a board can use for its next task.

    Raises:
        ModelError: if an operator has no backward rule or a graph is not valid.
    """
    fixed = ranks if METHODS[method].fixes_ranks else {}
    step, stages = _cheapest_schedule(captured, method, fixed, batch_size, mode, takes_any_rank)
    graphs = stages.graphs | inference_tails(captured) | layer_inputs(captured)
    macs = {
        role: graph_macs(graphs[role], batch_size, _sizes(captured, ranks))
        for role in graphs
        if role not in UNCOUNTED_ROLES
    }
    if takes_any_rank:
        _expect_free_classes(graphs["predict"], captured)
        open_shapes(graphs, stages.boundary, step, captured.head)
    members = {role: serialise(model, f"{method} {role}") for role, model in graphs.items()}
    names = {role: f"graphs/{method}-{len(captured.layers)}/{role}.onnx" for role in members}
    whole = [value for value in step.projections if value not in step.batch_projections]
    variant = Variant(
        method=method,
        energy=energy,
        schedule=stages.schedule,
        graphs={role: (name,) for role, name in names.items()},
        parameters=tuple(value.name for value in step.parameters if value.name is not None),
        layers=tuple(_plan(layer, method, ranks, spectra, batch_size, mode) for layer in captured.layers),
        boundary=stages.boundary,
        activations=stages.activations,
        saved=stages.saved,
        statistics=stages.statistics,
        batch_projections=tuple(str(value.name) for value in step.batch_projections),
        projections=tuple(str(value.name) for value in whole),
        graph_macs=macs,
        budget_bytes=budget,
        takes_any_rank=takes_any_rank,
    )
    return Compiled(variant, {names[role]: data for role, data in members.items()})


def _cheapest_schedule(
    captured: Captured,
    method: str,
    ranks: Mapping[str, Sequence[int]],
    batch_size: int,
    mode: Mode,
    takes_any_rank: bool,
) -> tuple[Step, Stages]:
    """The schedule that keeps fewer bytes; one pass where they are equal or no batch mode is compressed."""
    candidates = []
    for schedule in METHODS[method].schedules:
        step = differentiate(clone(captured), method, ranks, batch_size, schedule, mode, takes_any_rank)
        candidates.append((step, cut_stages(step)))
        if not step.batch_projections:
            break
    return min(candidates, key=lambda pair: _kept_bytes(pair[1], batch_size))


def _expect_free_classes(predict: ir.Model, captured: Captured) -> None:
    """See that another task's head fits."""
    shape = predict.graph.outputs[0].shape
    if not captured.head or shape is None or shape[1] != CLASSES_DIM:
        raise ModelError(
            "--any-rank: the network's head is not one linear layer that gives the logits, so its graphs serve"
            " one number of classes; leave --any-rank out, and make every task's package on the workstation"
        )


def _kept_bytes(stages: Stages, batch_size: int) -> int:
    micro_batch = min(PLANNED_MICRO_BATCH, batch_size)
    return kept_bytes(stages.schedule, stages.saved, stages.statistics, micro_batch, batch_size)


def _sizes(captured: Captured, ranks: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """What the named dimensions are: classes, and an estimate of those of a codec's arrays."""
    return {CLASSES_DIM: static_dim(captured.logits, 1)} | {
        name: rank
        for layer, chosen in ranks.items()
        for name, rank in zip(rank_names(layer, len(chosen)), chosen, strict=True)
    }


def _plan(
    layer: Layer,
    method: str,
    ranks: Mapping[str, tuple[int, ...]],
    spectra: Mapping[str, Sequence[ModeSpectrum]],
    batch_size: int,
    mode: Mode,
) -> LayerPlan:
    chosen, forward_macs = ranks.get(layer.name), METHODS[method].forward_macs
    if chosen is None or forward_macs is None:
        return LayerPlan(
            layer=layer.name,
            ranks=(),
            energy_kept=(),
            activation_bytes=accounting.bp_activation_bytes(layer, batch_size),
            forward_macs=accounting.bp_forward_macs(layer, batch_size),
            weight_gradient_macs=accounting.bp_weight_gradient_macs(layer, batch_size),
        )
    kept = tuple(one.kept(rank) for one, rank in zip(spectra[layer.name], chosen, strict=True))
    if mode == "patch" and not layer.is_linear:
        cost = PatchCost(layer, batch_size, chosen)
        return LayerPlan(
            layer=layer.name,
            ranks=chosen,
            energy_kept=kept,
            activation_bytes=cost.activation_bytes,
            forward_macs=cost.forward_macs,
            weight_gradient_macs=cost.weight_gradient_macs,
            factor_bytes=cost.factor_bytes,
        )
    return LayerPlan(
        layer=layer.name,
        ranks=chosen,
        energy_kept=kept,
        activation_bytes=accounting.factored_activation_bytes(layer, batch_size, chosen),
        forward_macs=forward_macs(layer, batch_size, chosen),
        weight_gradient_macs=accounting.lance_weight_gradient_macs(layer, batch_size, chosen),
    )


def inference_tails(captured: Captured) -> dict[str, ir.Model]:
    """Boundary tensors and trainable parameters to logits, twice; the same for every method.

    `predict` as training runs it, with weights that change from run to run.  `tail` in the network's own
    operators: `merge` builds the plain inference model from it, for once the weights are constants again, an
    ordinary Conv is what every runtime is fastest at.
    """
    tails = {}
    for role in ("tail", "predict"):
        copy = clone_of_evaluation(captured)
        graph = copy.model.graph
        boundary = split_prefix(graph, copy.images, copy.parameters)
        graph.outputs[:] = [copy.logits]
        if role == "predict":
            lower_forward(graph, copy.nodes)
            tidy(copy.model)
        tails[role] = extract(copy.model, [*boundary, *copy.parameters], [copy.logits], infer_specs(copy.model))
    free_classes(tails["predict"].graph, captured.head)
    return tails


def free_classes(graph: ir.Graph, head: Sequence[str]) -> None:
    """Give the number of classes no number, so that the same graph serves heads of other tasks.

    Where more than a matrix product and a bias stands between head and logits, it stays as it is.
    """
    (logits,) = graph.outputs
    parameters = [value for value in graph.inputs if value.name in head]
    node = logits.producer()
    product = node if node is not None and node.op_type == "Gemm" else None
    if product is None or any({use.node for use in value.uses()} != {product} for value in parameters):
        return
    if product.inputs[1] not in parameters or product.attributes.get_int("transB", 0) != 1:
        return
    for value in parameters:
        value.shape = ir.Shape([CLASSES_DIM, *list(value.shape or ())[1:]])
    logits.shape = ir.Shape([BATCH_DIM, CLASSES_DIM])


def layer_inputs(captured: Captured) -> dict[str, ir.Model]:
    """Boundary tensors and trainable parameters to the input of each layer, `<layer>/A`.

    What continual learning calibrates on, on the workstation and on the board.
    """
    if not captured.layers:
        return {}
    copy = clone_of_evaluation(captured)
    graph = copy.model.graph
    boundary, emit = split_prefix(graph, copy.images, copy.parameters), Emit(graph, "inputs/")
    taps = []
    for layer, node in zip(copy.layers, copy.nodes, strict=True):
        taps.append(emit("Identity", input_of(emit, node, geometry(node))))
        taps[-1].name = activation_name(layer.name)
    graph.outputs[:] = taps
    lower_forward(graph, copy.nodes)
    return {INPUTS_ROLE: extract(copy.model, [*boundary, *copy.parameters], taps, infer_specs(copy.model))}


def serialise(model: ir.Model, what: str) -> bytes:
    """The bytes of a graph that passed the checker and uses the standard operators only.

    Raises:
        ModelError: naming the graph and the finding.
    """
    foreign = sorted(
        {f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in STANDARD_DOMAINS}
    )
    if foreign:
        raise ModelError(
            f"graph {what}: operators outside the ONNX standard: {foreign}; no runtime on a Pi has them"
        )
    proto = ir.serde.serialize_model(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"graph {what} is not valid ONNX: {error}; please report this network") from error
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
