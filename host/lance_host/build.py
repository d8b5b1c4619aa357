"""The main path of the workstation: from a network and images to a package.

`calibrate` reads as a table of contents; each of its calls is a module.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lance_edge.datasets import Dataset, open_dataset
from lance_edge.errors import LanceError, ModelError
from lance_edge.images import Part, load_batch
from lance_edge.input_spec import InputSpec
from lance_edge.manifest import Manifest
from lance_edge.memory import LayerMemory
from lance_edge.moments import Moments
from lance_edge.protected_spectra import layer_spectra_of
from lance_edge.screening import steady
from lance_host.autodiff.emit import Emit
from lance_host.budget import check_budget
from lance_host.calibrate import calibration_batches, choose_batch_size, layer_moments, layer_spectra
from lance_host.capture import Captured, capture_layers, clone_of_evaluation, export
from lance_host.compile import Compiled, compile_variant, serialise
from lance_host.layer_nodes import geometry, input_of
from lance_host.methods import METHODS
from lance_host.network import Network, load_network
from lance_host.package import Plan, Spectra, Tasks, cut_projections, network_weights, write_package
from lance_host.past import settle_task_name
from lance_host.rank_choice import GradientBatches, RankChoice, choose_ranks, energy_of
from lance_host.request import Feedback, Request, check
from lance_host.shapes import infer_specs
from lance_host.share import share
from lance_host.stages import bind, extract
from lance_host.trainable import check_trainable
from lance_host.verify import Samples, check_samples_apart, verify_on_any

VERIFY_IMAGES = 8  # a set; U0 has no rows for more than a batch
VERIFY_SETS = 3
JUDGING_BATCHES = 4  # that a budget's gradients are measured on; each takes a pass through PyTorch


def calibrate(request: Request, feedback: Feedback) -> Manifest:
    """Write the package and return its manifest.

    Raises:
        LanceError: with nothing written, for anything that the request, images or network do not allow.
    """
    check(request)
    dataset = open_images(request, feedback)
    network = load_network(
        request.network, len(dataset.classes), feedback.say, feedback.download, dataset.array_shape
    )
    batch_size = choose_batch(request, dataset, feedback)
    check_samples_apart(
        network.module, verification_samples(dataset, network.preprocessing, VERIFY_IMAGES)[0][0]
    )

    captured = capture_selections(network)
    check_trainable(captured[-1], request.layers)
    for method, budget in request.budgets.items():
        check_budget(method, budget, [one.layers for one in captured], batch_size)
    order, judging = choose_images(request, dataset, batch_size, feedback)
    spectra, batches = measure_spectra(request, network, captured[-1], dataset, order, feedback)
    ranks = select_ranks(request, network, captured, spectra, dataset, judging, feedback)
    variants = share(compile_variants(request, captured, ranks, spectra, batch_size, feedback))
    samples = verification_samples(dataset, network.preprocessing, min(VERIFY_IMAGES, batch_size))
    verify_variants(network, captured, variants, spectra, samples, feedback)

    plan = Plan(network, captured[-1], dataset.classes, spectra, variants, batch_size, batches)
    return write_package(request, plan, Tasks(settle_task_name(request.task, request.data, ())))


def open_images(request: Request, feedback: Feedback) -> Dataset:
    """The user's data, with a stand-in for each image that cannot be read.

    Raises:
        DataError: if there are none.
    """
    if request.data is None:
        raise LanceError("--data: expected class folders or an .npz, found nothing; say where the images are")
    return steady(open_dataset(request.data, request.split), feedback.say_bad_image)


def choose_batch(request: Request, dataset: Dataset, feedback: Feedback) -> int:
    """The training batch size, said aloud where it is not the usual one."""
    batch_size = choose_batch_size(len(dataset.train), request.batch_size)
    parts = f"{len(dataset.train)} training, {len(dataset.validation)} validation, {len(dataset.test)} test"
    feedback.say(f"data: {parts} images of {len(dataset.classes)} classes")
    if request.batch_size is None:
        feedback.say(f"batch size: {batch_size} (128, or the largest power of two that fits twice)")
    return batch_size


def capture_selections(network: Network) -> tuple[Captured, ...]:
    """The captured network for each count of trainable layers, ascending, from one export."""
    exported = export(network.module, network.preprocessing.sample_shape, network.has_dropout)
    captured = tuple(
        capture_layers(exported, layers, network.head, network.extras) for layers in network.selections
    )
    if network.has_dropout and captured[-1].seeds is None:
        raise ModelError(
            "--dropout: no nn.Dropout stands behind the first trained layer; leave it out, or train more layers"
        )
    return captured


# --- phase I ------------------------------------------------------------------------------------------


def choose_images(
    request: Request, dataset: Dataset, batch_size: int, feedback: Feedback
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images of calibration and those that ranks within a budget are judged on, `[batches, B]` each.

    Subspaces fit the images that they come from too well, so the second are others, as far as there are any.
    """
    wanted = request.batches + (JUDGING_BATCHES if request.budgets else 0)
    order = calibration_batches(len(dataset.train), batch_size, wanted, request.seed)
    judging = min(JUDGING_BATCHES, len(order) - 1) if request.budgets else 0
    if request.budgets and not judging:
        feedback.say("there is one batch of images: it judges the gradients of subspaces that come from it")
        return order, order
    return order[: len(order) - judging], order[len(order) - judging :]


def measure_spectra(
    request: Request,
    network: Network,
    captured: Captured,
    dataset: Dataset,
    order: NDArray[np.int64],
    feedback: Feedback,
) -> tuple[Spectra, int]:
    """The spectra of every trainable layer's input, and the number of batches that they come from."""
    if not captured.layers or request.methods == ("bp",):
        return {}, 0
    batch_size = order.shape[1]
    if request.mode == "patch":
        moments = measure_moments(request, network, captured, dataset, order, {}, feedback)
        return {
            layer.name: layer_spectra_of(
                layer, request.mode, batch_size, moments[layer.name], None, request.energy
            )
            for layer in captured.layers
        }, len(order)
    feedback.say(f"calibration: {len(order)} batches of {batch_size} training images")
    model, taps = tap_inputs(captured, network_weights(network))
    spectra = layer_spectra(
        serialise(model, "calibration"),
        taps,
        {layer.name: layer.input_shape for layer in captured.layers},
        _load(order, dataset.train, network.preprocessing),
        batch_size,
        request.threads or os.cpu_count() or 1,
        lambda done: feedback.progress("calibrate", done, len(order)),
    )
    return spectra, len(order)


def measure_moments(
    request: Request,
    network: Network,
    captured: Captured,
    dataset: Dataset,
    order: NDArray[np.int64],
    memory: Mapping[str, LayerMemory],
    feedback: Feedback,
) -> dict[str, Moments]:
    """The second moments of every trainable layer's input, for patch mode and continual learning.

    Args:
        order: of the images, `[batches, B]`.
        memory: what earlier tasks need, by layer.
    """
    feedback.say(f"calibration: {len(order)} batches of {order.shape[1]} training images")
    model, taps = tap_inputs(captured, network_weights(network))
    return layer_moments(
        serialise(model, "calibration"),
        taps,
        captured.layers,
        request.mode,
        memory,
        _load(order, dataset.train, network.preprocessing),
        order.shape[1],
        request.threads or os.cpu_count() or 1,
        lambda done: feedback.progress("calibrate", done, len(order)),
    )


def _load(order: NDArray[np.int64], part: Part, preprocessing: InputSpec) -> Iterator[NDArray[np.float32]]:
    for indices in order:
        yield load_batch(part, indices, preprocessing)


def tap_inputs(
    captured: Captured, weights: Mapping[str, NDArray[np.generic]]
) -> tuple[ir.Model, dict[str, str]]:
    """The network from images to the inputs of its trainable layers, weights constant."""
    copy = clone_of_evaluation(captured)
    bind(copy.model, weights)
    emit = Emit(copy.model.graph, "taps/")
    inputs = {
        layer.name: input_of(emit, node, geometry(node))
        for layer, node in zip(copy.layers, copy.nodes, strict=True)
    }
    model = extract(copy.model, [copy.images], list(dict.fromkeys(inputs.values())), infer_specs(copy.model))
    return model, {name: str(value.name) for name, value in inputs.items()}


def select_ranks(
    request: Request,
    network: Network,
    captured: Sequence[Captured],
    spectra: Spectra,
    dataset: Dataset,
    order: NDArray[np.int64],
    feedback: Feedback,
) -> RankChoice:
    """The ranks of every variant, by energy or within a budget, where a few batches measure the gradients."""
    batches = GradientBatches(network.module, captured[-1].layers, dataset.train, network.preprocessing, order)
    selections = tuple(one.layers for one in captured)
    return choose_ranks(request, selections, spectra, batches, feedback)


# --- graphs -------------------------------------------------------------------------------------------


def compile_variants(
    request: Request,
    captured: Sequence[Captured],
    choice: RankChoice,
    spectra: Spectra,
    batch_size: int,
    feedback: Feedback,
) -> tuple[Compiled, ...]:
    """A variant for each method and count of layers, method by method.

    Without trainable layers all methods are the same, and plain backpropagation stands for them.
    """
    if not captured[0].layers and request.methods != ("bp",):
        feedback.say("with no layer but the head trained, all methods are plain backpropagation")
    wanted = [
        (method, one)
        for method in dict.fromkeys((*request.methods, "bp"))
        for one in captured
        if (method in request.methods if one.layers else method == "bp")
    ]
    compiled = []
    for number, (method, one) in enumerate(wanted, start=1):
        ranks, budget = choice.get((method, len(one.layers)), {}), request.budgets.get(method)
        energy = energy_of(request, method)
        compiled.append(
            compile_variant(
                one, method, ranks, spectra, batch_size, energy, budget, request.mode, request.any_rank
            )
        )
        if len(wanted) > len(METHODS):  # it takes a moment then
            feedback.progress("compile", number, len(wanted))
    return tuple(compiled)


def verify_variants(
    network: Network,
    captured: Sequence[Captured],
    variants: Sequence[Compiled],
    spectra: Spectra,
    samples: Sequence[Samples],
    feedback: Feedback,
) -> None:
    """Refuse to ship graphs that do not train as PyTorch does."""
    weights, largest = network_weights(network), cut_projections(variants, spectra)
    selections = {len(one.layers): one for one in captured}
    worst: dict[str, float] = {}
    for done, compiled in enumerate(variants, start=1):
        variant = compiled.variant
        own = {name: largest[name][..., :rank] for name, rank in variant.projection_ranks.items()}
        chosen = selections[len(variant.layers)]
        error = verify_on_any(samples, network.module, chosen.layers, compiled, weights, own, chosen.norms)
        worst[variant.method] = max(error, worst.get(variant.method, 0.0))
        if len(variants) > len(METHODS):
            feedback.progress("verify", done, len(variants))
    for method, error in worst.items():
        feedback.say(f"verified: loss and gradients of {method} agree with PyTorch to {error:.0e}")


def verification_samples(dataset: Dataset, preprocessing: InputSpec, number: int) -> list[Samples]:
    """Several sets of images and labels from all over the training part."""
    spread = np.linspace(0, len(dataset.train) - 1, number).astype(np.int64)
    sets = [(spread + shift) % len(dataset.train) for shift in range(VERIFY_SETS)]
    return [(load_batch(dataset.train, rows, preprocessing), dataset.train.labels[rows]) for rows in sets]
