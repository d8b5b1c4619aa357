"""A benchmark as text: the table, and what makes its figures doubtful."""

import os
from collections.abc import Callable, Sequence
from itertools import groupby

from lance_edge.bench_rows import LARGE_SPREAD, BenchRow, BenchSummaryRow
from lance_edge.boards import Board
from lance_edge.profiles import STEP_PHASES
from lance_edge.units import count, size

BUSY_LOAD = 0.5  # of one core, by others, before anything is measured
KILLED = "the kernel ended the process, for want of memory most likely"
NOW_BITS = (
    0xF  # of `vcgencmd get_throttled`: under-voltage, capped, throttled, soft limit; higher bits: earlier
)
MOST_NAMED = 3

Cell = Callable[[dict[str, BenchSummaryRow]], str]


def bench_table(summary: Sequence[BenchSummaryRow]) -> str:
    """A line for each setting: bytes, peak RSS, median of every phase, ratio of the step to LANCE's.

    Columns that would say the same in every line are left out; settings that are compared stand together.
    """
    settings: dict[tuple[int, int, str, bool], dict[str, BenchSummaryRow]] = {}
    for row in summary:
        settings.setdefault((row.layers, row.micro_batch, row.method, row.cached), {})[row.phase] = row
    ordered = sorted(settings.items(), key=lambda item: item[0][:2])
    columns: list[tuple[str, Cell]] = [
        ("layers", lambda phases: str(phases["step"].layers)),
        ("micro-batch", lambda phases: str(phases["step"].micro_batch)),
        ("method", lambda phases: phases["step"].method),
        ("activation bytes", lambda phases: size(phases["step"].activation_bytes)),
        ("saved bytes", lambda phases: size(phases["step"].saved_bytes)),
        ("peak RSS", lambda phases: size(_bytes(phases["step"].peak_rss_kib))),
        *((phase, _median(phase)) for phase in (*STEP_PHASES, "step")),
        ("spread", lambda phases: f"{phases['step'].spread:.0%}" if phases["step"].n > 1 else "-"),
        ("to LANCE", lambda phases: _ratio(phases["step"].ratio_to_lance)),
    ]
    texts = [[label, *(cell(phases) for _, phases in ordered)] for label, cell in columns]
    for index in (1, 0):  # of layers and micro-batch, what is always the same
        if len(set(texts[index][1:])) == 1:
            del texts[index]
    explained = "Phases: medians in ms. Spread: of the step, standard deviation over mean."
    if any(row.cached for row in summary):
        explained += " Features from disk: no image is decoded, and the frozen part does not run."
    return "\n".join([*_lines(texts, [key[:2] for key, _ in ordered]), "", explained])


def _lines(texts: Sequence[Sequence[str]], groups: Sequence[tuple[int, int]]) -> list[str]:
    widths = [max(map(len, column)) for column in texts]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in zip(*texts, strict=True)
    ]
    found, body = [lines[0], "-" * len(lines[0])], iter(lines[1:])
    for index, (_, members) in enumerate(groupby(groups)):
        block = [next(body) for _ in members]
        found += ([""] if index and len(block) > 1 else []) + block
    return found


def _median(phase: str) -> Cell:
    return lambda phases: f"{phases[phase].p50_ms:.1f}" if phase in phases else "-"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _bytes(kib: int | None) -> int | None:
    return None if kib is None else kib * 1024


def about_load() -> str | None:
    """Why times will be wrong, if other programs are at work before anything is measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= BUSY_LOAD:
        return None
    return f"other programs keep {load:.1f} cores busy; times will be too long and vary"


def warnings_of(rows: Sequence[BenchRow], summary: Sequence[BenchSummaryRow], board: Board) -> tuple[str, ...]:
    """Why the figures may be wrong, or of little use on this board."""
    found = [_about_spread(summary), _about_throttling(rows), _about_memory(summary, board)]
    return tuple(text for text in found if text is not None)


def _about_spread(summary: Sequence[BenchSummaryRow]) -> str | None:
    steps = [row for row in summary if row.phase == "step" and row.spread > LARGE_SPREAD]
    if not steps:
        return None
    worst = sorted(steps, key=lambda row: -row.spread)
    return (
        f"times vary by more than {LARGE_SPREAD:.0%} (standard deviation) in {_named(worst)}: other programs"
        " run, or the clock changes; measure on a quiet machine, or with more --trials"
    )


def _about_throttling(rows: Sequence[BenchRow]) -> str | None:
    throttled = [row for row in rows if row.throttled is not None and _is_throttled(row.throttled)]
    if not throttled:
        return None
    flags = ", ".join(sorted({str(row.throttled) for row in throttled}))
    share = len(throttled) / len(rows)
    return (
        f"the board was throttled in {share:.0%} of the measurements (vcgencmd get_throttled: {flags}):"
        " cool it, or use a stronger power supply, and measure again"
    )


def _is_throttled(flags: str) -> bool:
    try:
        return bool(int(flags, 16) & NOW_BITS)
    except ValueError:
        return False


def _about_memory(summary: Sequence[BenchSummaryRow], board: Board) -> str | None:
    limit_mib = board.advice.memory_limit_mib
    too_large = [
        row
        for row in summary
        if row.phase == "step" and limit_mib is not None and (row.peak_rss_kib or 0) > limit_mib * 1024
    ]
    if not too_large:
        return None
    worst = sorted(too_large, key=lambda row: -(row.peak_rss_kib or 0))
    return f"more than the {limit_mib} MiB that training should take on {board.label}: {_named(worst)}"


def _named(rows: Sequence[BenchSummaryRow]) -> str:
    """`bp with 4 layers and micro-batch 8, ... and 2 more`."""
    names = [
        f"{row.method} with {count(row.layers, 'layer')} and micro-batch {row.micro_batch}" for row in rows
    ]
    more = len(names) - MOST_NAMED
    return "; ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
