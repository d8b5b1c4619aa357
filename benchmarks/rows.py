"""What is measured, as rows: a phase of a step, and their summary."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lance_edge.profiles import STEP_PHASES

TRAINING = ("prefix", "forward", "backward", "update")  # "train", their sum, leaves out reading images
PHASES = (*STEP_PHASES, "train", "weights", "start", "ready")


@dataclass(frozen=True)
class Setting:
    """One line of the comparison; `micro_batch` and `layers` are 0 where they mean nothing.

    Attributes:
        contender: a name of `contenders.CONTENDERS`.
        layers: trained layers, the head always trains.
        cached: the frozen part's outputs are kept, and only the rest runs.
    """

    contender: str
    layers: int
    micro_batch: int
    cached: bool


@dataclass(frozen=True)
class PeerRow:
    """One phase of one step.

    Attributes:
        tuning: how PyTorch was set up, in words; empty for others.
        phase: of `PHASES`: those of a training step; `weights`, the weight gradients of a whole batch
            alone; `start`, of a command that answers at once; `ready`, from its start to the first step.
        peak_rss_kib: the highest of the whole process, loading included; the same in all its rows.
        loss: mean cross-entropy over the batch, before the update; `None` where none is computed.
        saved_bytes: of our methods, all that was alive between forward and backward.
    """

    contender: str
    layers: int
    micro_batch: int
    cached: bool
    tuning: str
    batch_size: int
    threads: int
    round: int
    step: int
    warmup: bool
    phase: str
    latency_ms: float
    peak_rss_kib: int | None
    loss: float | None
    saved_bytes: int | None

    @property
    def setting(self) -> Setting:
        """The line of the comparison that it belongs to."""
        return Setting(self.contender, self.layers, self.micro_batch, self.cached)


@dataclass(frozen=True)
class PeerSummary:
    """One phase of one setting over all rounds, warm-ups left out.

    Attributes:
        spread: standard deviation over mean.
        peak_rss_kib: the highest of its processes.
    """

    contender: str
    layers: int
    micro_batch: int
    cached: bool
    tuning: str
    phase: str
    n: int
    p50_ms: float
    min_ms: float
    max_ms: float
    spread: float
    peak_rss_kib: int | None
    saved_bytes: int | None


def summarise(rows: Iterable[PeerRow]) -> tuple[PeerSummary, ...]:
    """Settings in the order in which they were first measured, their phases in the order of `PHASES`."""
    groups: dict[Setting, dict[str, list[PeerRow]]] = {}
    for row in rows:
        if not row.warmup:
            groups.setdefault(row.setting, {}).setdefault(row.phase, []).append(row)
    return tuple(_summary(phases[phase]) for phases in groups.values() for phase in PHASES if phase in phases)


def _summary(rows: Sequence[PeerRow]) -> PeerSummary:
    first = rows[0]
    latencies = np.array([row.latency_ms for row in rows])  # [n]
    deviation = float(latencies.std(ddof=1)) if len(rows) > 1 else 0.0
    mean = float(latencies.mean())
    return PeerSummary(
        contender=first.contender,
        layers=first.layers,
        micro_batch=first.micro_batch,
        cached=first.cached,
        tuning=first.tuning,
        phase=first.phase,
        n=len(rows),
        p50_ms=float(np.median(latencies)),
        min_ms=float(latencies.min()),
        max_ms=float(latencies.max()),
        spread=deviation / mean if mean else 0.0,
        peak_rss_kib=_highest(row.peak_rss_kib for row in rows),
        saved_bytes=_highest(row.saved_bytes for row in rows),
    )


def _highest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
