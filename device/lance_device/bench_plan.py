"""What a benchmark measures, and in which order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lance_device.bench_job import Job
from lance_device.board import choose_board
from lance_device.options import advised_threads
from lance_edge.bench_rows import Setting
from lance_edge.errors import LanceError
from lance_edge.manifest import Manifest


@dataclass(frozen=True)
class BenchRequest:
    """What somebody asks for; `None` is all that the package has, or what the board advises.

    Attributes:
        batch_size: what the package must have been calibrated for.
        cached: the measured steps read features from a file instead of computing them.
        arguments: the command line as it was, for `run.json`.
    """

    artifact: Path
    out: Path
    data: Path | None = None
    methods: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    micro_batches: tuple[int, ...] | None = None
    batch_size: int | None = None
    steps: int = 3
    trials: int = 3
    warmups: int = 1
    threads: int | None = None
    cached: bool = False
    board: str = "auto"
    arguments: tuple[str, ...] = ()


def plan_jobs(request: BenchRequest, manifest: Manifest, run_id: str) -> tuple[Job, ...]:
    """Trial by trial, every setting once.

    Methods that are compared follow one another at once, and another one begins in every trial: a machine
    that becomes hot or busy in the meantime treats them alike.

    Raises:
        LanceError: if the package does not have what is asked for.
    """
    _check(request, manifest)
    advice = choose_board(request.board).advice
    sizes = request.micro_batches or (min(advice.micro_batch, manifest.batch_size),)
    threads = request.threads or advised_threads(advice)
    return tuple(
        Job(
            run_id=run_id,
            artifact=str(request.artifact),
            data=None if request.data is None else str(request.data),
            method=one.method,
            layers=one.layers,
            micro_batch=one.micro_batch,
            threads=threads,
            trial=trial,
            warmups=request.warmups,
            steps=request.steps,
            cached=one.cached,
        )
        for trial in range(1, request.trials + 1)
        for one in _settings(request, manifest, sizes, first=trial - 1)
    )


def _settings(
    request: BenchRequest, manifest: Manifest, sizes: tuple[int, ...], first: int
) -> Iterator[Setting]:
    methods = request.methods or manifest.methods
    begin = first % len(methods)
    for layers in request.layers or manifest.layer_counts:
        for size in sizes:
            for method in (*methods[begin:], *methods[:begin]):
                if _is_wanted(request, manifest, method, layers):
                    yield Setting(method, layers, size, request.cached)


def _is_wanted(request: BenchRequest, manifest: Manifest, method: str, layers: int) -> bool:
    """Whether the package has this; what was asked for in so many words it must have."""
    if request.methods is not None and request.layers is not None:
        manifest.variant(method, layers)
    return any((v.method, len(v.layers)) == (method, layers) for v in manifest.variants)


def _check(request: BenchRequest, manifest: Manifest) -> None:
    for method in request.methods or ():
        manifest.variant(method)
    for layers in request.layers or ():
        manifest.with_layers(layers)
    if request.batch_size not in (None, manifest.batch_size):
        raise LanceError(
            f"--batch-size {request.batch_size}: {request.artifact} was calibrated for batches of"
            f" {manifest.batch_size}, and its ranks and bytes are those of such batches;"
            f" calibrate again with --batch-size {request.batch_size}, or leave the option out"
        )
    if request.cached and request.warmups == 0:
        raise LanceError("--cache on: the first step fills the cache; expected --warmups 1 or more, found 0")
    too_large = [size for size in request.micro_batches or () if size > manifest.batch_size]
    if too_large:
        raise LanceError(
            f"--micro-batch {too_large[0]}: expected at most the batch size, {manifest.batch_size}"
        )
