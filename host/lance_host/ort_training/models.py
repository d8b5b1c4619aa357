"""The three graphs of the training API: training, evaluation and optimiser.

What they must look like is laid down in ONNX Runtime's `orttraining/training_api/module.cc` and `optimizer.cc`
(1.19): inputs are recognised by their names, and fed in the order user inputs, parameters, gradient buffers,
reset flag.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from lance_edge.bundle import Bundle
from lance_edge.errors import LanceError, ModelError
from lance_edge.input_spec import CLASSES_KEY, PREPROCESSING_KEY
from lance_edge.manifest import Manifest, TensorSpec, Variant
from lance_edge.names import BATCH_DIM, IMAGES, LABELS, LOGITS, LOSS, PROJECTIONS_MEMBER, SCALE, gradient_name
from lance_edge.records import to_json
from lance_edge.targets import Targets
from lance_host.graph_file import read_graph
from lance_host.ort_training.join import join

# Both are read by onnxruntime-training 1.19.2 (up to IR 10, opset 21), and are those of the package's graphs.
IR_VERSION = 8
OPSET = 18
MICROSOFT = "com.microsoft"

RESET = "lazy_reset_grad"
LOSS_SUM = "loss_sum"

# In the order in which a device runs them; a package has those that it needs.
TRAINING_STAGES = ("prefix", "prepare", "forward", "backward", "gradient")
EVALUATION_STAGES = ("prefix", "predict")


def training_model(bundle: Bundle, variant: Variant) -> ModelProto:
    """Images, labels and parameters to loss, logits and accumulated gradients, for a whole batch at once.

    Gradients are those of the mean loss over the images that are fed.  Projections are constants; with one of
    the batch mode, every batch must have the package's batch size.

    Raises:
        LanceError: if the method compresses outside of its graphs.
        ModelError: if the joined graph is not valid ONNX.
    """
    if variant.schedule == "by layer":
        raise LanceError(
            f"--method {variant.method}: expected a method whose step is graphs alone (lance, bp), found one"
            " that compresses activations between them, in code that ONNX Runtime's API does not have"
        )
    manifest = bundle.manifest
    public = {LOSS: LOSS_SUM} | {gradient_name(name): f"{name}_grad" for name in variant.parameters}
    graph = _joined(bundle, variant, TRAINING_STAGES, public)
    graph.node.insert(0, helper.make_node("Squeeze", ["scale::inverse"], [SCALE], "scale::squeeze"))
    for node in reversed(_inverse_batch_size()):
        graph.node.insert(0, node)
    graph.node.append(helper.make_node("Mul", [LOSS_SUM, SCALE], [LOSS], "loss::mean"))
    graph.node.extend(_accumulator(name) for name in variant.parameters)
    graph.initializer.extend([*_projections(bundle, variant), *_targets(graph, len(manifest.classes))])
    samples: int | str = manifest.batch_size if variant.batch_projections else BATCH_DIM
    parameters = _parameter_inputs(manifest, variant)
    buffers = [_float(f"{info.name}_grad.accumulation.buffer", _dims(info)) for info in parameters]
    reset = helper.make_tensor_value_info(RESET, TensorProto.BOOL, [1])
    graph.input.extend([*_user_inputs(manifest, samples), *parameters, *buffers, reset])
    graph.output.extend(_user_outputs(manifest, samples))
    graph.output.extend(_flag(f"{name}_grad.accumulation.out") for name in variant.parameters)
    return _checked(graph, "training", manifest, {MICROSOFT: 1})


def evaluation_model(bundle: Bundle, variant: Variant) -> ModelProto:
    """Images, labels and parameters (in the order of the training model) to mean loss and logits."""
    manifest = bundle.manifest
    graph = _joined(bundle, variant, EVALUATION_STAGES, {})
    loss = helper.make_node("SoftmaxCrossEntropyLoss", [LOGITS, LABELS], [LOSS], "loss::mean", reduction="mean")
    graph.node.append(loss)
    graph.input.extend([*_user_inputs(manifest, BATCH_DIM), *_parameter_inputs(manifest, variant)])
    graph.output.extend(_user_outputs(manifest, BATCH_DIM))
    return _checked(graph, "evaluation", manifest, {})


@dataclass(frozen=True)
class Optimizer:
    """One of ONNX Runtime's optimisers: its operator, and its inputs by name."""

    operator: str
    inputs: tuple[str, ...]
    moments: tuple[str, ...]
    attributes: dict[str, float | int]


# Attributes and the unused first moments of SGD are those that `generate_artifacts` writes.
OPTIMIZERS = {
    "sgd": Optimizer("SGDOptimizerV2", ("learning_rate", "params", "gradients"), ("first_order_moments",), {}),
    "adamw": Optimizer(
        "AdamWOptimizer",
        ("learning_rate", "step", "params", "gradients", "first_order_moments", "second_order_moments"),
        ("first_order_moments", "second_order_moments"),
        {
            "alpha": 0.9,
            "beta": 0.999,
            "epsilon": 1e-6,
            "weight_decay": 0.0,
            "correct_bias": 1,
            "adam_mode": 1,  # bias correction in the step size, weight decay after the update
        },
    ),
}


def optimizer_model(name: str, clip: float) -> ModelProto:
    """The update of all parameters together.

    Args:
        name: of `OPTIMIZERS`.
        clip: largest global norm of all gradients together; 0 leaves them as they are.
    """
    optimizer = OPTIMIZERS[name]
    nodes, gradients = [], "gradients"
    if clip:
        gradients = "clipped_gradients"
        nodes.append(_microsoft("InplaceClipGradNorm", ["gradients"], gradients, max_norm=clip))
    inputs = [gradients if one == "gradients" else one for one in optimizer.inputs]
    nodes.append(_microsoft(optimizer.operator, inputs, "update_completed", **optimizer.attributes))
    sequences = [
        helper.make_tensor_sequence_value_info(one, TensorProto.FLOAT, None)
        for one in ("params", "gradients", *optimizer.moments)
    ]
    numbers = [
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
    ]
    graph = helper.make_graph(nodes, "optimizer", [*numbers, *sequences], [_flag("update_completed")])
    return _model(graph, {MICROSOFT: 1})


# --- parts --------------------------------------------------------------------------------------------


def _joined(bundle: Bundle, variant: Variant, stages: Sequence[str], public: dict[str, str]) -> GraphProto:
    parts = {role: read_graph(bundle, variant.graphs[role]) for role in stages if role in variant.graphs}
    return join(parts, public)


def _inverse_batch_size() -> list[NodeProto]:
    """`scale::inverse` `[1]`, float32: 1 / samples."""
    return [
        helper.make_node("Shape", [LABELS], ["scale::samples"], "scale::shape"),
        helper.make_node("Cast", ["scale::samples"], ["scale::float"], "scale::cast", to=TensorProto.FLOAT),
        helper.make_node("Reciprocal", ["scale::float"], ["scale::inverse"], "scale::reciprocal"),
    ]


def _accumulator(parameter: str) -> NodeProto:
    """Adds the gradient to the buffer, or overwrites it where the API says so."""
    gradient = f"{parameter}_grad"
    inputs = [f"{gradient}.accumulation.buffer", gradient, RESET]
    return _microsoft("InPlaceAccumulatorV2", inputs, f"{gradient}.accumulation.out")


def _projections(bundle: Bundle, variant: Variant) -> list[TensorProto]:
    """`[n_mode, r_mode]` of the variant, batch modes with all their rows."""
    if not variant.projection_ranks:
        return []
    stored = bundle.arrays(PROJECTIONS_MEMBER)
    return [
        _tensor(name, np.asarray(stored[name][:, :rank])) for name, rank in variant.projection_ranks.items()
    ]


def _targets(graph: GraphProto, classes: int) -> list[TensorProto]:
    """Those of ordinary cross-entropy, where the graph reads any: older packages know no others."""
    read = {name for node in graph.node for name in node.input}
    return [_tensor(name, array) for name, array in Targets.plain(classes).arrays().items() if name in read]


def _tensor(name: str, array: NDArray[np.generic]) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)


def _user_inputs(manifest: Manifest, samples: int | str) -> list[ValueInfoProto]:
    images = _float(IMAGES, [samples, *manifest.preprocessing.sample_shape])
    return [images, helper.make_tensor_value_info(LABELS, TensorProto.INT64, [samples])]


def _user_outputs(manifest: Manifest, samples: int | str) -> list[ValueInfoProto]:
    return [_float(LOSS, []), _float(LOGITS, [samples, len(manifest.classes)])]


def _parameter_inputs(manifest: Manifest, variant: Variant) -> list[ValueInfoProto]:
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in manifest.parameters}
    return [_float(name, specs[name].shape) for name in variant.parameters]


def _float(name: str, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _dims(info: ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in info.type.tensor_type.shape.dim]


def _flag(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.BOOL, [1])


def _microsoft(operator: str, inputs: Sequence[str], output: str, **attributes: float | int) -> NodeProto:
    name = f"{operator}::{output}"
    return helper.make_node(operator, inputs, [output], name, domain=MICROSOFT, **attributes)  # type: ignore[arg-type]


def _checked(graph: GraphProto, name: str, manifest: Manifest, domains: dict[str, int]) -> ModelProto:
    """A model that passed the checker; it says for which classes and images it is."""
    graph.name = name
    model = _model(graph, domains)
    helper.set_model_props(
        model,
        {
            CLASSES_KEY: json.dumps(list(manifest.classes)),
            PREPROCESSING_KEY: json.dumps(to_json(manifest.preprocessing)),
        },
    )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"the joined {name} graph is not valid ONNX: {error}; please report this package"
        ) from error
    return model


def _model(graph: GraphProto, domains: dict[str, int]) -> ModelProto:
    opsets = [helper.make_opsetid(domain, version) for domain, version in ({"": OPSET} | domains).items()]
    return helper.make_model(graph, producer_name="lance-edge", opset_imports=opsets, ir_version=IR_VERSION)
