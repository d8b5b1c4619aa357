"""One measurement: some steps of one setting in a process of its own, so that its peak memory is its own."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lance_device.bench_features import open_bench_features
from lance_device.bench_images import generated_part
from lance_device.features import Batch
from lance_device.graphs import load_prefix, starting_parameters
from lance_device.measure import PhaseCost, PhaseMeter, RowLog
from lance_device.optimizer import SGD
from lance_device.probe import HealthProbe, MemoryProbe
from lance_device.step import training_step
from lance_device.step_graphs import StepOutcome
from lance_edge.bench_rows import BenchRow, Setting
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import DataError
from lance_edge.images import Part
from lance_edge.manifest import Manifest
from lance_edge.profiles import PHASES
from lance_edge.stream import SampleStream
from lance_edge.units import count

# The published recipe's, but for the rate: the same batch is trained on again and again.
OPTIMISER = SGD(momentum=0.9, weight_decay=0.0, clip=2.0)
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Job:
    """What a process is to measure.

    Attributes:
        data: folder of images, or `None` for generated ones.
        cached: boundary tensors are read from a file, which the warm-ups fill.
        warmups: steps before the measured ones, marked as such.
        learning_rate: no time depends on it.
    """

    run_id: str
    artifact: str
    data: str | None
    method: str
    layers: int
    micro_batch: int
    threads: int
    trial: int
    warmups: int
    steps: int
    cached: bool = False
    learning_rate: float = LEARNING_RATE

    @property
    def setting(self) -> Setting:
        """What is measured."""
        return Setting(self.method, self.layers, self.micro_batch, self.cached)

    def setting_text(self) -> str:
        """What is measured, in words."""
        return f"{self.method}, {count(self.layers, 'layer')}, micro-batch {self.micro_batch}"


def work(job: Job, rows: Path) -> None:
    """Measure, and write a `BenchRow` for each phase of each step.

    Args:
        rows: the file to write; features are kept beside it.

    Raises:
        LanceError: if the package or the images do not allow it.
    """
    with Bundle(Path(job.artifact)) as bundle:
        variant = bundle.manifest.variant(job.method, job.layers)
        parameters = starting_parameters(bundle, variant)
        batch = open_batch(job, bundle.manifest)
        prefix = load_prefix(bundle, variant, job.threads, job.micro_batch)
        folder = rows.parent if job.cached else None
        features = open_bench_features(prefix, variant, batch.part, len(batch), folder)
        step = training_step(bundle, variant, parameters, job.threads, features)
        common = common_cells(job, bundle.manifest)
    log, began = RowLog(rows, BenchRow), time.monotonic()
    meter, health = PhaseMeter(MemoryProbe()), HealthProbe()
    velocity: dict[str, Any] = {}
    for number in range(1, job.warmups + job.steps + 1):
        computed = features.computed
        outcome = step.run(batch, job.micro_batch, meter, lambda: None)
        with meter.phase("update"):
            OPTIMISER.update(parameters, velocity, outcome.gradients, job.learning_rate)
        costs = meter.take_step()
        state = {
            **common,
            "step": number,
            "warmup": number <= job.warmups,
            "time_s": time.monotonic() - began,
            "cached": features.computed == computed,
            "activation_bytes": outcome.activation_bytes or variant.activation_bytes,
        }
        log.write(*step_rows(state, outcome, costs, health))
    log.close()
    features.close(discard=True)


def open_batch(job: Job, manifest: Manifest) -> Batch:
    """The batch of every step: the first one of a training run, or generated images.

    Raises:
        DataError: if there are fewer training images than a batch.
    """
    size, indices = manifest.batch_size, np.arange(manifest.batch_size, dtype=np.int64)
    if job.data is None:
        part: Part = generated_part(manifest.preprocessing, len(manifest.classes), size)
    else:
        part = open_dataset(Path(job.data), manifest.split, manifest.classes).train
        if len(part) < size:
            raise DataError(
                f"{job.data}: {len(part)} training images, but the package was calibrated for batches of"
                f" {size}; add images, or measure generated ones without --data"
            )
        indices = SampleStream(len(part), size, seed=0, shuffle=True, flip=False).indices(0)
    return Batch(part, indices, np.zeros(size, dtype=np.bool_), manifest.preprocessing)


def common_cells(job: Job, manifest: Manifest) -> dict[str, Any]:
    """Cells that are the same in every row of a job."""
    variant = manifest.variant(job.method, job.layers)
    return {
        "run_id": job.run_id,
        "trial": job.trial,
        "method": variant.method,
        "model": manifest.model,
        "layers": len(variant.layers),
        "energy": variant.energy,
        "batch_size": manifest.batch_size,
        "micro_batch": job.micro_batch,
        "threads": job.threads,
        "epoch": 1,
        "samples": manifest.batch_size,
    }


def step_rows(
    state: dict[str, Any], outcome: StepOutcome, costs: dict[str, PhaseCost], health: HealthProbe
) -> Iterator[BenchRow]:
    """A row for each phase of a step."""
    reading = health.read()
    for phase in (phase for phase in PHASES if phase in costs):
        yield BenchRow(
            **state,
            phase=phase,
            latency_ms=costs[phase].latency_ms,
            rss_kib=costs[phase].rss_kib,
            peak_rss_kib=costs[phase].peak_rss_kib,
            loss=outcome.loss,
            temperature_c=reading.temperature_c,
            arm_mhz=reading.arm_mhz,
            throttled=reading.throttled,
            saved_bytes=outcome.saved_bytes,
        )
