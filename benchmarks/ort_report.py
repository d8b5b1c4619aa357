"""The table of `benchmarks.ort_training`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.report import LOSS_TOLERANCE, markdown
from lance_edge.bench_rows import LARGE_SPREAD
from lance_edge.units import size


@dataclass(frozen=True)
class StepRow:
    """One step; reading the images is left out.

    Attributes:
        peak_rss_kib: the highest of the whole process, loading included.
        imports_rss_kib: the highest of a process that does nothing but import the same modules.
    """

    contender: str
    round: int
    step: int
    warmup: bool
    latency_ms: float
    loss: float
    peak_rss_kib: int | None
    imports_rss_kib: int | None


def report(rows: Sequence[StepRow], heading: str) -> str:
    """The table, after what makes it doubtful."""
    groups: dict[str, list[StepRow]] = {}
    for row in rows:
        groups.setdefault(row.contender, []).append(row)
    header = ["", "step, ms (median)", "fastest", "spread", "peak RSS", "of it imports"]
    cells = [_cells(name, [row for row in group if not row.warmup]) for name, group in groups.items()]
    warnings = [f"> {text}" for text in (*_about_losses(groups), *_about_spread(groups))]
    return "\n\n".join([heading, *warnings, markdown(header, cells)]) + "\n"


def _cells(name: str, rows: Sequence[StepRow]) -> list[str]:
    latencies = [row.latency_ms for row in rows]
    peak = max((row.peak_rss_kib for row in rows if row.peak_rss_kib is not None), default=None)
    return [
        name,
        f"{np.median(latencies):.0f}",
        f"{min(latencies):.0f}",
        f"{_spread(rows):.0%}",
        *(size(None if kib is None else kib * 1024) for kib in (peak, rows[0].imports_rss_kib)),
    ]


def _spread(rows: Sequence[StepRow]) -> float:
    """Standard deviation over mean."""
    latencies = np.array([row.latency_ms for row in rows if not row.warmup])
    return float(latencies.std(ddof=1) / latencies.mean()) if len(latencies) > 1 else 0.0


def _about_losses(groups: dict[str, list[StepRow]]) -> list[str]:
    """All begin with the same weights and images: whoever has another loss does not compute the same."""
    first = {name: rows[0].loss for name, rows in groups.items()}
    middle = sorted(first.values())[len(first) // 2]
    return [
        f"{name}: the loss of the first step is {loss:.5f}, that of the others {middle:.5f}:"
        " its times mean nothing"
        for name, loss in first.items()
        if abs(loss - middle) > LOSS_TOLERANCE * abs(middle)
    ]


def _about_spread(groups: dict[str, list[StepRow]]) -> list[str]:
    wide = [name for name, rows in groups.items() if _spread(rows) > LARGE_SPREAD]
    return [f"times vary by more than {LARGE_SPREAD:.0%}: {', '.join(wide)}"] if wide else []
