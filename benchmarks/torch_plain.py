"""PyTorch as people use it: eager, the whole batch at once, backpropagation or LANCE."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.batches import LEARNING_RATE, new_meter, package_of, same_batch
from benchmarks.job import Job, step_rows
from benchmarks.rows import PeerRow
from benchmarks.torch_lance import Projections, use_lance
from benchmarks.torch_network import load_network
from lance_device.bench_job import OPTIMISER
from lance_device.graphs import load_projections
from lance_edge.bundle import Bundle
from lance_edge.names import projection_name

METHODS = {"torch-bp": "bp", "torch-lance": "lance"}  # whose variant says what trains


def run(job: Job, folder: Path) -> Iterator[PeerRow]:
    """Steps of the whole batch; `forward` includes the frozen part."""
    torch.set_num_threads(job.threads)
    manifest, weights = package_of(job)
    variant = manifest.variant(METHODS[job.contender], job.layers)
    network = load_network(manifest, weights, variant.parameters)
    if variant.method == "lance":
        use_lance(network, lance_projections(job))
    batch, meter = same_batch(job, manifest), new_meter()
    chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(chosen, LEARNING_RATE, OPTIMISER.momentum)
    for number in range(1, job.warmups + job.steps + 1):
        with meter.phase("data"):
            images, labels = tensors(batch.images(slice(None)), batch.labels(slice(None)))
        with meter.phase("forward"):
            loss = nn.functional.cross_entropy(network(images), labels)
        with meter.phase("backward"):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        with meter.phase("update"):
            nn.utils.clip_grad_norm_(chosen, OPTIMISER.clip)
            optimizer.step()
        yield from step_rows(job, len(batch), number, meter.take_step(), float(loss.detach()))


def tensors(images: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Views, no copies."""
    return torch.from_numpy(images), torch.from_numpy(labels)


def lance_projections(job: Job) -> dict[str, Projections]:
    """The package's projections of each trainable layer, at its ranks."""
    with Bundle(Path(job.package)) as bundle:
        variant = bundle.manifest.variant("lance", job.layers)
        stored = {name: torch.from_numpy(value) for name, value in load_projections(bundle, variant).items()}
    return {
        plan.layer: tuple(stored.get(projection_name(plan.layer, mode)) for mode in range(4))
        for plan in variant.layers
    }
