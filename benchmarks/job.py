"""One measurement: some steps of one contender, in a process of its own."""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.rows import TRAINING, PeerRow
from lance_device.measure import PhaseCost
from lance_edge.profiles import STEP_PHASES


@dataclass(frozen=True)
class Tuning:
    """How PyTorch is set up for its fastest backpropagation.

    Attributes:
        engine: a name of `torch_tuned.ENGINES`.
        channels_last: layout of images and weights, `[N, H, W, C]` in memory.
        micro_batch: samples of one forward and backward; gradients add up over the batch.
    """

    engine: str = "eager"
    channels_last: bool = False
    micro_batch: int = 128

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.engine}{layout}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Job:
    """What a process is to measure.

    Attributes:
        package: of `lance-host calibrate`; everybody takes weights, classes and batch size from it.
        data: folder of images; everybody trains on its first batch.
        model: the whole network for inference, ONNX.
        layers: trained layers.
        round: from 1; in every round each setting is measured once.
        warmups: steps before the measured ones, kept and flagged.
    """

    contender: str
    package: str
    data: str
    model: str
    layers: int
    micro_batch: int
    threads: int
    steps: int
    cached: bool = False
    round: int = 1
    warmups: int = 1
    tuning: Tuning | None = None

    def text(self) -> str:
        """In words, for progress."""
        parts = [self.contender]
        parts += [f"{self.layers} layers"] if self.layers else []
        parts += [f"micro-batch {self.micro_batch}"] if self.micro_batch else []
        return ", ".join([*parts, *(["features kept"] if self.cached else [])])


def job_row(job: Job, batch_size: int, step: int, phase: str, latency_ms: float, **cells: object) -> PeerRow:
    """A row of a job; steps count from 1 and begin with the warm-ups.

    Args:
        cells: `loss`, `saved_bytes`, `peak_rss_kib` where they are known.
    """
    values = {"loss": None, "saved_bytes": None, "peak_rss_kib": None} | cells
    return PeerRow(
        contender=job.contender,
        layers=job.layers,
        micro_batch=job.micro_batch,
        cached=job.cached,
        tuning="" if job.tuning is None else str(job.tuning),
        batch_size=batch_size,
        threads=job.threads,
        round=job.round,
        step=step,
        warmup=step <= job.warmups,
        phase=phase,
        latency_ms=latency_ms,
        **values,  # type: ignore[arg-type]
    )


def step_rows(
    job: Job, batch_size: int, step: int, costs: dict[str, PhaseCost], loss: float | None
) -> Iterable[PeerRow]:
    """A row for each phase of a training step, and `train`, their sum without reading images."""
    latencies = {phase: costs[phase].latency_ms for phase in STEP_PHASES if phase in costs}
    latencies["train"] = sum(latencies.get(phase, 0.0) for phase in TRAINING)
    peaks = [cost.peak_rss_kib for cost in costs.values() if cost.peak_rss_kib is not None]
    for phase, latency_ms in latencies.items():
        yield job_row(
            job, batch_size, step, phase, latency_ms, loss=loss, peak_rss_kib=max(peaks, default=None)
        )
