"""The fastest backpropagation that we can get from PyTorch on a CPU.

Frozen part without gradients and with batch-norm folded, trainable part with its batch-norm folded into a
product, micro-batches whose gradients add up, fused SGD; layout and engine are for `tuning.py` to choose.  With
`job.cached`, the frozen part's outputs stay in memory after the first step.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.batches import LEARNING_RATE, new_meter, package_of, same_batch
from benchmarks.job import Job, Tuning, step_rows
from benchmarks.rows import PeerRow
from benchmarks.torch_network import fuse_batch_norm, load_network, split
from benchmarks.torch_plain import tensors
from lance_device.bench_job import OPTIMISER
from lance_device.features import Batch
from lance_device.measure import PhaseMeter
from lance_device.step_graphs import micro_batches

Module = Callable[..., Any]


def _eager(prefix: nn.Module, tail: nn.Module, images: torch.Tensor) -> tuple[Module, Module]:
    return prefix, tail


def _jit(prefix: nn.Module, tail: nn.Module, images: torch.Tensor) -> tuple[Module, Module]:
    """TorchScript's inference optimisations (blocked oneDNN layouts) for the frozen part."""
    with torch.no_grad():
        traced = torch.jit.trace(prefix, images)  # type: ignore[no-untyped-call]
        return torch.jit.optimize_for_inference(traced), tail


def _compile(prefix: nn.Module, tail: nn.Module, images: torch.Tensor) -> tuple[Module, Module]:
    """Inductor for both; frozen weights are constants of the compiled code."""
    import torch._inductor.config

    torch._inductor.config.freezing = True  # applies where no gradient is wanted: to the frozen part
    return torch.compile(prefix, dynamic=False), torch.compile(tail, dynamic=False)


Engine = Callable[[nn.Module, nn.Module, torch.Tensor], tuple[Module, Module]]
ENGINES: dict[str, Engine] = {"eager": _eager, "jit": _jit, "compile": _compile}


class TunedStep:
    """Loss and gradients of a batch, in micro-batches."""

    def __init__(self, network: nn.Module, tuning: Tuning, example: torch.Tensor, keep: bool) -> None:
        """Fuse, split and compile; `example` is a micro-batch of images, `keep` the frozen part's outputs."""
        self._layout = torch.channels_last if tuning.channels_last else torch.contiguous_format
        self._size = tuning.micro_batch
        self._keep = keep
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}
        fuse_batch_norm(network)
        network.to(memory_format=self._layout)  # type: ignore[call-overload]
        prefix, tail = split(network)
        self._prefix, self._tail = ENGINES[tuning.engine](prefix, tail, self._laid_out(example))

    def run(self, batch: Batch, meter: PhaseMeter) -> float:
        """Gradients add up in the parameters; the mean loss is returned."""
        total = 0.0
        for rows in micro_batches(len(batch), self._size):
            boundary = self._features(batch, rows, meter)
            labels = torch.from_numpy(batch.labels(rows))
            with meter.phase("forward"):
                loss = nn.functional.cross_entropy(self._tail(*boundary), labels, reduction="sum") / len(batch)
            with meter.phase("backward"):
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _features(self, batch: Batch, rows: slice, meter: PhaseMeter) -> tuple[torch.Tensor, ...]:
        if rows.start in self._kept:
            return self._kept[rows.start]
        with meter.phase("data"):
            images, _ = tensors(batch.images(rows), batch.labels(rows))
        with meter.phase("prefix"), torch.no_grad():
            boundary: tuple[torch.Tensor, ...] = tuple(self._prefix(self._laid_out(images)))
        if self._keep:
            self._kept[rows.start] = tuple(tensor.clone() for tensor in boundary)
        return boundary

    def _laid_out(self, images: torch.Tensor) -> torch.Tensor:
        return images.contiguous(memory_format=self._layout)


def run(job: Job, folder: Path) -> Iterator[PeerRow]:
    """Steps with `job.tuning`."""
    assert job.tuning is not None
    torch.set_num_threads(job.threads)
    manifest, weights = package_of(job)
    network = load_network(manifest, weights, manifest.variant("bp", job.layers).parameters)
    batch, meter = same_batch(job, manifest), new_meter()
    chosen = [parameter for parameter in network.parameters() if parameter.requires_grad]
    example = torch.from_numpy(batch.images(slice(0, min(job.tuning.micro_batch, len(batch)))))
    step = TunedStep(network, job.tuning, example, keep=job.cached)
    optimizer = torch.optim.SGD(chosen, LEARNING_RATE, OPTIMISER.momentum, fused=True)
    for number in range(1, job.warmups + job.steps + 1):
        optimizer.zero_grad()
        loss = step.run(batch, meter)
        with meter.phase("update"):
            nn.utils.clip_grad_norm_(chosen, OPTIMISER.clip)
            optimizer.step()
        yield from step_rows(job, len(batch), number, meter.take_step(), loss)
