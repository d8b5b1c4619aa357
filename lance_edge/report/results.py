"""The figures of every run and setting in a table, with ratios that never leave a machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lance_edge.bench_rows import BASELINE
from lance_edge.profiles import SummaryRow
from lance_edge.report.costs import Costs, Setting
from lance_edge.report.names import features, method_name
from lance_edge.report.plots import Table, Value
from lance_edge.report.views import View
from lance_edge.units import percent, size

NAMES = ("runs", "benchmarks")


@dataclass(frozen=True)
class Result:
    """A setting of a run or benchmark.

    Attributes:
        ratio: of its step's median to LANCE's in the like setting.
        baseline: where that LANCE was measured; `None` without a ratio.
    """

    view: View
    setting: Setting
    costs: Costs
    step: SummaryRow | None
    ratio: float | None
    baseline: View | None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the step over its mean."""
        step = self.step
        return step.std_ms / step.mean_ms if step is not None and step.n > 1 and step.mean_ms else None


def results_of(views: Sequence[View]) -> tuple[Result, ...]:
    """All settings of all views."""
    found = [
        (view, setting, costs, costs.phases().get("step"))
        for view in views
        for setting, costs in view.measured().items()
    ]
    return tuple(
        Result(view, setting, costs, step, *_ratio(step, _baselines(view, setting, found)))
        for view, setting, costs, step in found
    )


def _baselines(
    view: View, setting: Setting, found: Sequence[tuple[View, Setting, Costs, SummaryRow | None]]
) -> list[tuple[View, SummaryRow]]:
    """LANCE in the like setting, same network and machine; in the same measurement if it is there."""
    alike = [
        (other, step)
        for other, theirs, _, step in found
        if step is not None
        and theirs.method == BASELINE
        and theirs.alike(setting)
        and other.machine.key == view.machine.key
        and other.model == view.model
    ]
    return [(other, step) for other, step in alike if other is view] or alike


def _ratio(
    step: SummaryRow | None, baselines: list[tuple[View, SummaryRow]]
) -> tuple[float | None, View | None]:
    """And to what; `None` without a baseline, and where it could be one of several."""
    if step is None or len(baselines) != 1:
        return None, None
    ((view, baseline),) = baselines
    return (step.p50_ms / baseline.p50_ms, view) if baseline.p50_ms else (None, None)


def result_tables(views: Sequence[View]) -> tuple[Table, ...]:
    """Of the runs and of the benchmarks, a row for each setting; columns that say nothing are left out."""
    results = results_of(views)
    parts = ([r for r in results if not r.view.is_benchmark], [r for r in results if r.view.is_benchmark])
    return tuple(_table(name, part) for name, part in zip(NAMES, parts, strict=True) if part)


DATA: dict[str, Callable[[Result], Value]] = {
    "run": lambda result: result.view.name,
    "model": lambda result: result.view.model,
    "method": lambda result: result.setting.method,
    "layers": lambda result: result.setting.layers,
    "batch_size": lambda result: result.setting.batch_size,
    "micro_batch": lambda result: result.setting.micro_batch,
    "threads": lambda result: result.setting.threads,
    "cached": lambda result: int(result.setting.cached),
    "test_accuracy": lambda result: result.view.test_accuracy,
    "steps": lambda result: None if result.step is None else result.step.n,
    "step_p50_ms": lambda result: None if result.step is None else result.step.p50_ms,
    "step_spread": lambda result: result.spread,
    "step_ratio_to_lance": lambda result: result.ratio,
    "peak_rss_kib": lambda result: result.costs.peak_rss_kib,
    "activation_bytes": lambda result: result.costs.activation_bytes,
    "saved_bytes": lambda result: result.costs.saved_bytes,
}


def _table(name: str, results: Sequence[Result]) -> Table:
    columns: list[tuple[str, list[str]]] = [
        ("run", [result.view.name for result in results]),
        ("method", [method_name(result.setting.method) for result in results]),
        ("layers", [str(result.setting.layers) for result in results]),
        ("batch / micro", [f"{r.setting.batch_size} / {r.setting.micro_batch}" for r in results]),
        ("threads", [str(result.setting.threads) for result in results]),
        ("features", [features(result.setting).removeprefix("features ") for result in results]),
        ("test accuracy", [percent(result.view.test_accuracy) for result in results]),
        ("step, median", ["-" if r.step is None else f"{r.step.p50_ms:.1f} ms" for r in results]),
        ("spread", ["-" if r.spread is None else f"{r.spread:.0%}" for r in results]),
        ("to LANCE", ["-" if result.ratio is None else f"{result.ratio:.2f}×" for result in results]),
        ("peak RSS", [size(_bytes(result.costs.peak_rss_kib)) for result in results]),
        ("activation bytes", [size(result.costs.activation_bytes) for result in results]),
        ("saved bytes", [size(result.costs.saved_bytes) for result in results]),
    ]
    said = [(label, cells) for label, cells in columns if set(cells) != {"-"}]
    rows = tuple(zip(*(cells for _, cells in said), strict=True))
    data = {column: [value(result) for result in results] for column, value in DATA.items()}
    return Table(name, tuple(label for label, _ in said), rows, data)


def _bytes(kib: int | None) -> int | None:
    return None if kib is None else kib * 1024
