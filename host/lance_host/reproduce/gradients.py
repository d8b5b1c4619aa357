"""The angle between LANCE's weight gradient and the exact one, for the same weights and batch.

By the definition, not by the graphs that we emit (those are verified against PyTorch when a package is made):
the exact weight gradient is taken with the layer's input A, and with A projected on the subspaces of its modes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import read_weights
from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch
from lance_edge.manifest import Layer, Variant
from lance_edge.names import PROJECTIONS_MEMBER, projection_name
from lance_host.calibrate import calibration_batches
from lance_host.merge import merged_state
from lance_host.network import NetworkRequest, load_network
from lance_host.reproduce.material import Material
from lance_host.taps import batch_tensors, weight_gradient

OTHER_ORDER = 1_000_003  # added to the seed: not the batches that calibration took


@dataclass(frozen=True)
class Angles:
    """In degrees, over some batches, of the weights of all trained layers as one vector."""

    mean_deg: float
    worst_deg: float


def gradient_angles(
    material: Material, package: Path, layers: int, checkpoint: Path | None, batches: int, seed: int
) -> Angles:
    """The angle in `batches` batches of the training images.

    Args:
        checkpoint: of a run of this package; `None`: the weights that training begins with.

    Raises:
        LanceError: if package, checkpoint and data do not belong together.
    """
    with Bundle(package) as bundle:
        manifest, variant = bundle.manifest, bundle.manifest.variant("lance", layers)
        trained = read_weights(checkpoint, bundle).weights if checkpoint is not None else {}
        state = {name: np.asarray(value) for name, value in merged_state(bundle, trained).items()}
        projections = variant_projections(bundle, variant)
    request = NetworkRequest(material.model, material.weights, str(layers), seed=manifest.seed)
    network = load_network(request, len(manifest.classes), lambda text: None, lambda done, size: None).module
    network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    by_name = {layer.name: layer for layer in manifest.layers}
    chosen = [by_name[plan.layer] for plan in variant.layers]
    train = open_dataset(material.data, manifest.split, manifest.classes).train
    order = calibration_batches(len(train), manifest.batch_size, batches, seed + OTHER_ORDER)
    angles = [
        batch_angle(
            network,
            chosen,
            projections,
            load_batch(train, rows, manifest.preprocessing),
            train.labels[rows],
        )
        for rows in order
    ]
    return Angles(float(np.mean(angles)), max(angles))


def variant_projections(bundle: Bundle, variant: Variant) -> dict[str, torch.Tensor]:
    """`<layer>/U<mode>` `[n_mode, r_mode]` at this variant's ranks."""
    stored = bundle.arrays(PROJECTIONS_MEMBER)
    return {
        name: torch.from_numpy(np.array(stored[name][:, :rank]))
        for name, rank in variant.projection_ranks.items()
    }


def batch_angle(
    network: torch.nn.Module,
    layers: Sequence[Layer],
    projections: Mapping[str, torch.Tensor],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> float:
    """The angle in one batch, degrees."""
    exact, compressed = [], []
    for layer, x, dy in _tensors(network, layers, images, labels):
        exact.append(weight_gradient(layer, x, dy).flatten())
        compressed.append(weight_gradient(layer, rebuilt(layer, x, projections), dy).flatten())
    return angle_deg(torch.cat(exact), torch.cat(compressed))


def _tensors(
    network: torch.nn.Module,
    layers: Sequence[Layer],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> Iterator[tuple[Layer, torch.Tensor, torch.Tensor]]:
    found = batch_tensors(network, layers, images, labels)
    for layer in layers:
        yield (layer, *found[layer.name])


def rebuilt(layer: Layer, x: torch.Tensor, projections: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`A x_0 U_0 U_0^T x_1 U_1 U_1^T ...`, of the shape of `x`; a mode without a projection is whole."""
    for mode in range(x.dim()):
        basis = projections.get(projection_name(layer.name, mode))
        if basis is not None:
            x = torch.tensordot(x, basis @ basis.T, dims=([mode], [0])).movedim(-1, mode)
    return x


def angle_deg(first: torch.Tensor, second: torch.Tensor) -> float:
    """Between two vectors, 0 to 180; 90 where one of them is zero."""
    a, b = first.double(), second.double()
    norms = float(a.norm() * b.norm())
    if norms == 0:
        return 90.0
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b) / norms))))
