"""ONNX Runtime's plain forward of the whole network: the floor that a training step stands on."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.batches import new_meter, package_of, same_batch
from benchmarks.job import Job, step_rows
from benchmarks.rows import PeerRow
from lance_device.evaluate import cross_entropy
from lance_device.step_graphs import micro_batches
from lance_edge.names import IMAGES, LOGITS
from lance_host.runtime import open_session


def run(job: Job, folder: Path) -> Iterator[PeerRow]:
    """Forward of a batch in micro-batches, in a session with the runtime's own defaults."""
    manifest, _ = package_of(job)
    session = open_session(Path(job.model).read_bytes(), job.threads)
    batch, meter = same_batch(job, manifest), new_meter()
    for number in range(1, job.warmups + job.steps + 1):
        total = 0.0
        for rows in micro_batches(len(batch), job.micro_batch):
            with meter.phase("data"):
                images = batch.images(rows)
            with meter.phase("forward"):
                (logits,) = session.run([LOGITS], {IMAGES: images})
            total += float(cross_entropy(logits, batch.labels(rows)).sum())  # outside of every phase
        yield from step_rows(job, len(batch), number, meter.take_step(), total / len(batch))
