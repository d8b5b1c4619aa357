"""The rows of a benchmark: its `steps.csv` and `summary.csv`, typed as in `profiles.py`."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lance_edge.profiles import PHASES, LatencyCollector, StepRow, SummaryRow

BASELINE = "lance"  # what ratios are taken to
LARGE_SPREAD = 0.10  # pyperf's measure of an unstable benchmark: standard deviation over mean


@dataclass(frozen=True)
class Setting:
    """One cell of the comparison.

    Attributes:
        cached: measured steps read the frozen part's features from disk.
    """

    method: str
    layers: int
    micro_batch: int
    cached: bool


@dataclass(frozen=True)
class BenchRow(StepRow):
    """One phase of one step of a benchmark.

    A process of its own ran the steps of a trial; `step` counts within it and `epoch` is always 1.

    Attributes:
        trial: from 1; in every trial each setting is measured once.
    """

    trial: int

    @property
    def setting(self) -> Setting:
        """What was measured."""
        return Setting(self.method, self.layers, self.micro_batch, self.cached)


@dataclass(frozen=True)
class BenchSummaryRow:
    """One phase of one setting, over all trials but their warm-ups.

    Attributes:
        method, layers, micro_batch, cached: the setting, as in `steps.csv`.
        phase: as in `steps.csv`.
        n: rows that were counted.
        mean_ms, std_ms: mean and standard deviation, in milliseconds.
        min_ms, max_ms: the shortest and the longest, in milliseconds.
        p50_ms, p90_ms, p99_ms: percentiles, in milliseconds; the 50th is the median.
        spread: standard deviation of the phase's latencies over their mean.
        ratio_to_lance: of the medians; `None` where LANCE was not measured in this setting.
        peak_rss_kib: peak of resident memory in KiB, the highest of the phase.
        activation_bytes, saved_bytes: as in `steps.csv`, the highest of the phase, in bytes.
    """

    method: str
    layers: int
    micro_batch: int
    cached: bool
    phase: str
    n: int
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    spread: float
    ratio_to_lance: float | None
    peak_rss_kib: int | None
    activation_bytes: int
    saved_bytes: int


def summarise_bench(rows: Iterable[BenchRow]) -> tuple[BenchSummaryRow, ...]:
    """The content of a benchmark's `summary.csv`, settings in the order in which they were first measured.

    A setting of which there are warm-ups alone is left out.
    """
    collectors: dict[Setting, LatencyCollector] = {}
    members: dict[Setting, list[BenchRow]] = {}
    for row in rows:
        collectors.setdefault(row.setting, LatencyCollector()).add(row)
        members.setdefault(row.setting, []).append(row)
    latencies = {one: {row.phase: row for row in collector.rows()} for one, collector in collectors.items()}
    return tuple(
        _summary(one, phase, latencies, members[one])
        for one, by_phase in latencies.items()
        for phase in PHASES
        if phase in by_phase
    )


def _summary(
    one: Setting, phase: str, latencies: dict[Setting, dict[str, SummaryRow]], rows: list[BenchRow]
) -> BenchSummaryRow:
    own, baseline = latencies[one][phase], latencies.get(replace(one, method=BASELINE), {}).get(phase)
    measured = [row for row in rows if row.phase == phase and not row.warmup]
    peaks = [row.peak_rss_kib for row in measured if row.peak_rss_kib is not None]
    return BenchSummaryRow(
        method=one.method,
        layers=one.layers,
        micro_batch=one.micro_batch,
        cached=one.cached,
        phase=phase,
        n=own.n,
        mean_ms=own.mean_ms,
        std_ms=own.std_ms,
        min_ms=own.min_ms,
        p50_ms=own.p50_ms,
        p90_ms=own.p90_ms,
        p99_ms=own.p99_ms,
        max_ms=own.max_ms,
        spread=own.std_ms / own.mean_ms if own.mean_ms else 0.0,
        ratio_to_lance=own.p50_ms / baseline.p50_ms if baseline is not None and baseline.p50_ms else None,
        peak_rss_kib=max(peaks, default=None),
        activation_bytes=max(row.activation_bytes for row in measured),
        saved_bytes=max(row.saved_bytes for row in measured),
    )
