"""The report: what is shown of some runs, in order."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from lance_edge import __version__
from lance_edge.report.findings import findings_of
from lance_edge.report.heat import heat
from lance_edge.report.learning import learning, tradeoff
from lance_edge.report.memory_use import memory_use
from lance_edge.report.names import benchmarks_of, distinct, runs_of
from lance_edge.report.notices import notices_of
from lance_edge.report.page import Report
from lance_edge.report.plots import Plot, Section
from lance_edge.report.provenance import provenance
from lance_edge.report.results import result_tables
from lance_edge.report.time_use import time_use
from lance_edge.report.views import View
from lance_edge.units import count

SectionOf = Callable[[Sequence[View]], Section]
MEASURED: tuple[SectionOf, ...] = (learning, time_use, memory_use, tradeoff)


def compose(
    views: Sequence[View],
    now: str,
    package: Section | None = None,
    extra_notices: Sequence[str] = (),
    refresh_s: int | None = None,
) -> Report:
    """The whole report.

    Args:
        now: when it was made.
        package: ranks and spectra, where the package is known.
    """
    measured = [section(views) for section in MEASURED]
    packages = [] if package is None else [package]
    return Report(
        title=_title(views),
        lead=_lead(views),
        findings=findings_of(views),
        notices=(*extra_notices, *notices_of(views)),
        views=tuple(views),
        results=result_tables(views),
        sections=with_distinct_names((*measured, *packages, heat(views), provenance(views))),
        made=f"Made by lance-edge {__version__}, {now}. This page needs no network.",
        refresh_s=refresh_s,
    )


def with_distinct_names(sections: Sequence[Section]) -> tuple[Section, ...]:
    """Figures of one name get numbers: those of benchmarks `a b` and `a-b` must not share a file or an id."""
    taken: set[str] = set()

    def distinct_name(plot: Plot) -> Plot:
        name, number = plot.name, 2
        while name in taken:
            name, number = f"{plot.name}-{number}", number + 1
        taken.add(name)
        return replace(plot, name=name)

    return tuple(replace(section, plots=tuple(map(distinct_name, section.plots))) for section in sections)


def _title(views: Sequence[View]) -> str:
    models = distinct([view.model for view in views if view.model])
    return f"On-device training: {', '.join(models)}" if models else "On-device training"


def _lead(views: Sequence[View]) -> str:
    runs, benchmarks = len(runs_of(views)), len(benchmarks_of(views))
    parts = [count(number, noun) for number, noun in ((runs, "run"), (benchmarks, "benchmark")) if number]
    machines = distinct([view.machine.label for view in views])
    return f"{' and '.join(parts)}, measured on {'; '.join(machines)}."
