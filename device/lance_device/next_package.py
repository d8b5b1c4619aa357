"""Writing the next task's package on the board: the finished one's graphs with new arrays and a new plan."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lance_device.checkpoint import Checkpoint
from lance_device.features import Batch, Unmetered
from lance_device.graphs import starting_parameters
from lance_device.session import Array
from lance_device.step_graphs import StepGraphs
from lance_edge.bundle import Bundle, describe, npz_bytes, write_bundle
from lance_edge.datasets import Dataset
from lance_edge.errors import NumericalError
from lance_edge.manifest import SCHEMA_VERSION, LayerPlan, Manifest, Task, TensorSpec, Variant
from lance_edge.memory import Memory, drift, memory_bytes
from lance_edge.names import (
    BATCH_DIM,
    LABELS,
    MEMORY_MEMBER,
    PROJECTIONS_MEMBER,
    SPECTRA_MEMBER,
    WEIGHTS_MEMBER,
    head_name,
)

Arrays = dict[str, NDArray[Any]]
METHODS = ("lance", "bp")  # the codecs of others know no memory
TRIAL_IMAGES = 2
TOUCHES = 1e-4  # ||dW M|| / ||dW|| in float32; what ignores the memory has 0.1 and more


class NextPackage(Protocol):
    """What was made for the next task (`next_task.Projected`)."""

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """Of every trained layer."""

    @property
    def arrays(self) -> Mapping[str, NDArray[np.float32]]:
        """Projections."""

    @property
    def eigenvalues(self) -> Mapping[str, NDArray[np.float64]]:
        """Spectra."""

    @property
    def energy(self) -> float:
        """ε."""

    @property
    def batches(self) -> int:
        """That were calibrated on."""


def write_next_package(
    path: Path,
    bundle: Bundle,
    checkpoint: Checkpoint,
    memory: Memory,
    dataset: Dataset,
    made: NextPackage,
    task: str,
    finished: str,
) -> None:
    """Assemble, try out on two images, and write under its name.

    Raises:
        NumericalError: if a gradient is not finite or touches the memory.
        StorageError: if it cannot be written.
    """
    weights = next_weights(bundle, checkpoint, len(dataset.classes), finished)
    contents = {name: bundle.read(name) for name in _graph_members(bundle.manifest)}
    contents |= {
        WEIGHTS_MEMBER: npz_bytes(weights),
        PROJECTIONS_MEMBER: npz_bytes(made.arrays),
        SPECTRA_MEMBER: npz_bytes(made.eigenvalues),
        MEMORY_MEMBER: memory_bytes(memory),
    }
    manifest = next_manifest(bundle.manifest, weights, contents, dataset.classes, made, task, finished)
    with _trial_file(path) as trial:
        write_bundle(trial, manifest, contents)
        with Bundle(trial) as tried:
            variants = tuple(_tried_out(tried, variant, dataset, memory) for variant in manifest.variants)
    write_bundle(path, replace(manifest, variants=variants), contents)


@contextlib.contextmanager
def _trial_file(path: Path) -> Iterator[Path]:
    trial = path.with_name(f".{path.name}.trial")
    try:
        yield trial
    finally:
        trial.unlink(missing_ok=True)


def _graph_members(manifest: Manifest) -> list[str]:
    """Everything of the package that stays: the graphs of the methods that know a memory, and constants."""
    used = {
        name
        for one in manifest.variants
        if one.method in METHODS
        for names in one.graphs.values()
        for name in names
    }
    return [member.name for member in manifest.members if member.name in used]


def next_weights(bundle: Bundle, checkpoint: Checkpoint, classes: int, finished: str) -> Arrays:
    """The network's state as the finished task left it, with a new head, and the heads of all tasks so far.

    The new head is drawn as PyTorch draws a linear layer: uniform within 1 / sqrt(features).
    """
    manifest = bundle.manifest
    stored = bundle.arrays(WEIGHTS_MEMBER)
    weights: Arrays = {name: stored[name] for name in stored}
    weights |= checkpoint.parameters
    random = np.random.Generator(np.random.PCG64([manifest.seed, len(manifest.tasks) + 1]))
    features = max(checkpoint.parameters[name].shape[-1] for name in manifest.head if "weight" in name)
    for name in manifest.head:
        old = checkpoint.parameters[name]
        weights[head_name(finished, name)] = old
        bound = features**-0.5
        weights[name] = random.uniform(-bound, bound, (classes, *old.shape[1:])).astype(np.float32)
    return weights


def next_manifest(
    before: Manifest,
    weights: Arrays,
    contents: Mapping[str, bytes],
    classes: tuple[str, ...],
    made: NextPackage,
    task: str,
    finished: str,
) -> Manifest:
    """The plan of the next package; saved tensors and statistics still have the shapes of the last one."""
    ended = Task(
        finished, before.classes, tuple(spec for spec in before.parameters if spec.name in before.head)
    )
    count = len(made.plans)
    variants = tuple(
        replace(
            variant,
            energy=made.energy if variant.method == "lance" else None,
            layers=made.plans if variant.method == "lance" else variant.layers,
            graph_macs={},
            budget_bytes=None,
        )
        for variant in before.variants
        if variant.method in METHODS and len(variant.layers) == count
    )
    trained = {name for variant in variants for name in variant.parameters}
    layers = {plan.layer for plan in made.plans}
    return replace(
        before,
        schema_version=SCHEMA_VERSION,
        classes=classes,
        energy=made.energy,
        calibration_batches=made.batches,
        parameters=tuple(
            TensorSpec(spec.name, weights[spec.name].shape, "float32")
            for spec in before.parameters
            if spec.name in trained
        ),
        layers=tuple(layer for layer in before.layers if layer.name in layers),
        variants=variants,
        members=tuple(describe(name, data) for name, data in contents.items()),
        task=task,
        tasks=(*before.tasks, ended),
        protected=tuple(layer.name for layer in before.layers if layer.name in layers),
    )


# --- the trial ------------------------------------------------------------------------------------------


def _tried_out(bundle: Bundle, variant: Variant, dataset: Dataset, memory: Memory) -> Variant:
    """The variant with the shapes that its graphs really give, after a step on two images."""
    open_variant = replace(variant, saved=_open(variant.saved), statistics=_open(variant.statistics))
    graphs = StepGraphs(bundle, open_variant, starting_parameters(bundle, variant), 1, None, None)
    shapes, gradients = _step(graphs, bundle, dataset)
    if variant.method == "lance":
        _expect_untouched(bundle, gradients, memory)
    return replace(
        variant, saved=_observed(variant.saved, shapes), statistics=_observed(variant.statistics, shapes)
    )


def _open(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Of any size in every axis: one that counts samples may have a rank for each of them."""
    return tuple(
        replace(spec, shape=tuple(f"{spec.name} {axis}" for axis in range(len(spec.shape)))) for spec in specs
    )


def _step(
    graphs: StepGraphs, bundle: Bundle, dataset: Dataset
) -> tuple[dict[str, tuple[int, ...]], dict[str, NDArray[np.float32]]]:
    """A step on two images: the shapes of all that came out, and the gradients."""
    rows = slice(0, TRIAL_IMAGES)
    batch = Batch(
        dataset.train, np.arange(TRIAL_IMAGES), np.zeros(TRIAL_IMAGES, np.bool_), bundle.manifest.preprocessing
    )
    constants, labels = graphs.constants(batch), batch.labels(rows)
    values: dict[str, Array] = graphs.features.boundary(batch, rows, Unmetered())
    totals: dict[str, Array] = {}
    values |= graphs.forward[0].run({**constants, **graphs.own_rows(rows), **values, LABELS: labels})
    shapes = {name: value.shape for name, value in values.items()}
    graphs.accumulate(totals, values)
    fed = {**constants, **totals, **graphs.own_rows(rows), LABELS: labels}
    found = graphs.backward.run(fed | {name: values[name] for name in graphs.crossing})
    shapes |= {name: value.shape for name, value in found.items()}
    graphs.accumulate(totals, found)
    return shapes, graphs.gradients(totals, constants)


def _observed(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(
        replace(
            spec,
            shape=tuple(
                _per_sample(size) if isinstance(dim, str) else size
                for dim, size in zip(spec.shape, shapes[spec.name], strict=True)
            ),
        )
        for spec in specs
    )


def _per_sample(size: int) -> str:
    """What a dimension is that has this size for the images of the trial, and a multiple of theirs for any."""
    factor = size // TRIAL_IMAGES
    return BATCH_DIM if factor == 1 else f"{factor}*{BATCH_DIM}"


def _expect_untouched(bundle: Bundle, gradients: Mapping[str, NDArray[np.float32]], memory: Memory) -> None:
    for layer in bundle.manifest.layers:
        touched = drift(gradients[layer.weight], memory.layers[layer.name])
        if touched > TOUCHES:
            raise NumericalError(
                f"{layer.name}: a gradient of the new projections has {touched:.0e} of its length inside what"
                " earlier tasks need; please report this network, and make the package on the workstation"
            )
