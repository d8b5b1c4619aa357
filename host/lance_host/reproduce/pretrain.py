"""Pretraining for table 1: a network that has seen one half of the classes only.

Plain PyTorch on the workstation: batch-norm learns its statistics here, which on the device are frozen.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lance_edge.datasets import open_dataset
from lance_edge.files import atomic_writer
from lance_edge.images import load_batch
from lance_host.inputs import InputRequest
from lance_host.network import NetworkRequest, load_network
from lance_host.reproduce.material import WHOLE

BATCH_SIZE = 128
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Pretraining:
    """What is trained from nothing, on what, and for how long."""

    model: str
    data: Path
    epochs: int
    size: int | None
    seed: int


def pretrain(job: Pretraining, output: Path, say: Callable[[str], None]) -> Path:
    """Train from random weights, and write a `.pth`; a job that was broken off goes on after its last epoch.

    Raises:
        LanceError: if the network or the images cannot be used.
    """
    if output.exists():
        return output
    train = open_dataset(job.data, WHOLE).train
    request = NetworkRequest(job.model, "random", "0", input=InputRequest(size=job.size), seed=job.seed)
    classes = int(train.labels.max()) + 1
    network = load_network(request, classes, say, lambda done, size: None)
    module, optimizer = network.module, _optimizer(network.module)
    side = network.preprocessing.sample_shape[-1]
    say(f"pretraining {job.model} on {classes} classes, {len(train)} images of {side} x {side} pixels")
    state, first = output.with_suffix(".state"), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        module.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    size = min(BATCH_SIZE, len(train))
    steps = len(train) // size
    module.train()
    for epoch in range(first, job.epochs):
        order = np.random.default_rng([job.seed, epoch]).permutation(len(train))
        total = 0.0
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            flips = np.random.default_rng([job.seed, epoch, step]).random(size) < 0.5
            images = torch.from_numpy(load_batch(train, rows, network.preprocessing, flips))
            optimizer.param_groups[0]["lr"] = _rate((epoch * steps + step) / (job.epochs * steps))
            loss = cross_entropy(module(images), torch.from_numpy(train.labels[rows]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach())
        say(f"pretraining {output.name}: epoch {epoch + 1} of {job.epochs}, loss {total / steps:.3f}")
        saved = {"network": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        _write(state, saved)
    _write(output, module.state_dict())
    state.unlink(missing_ok=True)
    return output


def _optimizer(module: torch.nn.Module) -> torch.optim.SGD:
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return torch.optim.SGD(module.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` from 0 to 1."""
    if progress < WARM_UP:
        return LR * (0.05 + 0.95 * progress / WARM_UP)
    return LR * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def _write(path: Path, value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with atomic_writer(path) as file:
        file.write(buffer.getvalue())
