"""The time of a batch's weight gradients alone, in micro-batches, as the device runs them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from benchmarks.batches import new_meter
from benchmarks.job import Job, job_row
from benchmarks.rows import PeerRow
from benchmarks.weight_gradient import (
    WeightGraphs,
    fed_shape,
    input_name,
    output_gradient_name,
    weight_graphs,
)
from lance_device.graphs import load_projections
from lance_device.session import Array, Graph
from lance_device.step_graphs import micro_batches
from lance_edge.bundle import Bundle
from lance_edge.manifest import Manifest, Variant

METHODS = {"weights-lance": "lance", "weights-bp": "bp"}
# Which graphs go through all micro-batches together, as on the device.
PASSES: dict[str, tuple[tuple[str, ...], ...]] = {
    "one pass": (("forward", "backward"),),
    "two passes": (("forward",), ("backward",)),
}


class WeightWork:
    """Graphs, projections and invented inputs of one variant."""

    def __init__(self, graphs: WeightGraphs, projections: Mapping[str, Array], variant: Variant, threads: int):
        """Load; sessions are set up as the device's."""
        self._graphs = {role: Graph(data, role, threads) for role, data in graphs.graphs.items()}
        self._statistics, self._gradients = graphs.statistics, graphs.gradients
        self._passes = PASSES[variant.schedule]
        self._whole = {name: projections[name] for name in variant.projections}
        self._rows = {name: projections[name] for name in variant.batch_projections}

    def run(self, parts: list[tuple[slice, dict[str, Array]]]) -> dict[str, Array]:
        """Weight gradients by name.

        Args:
            parts: rows of the batch, and the inputs of each micro-batch.
        """
        constants = self._whole | self._run("prepare", self._whole)
        totals: dict[str, Array] = {}
        for roles in self._passes:
            for rows, values in parts:
                own = {name: rows_of[rows] for name, rows_of in self._rows.items()}
                for role in roles:
                    self._add(totals, self._run(role, constants | totals | values | own))
        totals |= self._run("gradient", constants | totals)
        return {name: totals[name] for name in self._gradients}

    def _run(self, role: str, values: Mapping[str, Array]) -> dict[str, Array]:
        return self._graphs[role].run(values) if role in self._graphs else {}

    @staticmethod
    def _add(totals: dict[str, Array], values: dict[str, Array]) -> None:
        for name, value in values.items():
            if name in totals:
                totals[name] += value
            else:
                totals[name] = value


def run(job: Job, folder: Path) -> Iterator[PeerRow]:
    """One row a step: phase `weights`."""
    with Bundle(Path(job.package)) as bundle:
        manifest = bundle.manifest
        variant = manifest.variant(METHODS[job.contender], job.layers)
        projections = load_projections(bundle, variant)
    work = WeightWork(weight_graphs(manifest, variant), projections, variant, job.threads)
    parts = invented_parts(manifest, variant, job.micro_batch)
    meter = new_meter()
    for number in range(1, job.warmups + job.steps + 1):
        with meter.phase("weights"):
            work.run(parts)
        yield job_row(job, manifest.batch_size, number, "weights", meter.take("weights").latency_ms)


def invented_parts(
    manifest: Manifest, variant: Variant, micro_batch: int
) -> list[tuple[slice, dict[str, Array]]]:
    """Seeded inputs and output gradients of every micro-batch: their values change no time."""
    rng = np.random.default_rng(0)
    layers = {layer.name: layer for layer in manifest.layers}
    parts = []
    for rows in micro_batches(manifest.batch_size, micro_batch):
        values: dict[str, Array] = {}
        for plan in variant.layers:
            layer, count = layers[plan.layer], rows.stop - rows.start
            for name, sizes in (
                (input_name(layer.name), layer.input_shape),
                (output_gradient_name(layer.name), layer.output_shape),
            ):
                values[name] = rng.standard_normal(fed_shape(layer, sizes, count), np.float32)
        parts.append((rows, values))
    return parts
