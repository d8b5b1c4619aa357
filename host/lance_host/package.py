"""What a calibration found becomes one file: manifest and members of the package."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lance_edge import __version__
from lance_edge.bundle import describe, npz_bytes, write_bundle
from lance_edge.manifest import SCHEMA_VERSION, FrozenLayer, Manifest, Task, TensorSpec
from lance_edge.memory import Memory, memory_bytes
from lance_edge.names import MEMORY_MEMBER, PROJECTIONS_MEMBER, SPECTRA_MEMBER, WEIGHTS_MEMBER, projection_name
from lance_edge.spectrum import ModeSpectrum
from lance_host.capture import Captured
from lance_host.compile import Compiled
from lance_host.network import Network
from lance_host.request import Request

Spectra = Mapping[str, Sequence[ModeSpectrum]]


@dataclass(frozen=True)
class Plan:
    """What a calibration found: everything that a package is made of."""

    network: Network
    captured: Captured
    classes: tuple[str, ...]
    spectra: Spectra
    variants: Sequence[Compiled]
    batch_size: int
    batches: int


@dataclass(frozen=True)
class Tasks:
    """The task that a package trains, and what was learned before (see `Manifest`)."""

    name: str
    earlier: tuple[Task, ...] = ()
    heads: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    memory: Memory | None = None
    frozen: tuple[FrozenLayer, ...] = ()


def write_package(request: Request, plan: Plan, tasks: Tasks) -> Manifest:
    """Assemble manifest and members, and write the tar."""
    contents = {name: data for compiled in plan.variants for name, data in compiled.members.items()}
    weights, captured = network_weights(plan.network), plan.captured
    eigenvalues = {
        f"{name}/eigenvalues{i}": s.eigenvalues
        for name, modes in plan.spectra.items()
        for i, s in enumerate(modes)
    }
    contents |= {
        WEIGHTS_MEMBER: npz_bytes({**weights, **tasks.heads}),
        PROJECTIONS_MEMBER: npz_bytes(cut_projections(plan.variants, plan.spectra)),
        SPECTRA_MEMBER: npz_bytes(eigenvalues),
    }
    if tasks.memory is not None:
        contents[MEMORY_MEMBER] = memory_bytes(tasks.memory)
    trained = [str(value.name) for value in captured.parameters]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=f"lance-edge {__version__}",
        model=plan.network.name,
        weights_source=plan.network.weights_source,
        classes=plan.classes,
        preprocessing=plan.network.preprocessing,
        split=request.split,
        seed=request.seed,
        mode=request.mode,
        energy=request.energy,
        batch_size=plan.batch_size,
        calibration_batches=plan.batches,
        parameters=tuple(TensorSpec(name, weights[name].shape, "float32") for name in trained),
        layers=captured.layers,
        variants=tuple(compiled.variant for compiled in plan.variants),
        members=tuple(describe(name, data) for name, data in contents.items()),
        task=tasks.name,
        head=captured.head,
        tasks=tasks.earlier,
        protected=tuple(layer.name for layer in captured.layers) if tasks.memory is not None else (),
        frozen=tasks.frozen,
    )
    write_bundle(request.output, manifest, contents)
    return manifest


def network_weights(network: Network) -> dict[str, NDArray[np.generic]]:
    """The state dict as arrays."""
    return {name: tensor.detach().numpy() for name, tensor in network.module.state_dict().items()}


def cut_projections(variants: Sequence[Compiled], spectra: Spectra) -> dict[str, NDArray[np.float32]]:
    """`<layer>/U<mode>` at the largest rank that any variant chose; a smaller one is its leading columns."""
    ranks: dict[str, int] = {}
    for compiled in variants:
        for name, rank in compiled.variant.projection_ranks.items():
            ranks[name] = max(rank, ranks.get(name, 0))
    return {
        projection_name(layer, mode): spectrum.projection(ranks[projection_name(layer, mode)])
        for layer, modes in spectra.items()
        for mode, spectrum in enumerate(modes)
        if projection_name(layer, mode) in ranks
    }
