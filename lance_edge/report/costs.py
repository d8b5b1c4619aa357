"""What one setting costs: latencies per phase, memory."""

from dataclasses import dataclass

from lance_edge.profiles import LatencyCollector, StepRow, SummaryRow


@dataclass(frozen=True)
class Setting:
    """What decides how long a step takes on a machine; `cached`: features were read, not computed."""

    method: str
    layers: int
    batch_size: int
    micro_batch: int
    threads: int
    cached: bool

    def alike(self, other: "Setting") -> bool:
        """Whether the two differ in nothing but the method, so that a ratio of their times says something."""
        return (self.layers, self.batch_size, self.micro_batch, self.threads, self.cached) == (
            other.layers,
            other.batch_size,
            other.micro_batch,
            other.threads,
            other.cached,
        )


def setting_of(row: StepRow) -> Setting:
    """The setting that a row was measured in."""
    return Setting(row.method, row.layers, row.batch_size, row.micro_batch, row.threads, row.cached)


class Costs:
    """Of one setting, over all steps but warm-ups; memory over all of them."""

    def __init__(self) -> None:
        self._latencies = LatencyCollector()
        self.peak_rss_kib: int | None = None
        self.activation_bytes = 0
        self.saved_bytes = 0

    def add(self, row: StepRow) -> None:
        """One phase of a step."""
        self._latencies.add(row)
        self.activation_bytes = max(self.activation_bytes, row.activation_bytes)
        self.saved_bytes = max(self.saved_bytes, row.saved_bytes)
        if row.peak_rss_kib is not None:
            self.peak_rss_kib = max(self.peak_rss_kib or 0, row.peak_rss_kib)

    def phases(self) -> dict[str, SummaryRow]:
        """Latencies by phase; empty as long as there were warm-ups alone."""
        return {row.phase: row for row in self._latencies.rows()}
