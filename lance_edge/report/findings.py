"""What comes out, in a sentence: each compressing method beside plain backpropagation."""

from collections.abc import Sequence

from lance_edge.report.names import method_name
from lance_edge.report.results import Result, results_of
from lance_edge.report.views import View
from lance_edge.units import count, percent, size

YARDSTICK = "bp"
MOST = 3
HARDLY = 0.02  # of the time: no difference that anybody should see in medians, however small the spread


def findings_of(views: Sequence[View]) -> tuple[str, ...]:
    """Of runs and benchmarks in like settings on one machine: most layers, then most steps first."""
    results = [result for result in results_of(views) if result.step is not None]
    ordered = sorted(results, key=lambda r: (r.view.is_benchmark, -r.setting.layers, -_steps(r)))
    texts: dict[tuple[str, str], str] = {}
    for result in ordered:
        yardstick = yardstick_of(result, results)
        if yardstick is not None:
            texts.setdefault((result.view.name, result.setting.method), _finding(result, yardstick))
    return tuple(texts.values())[:MOST]


def _steps(result: Result) -> int:
    return 0 if result.step is None else result.step.n


def yardstick_of(result: Result, results: Sequence[Result]) -> Result | None:
    """Backpropagation in the like setting: in the same benchmark, or in another run; `None` if in several."""
    if result.setting.method == YARDSTICK:
        return None
    alike = [
        other
        for other in results
        if other.setting.method == YARDSTICK
        and other.setting.alike(result.setting)
        and other.view.machine.key == result.view.machine.key
        and other.view.model == result.view.model
        and other.view.is_benchmark == result.view.is_benchmark
        and (other.view is result.view or not result.view.is_benchmark)
    ]
    return alike[0] if len(alike) == 1 else None


def _finding(result: Result, yardstick: Result) -> str:
    setting = result.setting
    if result.view.is_benchmark:
        where = f"{result.view.name}, {count(setting.layers, 'layer')}"
    else:
        where = f"{result.view.name} beside {yardstick.view.name}"
    clauses = (_bytes, _peak, _speed, _accuracy)
    parts = [clause(result, yardstick) for clause in clauses]
    return f"{where}: {method_name(setting.method)} {', '.join(part for part in parts if part)}."


def _bytes(result: Result, yardstick: Result) -> str:
    own, other = result.costs.activation_bytes, yardstick.costs.activation_bytes
    if not own or not other:
        return ""
    if other >= own:
        return f"keeps {_times(other / own)} times fewer activation bytes than BP"
    return f"keeps {_times(own / other)} times the activation bytes of BP"


def _peak(result: Result, yardstick: Result) -> str:
    """Fewer activation bytes need not mean less memory: of a run the highest of all, as in its tile."""
    own, other = (
        one.costs.peak_rss_kib if one.view.is_benchmark else one.view.peak_rss_kib
        for one in (result, yardstick)
    )
    if not own or not other:
        return ""
    return f"peaks at {size(1024 * own)} of RSS against {size(1024 * other)}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def _speed(result: Result, yardstick: Result) -> str:
    if result.step is None or yardstick.step is None or not result.step.p50_ms:
        return ""
    ratio = yardstick.step.p50_ms / result.step.p50_ms
    spread = max(result.spread or 0.0, yardstick.spread or 0.0, HARDLY)
    if abs(ratio - 1) < spread:
        return f"takes as long (to within the spread, {spread:.0%})"
    return f"is {ratio:.2f} times as fast" if ratio > 1 else f"takes {1 / ratio:.2f} times as long"


def compared_accuracies(result: Result, yardstick: Result) -> tuple[float, float] | None:
    """Of two runs, fractions of 1; `None` where they are not to be compared."""
    own, other = result.view.test_accuracy, yardstick.view.test_accuracy
    if {result.view.status, yardstick.view.status} != {"finished"}:
        return None  # one that has not ended may still learn
    digests = {view.fact("data", "train_sha256") for view in (result.view, yardstick.view)}
    if own is None or other is None or len(digests) != 1:
        return None
    return own, other


def _accuracy(result: Result, yardstick: Result) -> str:
    accuracies = compared_accuracies(result, yardstick)
    if accuracies is None:
        return ""
    own, other = accuracies
    points = 100 * (own - other)
    if abs(points) < 0.05:
        return f"is as accurate ({percent(own)})"
    more = "more" if points > 0 else "less"
    return f"is {abs(points):.1f} points {more} accurate ({percent(own)} against {percent(other)})"
