"""The next task of a network that has learned others: its main path on the workstation.

`calibrate_next` is `build.calibrate` with a past: weights come from the finished run, projections from what
the memory leaves of the new task's inputs, and layers of which nothing is left stay frozen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lance_edge.input_spec import InputSpec
from lance_edge.manifest import FrozenLayer, Layer, Manifest
from lance_edge.memory import LayerMemory, Memory
from lance_edge.moments import protected_mode
from lance_edge.protected_spectra import layer_spectra_of, ranks_by_mode
from lance_host.build import (
    VERIFY_IMAGES,
    VERIFY_SETS,
    capture_selections,
    compile_variants,
    measure_moments,
    verification_samples,
    verify_variants,
)
from lance_host.calibrate import calibration_batches
from lance_host.capture import Captured
from lance_host.network import Network
from lance_host.next_task import Material, check_next, open_material, open_memory, open_network
from lance_host.package import Plan, Spectra, Tasks, write_package
from lance_host.past import Past, read_past, settle_task_name
from lance_host.rank_choice import RankChoice
from lance_host.request import After, Feedback, Request, check
from lance_host.share import share
from lance_host.trainable import check_trainable
from lance_host.verify import Samples


def calibrate_next(request: Request, after: After, feedback: Feedback) -> Manifest:
    """Write the package of the next task and return its manifest.

    Raises:
        LanceError: with nothing written, for anything that request, past or images do not allow.
    """
    check(request)
    check_next(request, after)
    past = read_past(after.artifact, after.checkpoint)
    request = replace(request, layers=request.layers or past.layer_names)
    memory = open_memory(request, after, past)
    material = open_material(request, after, past, memory, feedback)
    network = open_network(request, past, material, feedback)

    captured = capture_selections(network)
    check_trainable(captured[-1], request.layers)
    spectra, batches = measure(request, network, captured[-1], material, memory, feedback)
    network, captured, frozen = freeze(request, network, captured, spectra, past, memory, feedback)
    choice = choose(request, captured, spectra, material.batch_size)
    variants = share(compile_variants(request, captured, choice, spectra, material.batch_size, feedback))
    samples = samples_of(material, network.preprocessing)
    verify_variants(network, captured, variants, spectra, samples, feedback)

    used = {layer.name: spectra[layer.name] for layer in captured[-1].layers if layer.name in spectra}
    plan = Plan(network, captured[-1], material.classes, used, variants, material.batch_size, batches)
    names = tuple(task.name for task in past.tasks)
    wanted = request.task or (material.statistics.task if material.statistics is not None else None)
    name = settle_task_name(wanted, request.data, names)
    return write_package(request, plan, Tasks(name, past.tasks, past.heads, memory, frozen))


# --- its null space -----------------------------------------------------------------------------------


def measure(
    request: Request,
    network: Network,
    captured: Captured,
    material: Material,
    memory: Memory | None,
    feedback: Feedback,
) -> tuple[Spectra, int]:
    """The spectra of every layer's input outside of the memory, and the number of batches."""
    if not captured.layers:
        return {}, 0
    remembered: Mapping[str, LayerMemory] = {} if memory is None else memory.layers
    moments: Mapping[str, Mapping[int, NDArray[np.floating]]]
    if material.statistics is not None:
        moments, batches = material.statistics.layers, material.statistics.batches
    else:
        assert material.dataset is not None
        size = len(material.dataset.train)
        order = calibration_batches(size, material.batch_size, request.batches, request.seed)
        batches = len(order)
        moments = measure_moments(request, network, captured, material.dataset, order, remembered, feedback)
    whole_below = request.after.null_space_below if request.after is not None else 0
    return {
        layer.name: layer_spectra_of(
            layer,
            request.mode,
            material.batch_size,
            moments[layer.name],
            remembered.get(layer.name),
            request.energy,
            whole_below,
        )
        for layer in captured.layers
    }, batches


def freeze(
    request: Request,
    network: Network,
    captured: tuple[Captured, ...],
    spectra: Spectra,
    past: Past,
    memory: Memory | None,
    feedback: Feedback,
) -> tuple[Network, tuple[Captured, ...], tuple[FrozenLayer, ...]]:
    """Leave out layers whose null space is used up; report them, and those that were left out before."""
    used_up = {
        layer.name: _reason(layer, memory.layers[layer.name])
        for layer in captured[-1].layers
        if memory is not None and not spectra[layer.name][protected_mode(layer)].rank(request.energy)
    }
    for name, reason in used_up.items():
        feedback.say(f"{name} stays frozen: {reason}")
    trained = {layer.name for layer in past.layers}
    unasked = trained.difference(network.selections[-1])
    frozen = (
        *past.manifest.frozen,
        *(FrozenLayer(layer.name, "left out with --layers") for layer in past.layers if layer.name in unasked),
        *(FrozenLayer(name, reason) for name, reason in used_up.items()),
    )
    if not used_up:
        return network, captured, frozen
    left = [tuple(name for name in one if name not in used_up) for one in network.selections]
    if not left[-1]:
        feedback.say("no layer has any null space left: the head alone trains")
    network = replace(network, selections=tuple(dict.fromkeys(left)))
    return network, capture_selections(network), frozen


def _reason(layer: Layer, memory: LayerMemory) -> str:
    used = f"{sum(memory.ranks)} of {memory.groups * memory.dimension} dimensions are protected"
    return f"its null space is used up ({used}, and this task has nothing outside of them)"


def choose(request: Request, captured: Sequence[Captured], spectra: Spectra, batch_size: int) -> RankChoice:
    """The ranks of `lance`, for each selection of layers."""
    return {
        ("lance", len(one.layers)): ranks_by_mode(one.layers, request.mode, batch_size, spectra, request.energy)
        for one in captured
        if one.layers and "lance" in request.methods
    }


def samples_of(material: Material, preprocessing: InputSpec) -> list[Samples]:
    """What the graphs are verified on: some of the images, or noise where there are none."""
    number = min(VERIFY_IMAGES, material.batch_size)
    if material.dataset is not None:
        return verification_samples(material.dataset, preprocessing, number)
    rng = np.random.default_rng(0)
    shape = (number, *preprocessing.sample_shape)
    return [
        (
            rng.standard_normal(shape, dtype=np.float32),
            rng.integers(len(material.classes), size=number),
        )
        for _ in range(VERIFY_SETS)
    ]
