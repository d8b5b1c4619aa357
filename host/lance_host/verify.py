"""Before a package is written: do the compiled graphs train as PyTorch does?

A handful of the user's own images goes through PyTorch and through the graphs.  The loss and every
plain gradient must agree with autograd; the gradient of a compressed layer with the literal formula
(project, rebuild, convolve) on PyTorch's own tensors.
"""

import contextlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lance_edge.errors import ModelError
from lance_edge.manifest import Layer, LayerPlan, Variant
from lance_edge.names import (
    DROPOUT_SEEDS,
    IMAGES,
    LABELS,
    LOSS,
    SCALE,
    TARGET_OFF,
    TARGET_ON,
    core_name,
    gradient_name,
    projection_name,
)
from lance_edge.targets import Targets
from lance_host.compile import Compiled
from lance_host.runtime import open_session
from lance_host.taps import (
    as_described,
    loss_gradients,
    module_taps,
    patch_output,
    patch_weight_gradient,
    rebuilt_patches,
    weight_gradient,
)

Arrays = dict[str, NDArray[np.generic]]
Samples = tuple[NDArray[np.float32], NDArray[np.int64]]  # images [n, 3, R, R] and labels [n]

# float32 sums in another order differ by about 1e-6 relative to the largest entry; 1e-3 is a bug.
TOLERANCE = 1e-3


def verify(
    network: torch.nn.Module,
    layers: Sequence[Layer],
    compiled: Compiled,
    weights: Mapping[str, NDArray[np.generic]],
    projections: Mapping[str, NDArray[np.float32]],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    norms: Mapping[str, str] = MappingProxyType({}),
) -> float:
    """The largest relative error (maximum norm) over the loss and all gradients.

    Args:
        norms: layer -> norm, where the gradient of the norm's scale comes out of the layer's (see `fold.py`).
        images: float32 `[n, 3, R, R]`, no more than a batch; taken as the first n rows of one.

    Raises:
        ModelError: if the error is larger than `TOLERANCE`, naming the tensor.
    """
    tensors, expected = _by_autograd(network, layers, compiled, images, labels, norms)
    if compiled.variant.schedule == "by layer":
        projections = stand_in_factors(compiled.variant, layers, len(images))
    for plan, layer in zip(compiled.variant.layers, layers, strict=True):
        if plan.ranks:
            bases = _bases(projections, layer)
            x, dy = tensors[layer.name]
            output, gradient = literal(network, layer, x, dy, bases, is_patch_plan(layer, plan))
            expected[gradient_name(layer.weight)] = gradient.numpy()
            if layer.name in norms:
                norm = norms[layer.name]
                scale = scale_gradient(network, norm, output, tensors[norm][1])
                expected[gradient_name(f"{norm}.weight")] = scale.numpy()
    found = run_graphs(compiled, {**weights, **projections}, images, labels, _classes(network, images))
    errors = {name: _relative_error(found[name], value) for name, value in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:  # also when it is not a number
        raise ModelError(
            f"method {compiled.variant.method}: {worst} differs from PyTorch by {errors[worst]:.1e} relative,"
            f" expected at most {TOLERANCE:.0e}; the package was not written: please report this network"
        )
    return errors[worst]


def is_patch_plan(layer: Layer, plan: LayerPlan) -> bool:
    """Whether the ranks are those of patch mode."""
    return not layer.is_linear and len(plan.ranks) == len(layer.modes_in("patch"))


def literal(
    network: torch.nn.Module,
    layer: Layer,
    x: torch.Tensor,
    dy: torch.Tensor,
    bases: Mapping[int, NDArray[np.float32]],
    is_patch: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and weight gradient of a layer whose input is projected on the bases and rebuilt."""
    module: Any = network.get_submodule(layer.name)
    with torch.no_grad():
        if not is_patch:
            rebuilt = rebuild(x, bases)
            return module(rebuilt), weight_gradient(layer, rebuilt, dy)
        patches = rebuilt_patches(layer, x, bases)
        output = patch_output(layer, module.weight, patches)
        if module.bias is not None:
            output = output + module.bias[:, None, None]
        return output, patch_weight_gradient(layer, patches, dy)


def check_samples_apart(network: torch.nn.Module, images: NDArray[np.float32]) -> None:
    """Refuse a network in which the samples of a batch see each other: micro-batches would change its logits.

    Args:
        images: float32 `[n, 3, R, R]`, two or more.

    Raises:
        ModelError: if the logits of the images together differ from those of the images in two parts.
    """
    samples, first = torch.from_numpy(images), max(1, len(images) // 2)
    with torch.no_grad():
        whole = network(samples).numpy()
        parts = torch.cat([network(samples[:first]), network(samples[first:])]).numpy()
    error = _relative_error(parts, whole)
    if error > TOLERANCE:
        raise ModelError(
            f"the network mixes the samples of a batch: in two parts, the logits of {len(images)} samples"
            f" differ by {error:.1e} relative, expected at most {TOLERANCE:.0e}; look for sums, means or a"
            " softmax over axis 0, and take them over other axes"
        )


def stand_in_factors(variant: Variant, layers: Sequence[Layer], samples: int) -> dict[str, NDArray[np.float32]]:
    """Random factors of the planned ranks: a graph that a codec feeds must be right for whatever it gives."""
    random, factors = np.random.default_rng(0), dict[str, NDArray[np.float32]]()
    for layer, plan in zip(layers, variant.layers, strict=True):
        for mode, (size, rank) in enumerate(zip((samples, *layer.input_shape), plan.ranks, strict=True)):
            basis, _ = np.linalg.qr(random.standard_normal((max(size, rank), rank)))
            factors[projection_name(layer.name, mode)] = basis[:size].astype(np.float32)  # rows of a batch
    return factors


def _bases(projections: Mapping[str, NDArray[np.float32]], layer: Layer) -> dict[int, NDArray[np.float32]]:
    """The projections of a layer by mode."""
    names = {mode: projection_name(layer.name, mode) for mode in range(len(layer.modes))}
    return {mode: projections[name] for mode, name in names.items() if name in projections}


def verify_on_any(
    samples: Sequence[Samples],
    network: torch.nn.Module,
    layers: Sequence[Layer],
    compiled: Compiled,
    weights: Mapping[str, NDArray[np.generic]],
    projections: Mapping[str, NDArray[np.float32]],
    norms: Mapping[str, str],
) -> float:
    """The error on the first set of images on which it is small.

    Where a unit lies on the kink of a ReLU, rounding decides whether it has a gradient: of a few million
    units it happens to one.  On another set it is gone, while a wrong graph is wrong on all of them.

    Raises:
        ModelError: that of the last set.
    """
    *others, last = samples
    for images, labels in others:
        with contextlib.suppress(ModelError):
            return verify(network, layers, compiled, weights, projections, images, labels, norms)
    return verify(network, layers, compiled, weights, projections, *last, norms)


def _relative_error(found: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(np.asarray(found) - expected).max()) / scale


def rebuild(activation: torch.Tensor, bases: Mapping[int, NDArray[np.floating[Any]]]) -> torch.Tensor:
    """Project on the basis of each mode and back, literally, with the first n rows of U0; shape as it was.

    Args:
        bases: by mode; a mode without one is left as it is.
    """
    for mode, array in bases.items():
        basis = torch.from_numpy(array[: len(activation)] if mode == 0 else array)
        unfolded = activation.movedim(mode, -1)  # [..., n_mode]
        activation = (unfolded @ basis @ basis.T).movedim(-1, mode)
    return activation


def scale_gradient(network: torch.nn.Module, norm: str, y: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of a frozen norm's scale `[O]` behind a convolution.

    Args:
        y: the output of the convolution, of the rebuilt input.
        dy: the gradient of the norm's output.
    """
    module: Any = network.get_submodule(norm)
    with torch.no_grad():
        centred = (y - module.running_mean[:, None, None]) * dy
        gradient: torch.Tensor = centred.sum((0, 2, 3)) / (module.running_var + module.eps).sqrt()
    return gradient


def _by_autograd(
    network: torch.nn.Module,
    layers: Sequence[Layer],
    compiled: Compiled,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    norms: Mapping[str, str],
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], Arrays]:
    """Input and output gradient of each layer and norm, and the expected loss and gradients by tensor name."""
    names = [*(layer.name for layer in layers), *(norms[layer.name] for layer in layers if layer.name in norms)]
    parameters = dict(network.named_parameters())
    with module_taps(network, names) as taps, torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
        outputs = {name: taps[name][1] for name in names}
        trained = {name: parameters[name] for name in compiled.variant.parameters}
        results = loss_gradients(loss, outputs | trained)
    expected = {
        gradient_name(name): gradient.numpy()
        for name, gradient in zip(compiled.variant.parameters, results[len(names) :], strict=True)
    }
    expected[LOSS] = loss.detach().numpy() * len(images)  # the graphs give the sum
    tensors = {name: (taps[name][0], dy) for name, dy in zip(names, results, strict=False)}
    return tensors | {layer.name: as_described(layer, *tensors[layer.name]) for layer in layers}, expected


def run_graphs(
    compiled: Compiled,
    values: Mapping[str, NDArray[np.generic]],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int = 0,
) -> Arrays:
    """One step of a variant on one micro-batch, as `docs/artifact.md` says it: all tensors by name.

    Args:
        classes: their number, where the graphs take any.
    """
    known: Arrays = dict(values)
    for name in compiled.variant.batch_projections:
        known[name] = known[name][: len(images)]
    known |= {IMAGES: images, LABELS: labels, SCALE: np.array(1 / len(images), np.float32)}
    known[DROPOUT_SEEDS] = np.full(len(images), -1)  # drops nothing, as the network in evaluation mode
    variant = compiled.variant
    for role in ("prefix", "prepare", *variant.forward_roles, "backward", "gradient"):
        if role == "backward":
            known |= _cores(variant, known)
        if role in variant.graphs:
            session = open_session(compiled.graph(role))
            known |= _plain_targets(session, classes)
            outputs = [output.name for output in session.get_outputs()]
            feeds = {declared.name: known[declared.name] for declared in session.get_inputs()}
            known.update(zip(outputs, session.run(outputs, feeds), strict=True))
    return known


def _plain_targets(session: Any, classes: int) -> Arrays:
    """Those of ordinary cross-entropy, for as many classes as a graph declares, or takes any number of."""
    sizes = [declared.shape[0] for declared in session.get_inputs() if declared.name in (TARGET_ON, TARGET_OFF)]
    size = sizes[0] if sizes and isinstance(sizes[0], int) else classes
    return {**Targets.plain(size).arrays()} if sizes else {}


def _classes(network: torch.nn.Module, images: NDArray[np.float32]) -> int:
    with torch.no_grad():
        return int(network(torch.from_numpy(images[:1])).shape[1])


def _cores(variant: Variant, known: Mapping[str, NDArray[Any]]) -> Arrays:
    """What a codec would give with the factors in `known`: the cores `[r1, r0, ...]`."""
    cores: Arrays = {}
    for plan, spec in zip(variant.layers, variant.activations, strict=False):
        core = known[spec.name]
        for mode in range(core.ndim):  # moves each mode to the end: all of them make a round
            core = np.tensordot(core, known[projection_name(plan.layer, mode)], axes=([0], [0]))
        cores[core_name(plan.layer)] = core.swapaxes(0, 1).astype(np.float32)
    return cores
