"""The comparison as Markdown: tables for the README, and what makes their figures doubtful."""

from collections.abc import Collection, Mapping, Sequence
from math import isnan, nan
from typing import Any

from benchmarks.contenders import CONTENDERS
from benchmarks.rows import PeerRow, PeerSummary, Setting
from benchmarks.targets import TARGETS, Figures, Target, number_text
from benchmarks.tuning import Trial
from lance_edge.bench_rows import LARGE_SPREAD
from lance_edge.units import size

# The same network, weights and images: rounding tells losses apart, in kept features that of float16.
LOSS_TOLERANCE = 2e-3
BASELINE = "lance"
COLUMNS = ("data", "prefix", "forward", "backward", "update", "train")

Lines = dict[Setting, dict[str, PeerSummary]]


def report(
    summaries: Sequence[PeerSummary],
    trials: Sequence[Trial],
    warnings: Sequence[str],
    heading: str,
    targets: Sequence[Target] = TARGETS,
    budgeted: Collection[int] = (),
) -> str:
    """The whole document; `heading` says what was measured where.

    Args:
        budgeted: numbers of layers whose LANCE ranks were chosen for a memory budget.
    """
    lines: Lines = {}
    for row in summaries:
        setting = Setting(row.contender, row.layers, row.micro_batch, row.cached)
        lines.setdefault(setting, {})[row.phase] = row
    parts = [heading, *(f"> {warning}" for warning in warnings), *_step_tables(lines), _weights_table(lines)]
    parts += [
        _commands_table(lines),
        _targets_table(Figures(summaries, frozenset(budgeted)), targets),
        _trials_table(trials),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading_of(machine: Mapping[str, Any], versions: Mapping[str, str], facts: str) -> str:
    """`Measured on AMD EPYC, 2 cores, Linux 6.1 x86_64, with onnxruntime 1.31.1, torch 2.13.0. ...`"""
    name = machine.get("board") or machine.get("cpu") or "an unnamed processor"
    system = f"{machine.get('system')} {machine.get('kernel')} {machine.get('architecture')}"
    software = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"Measured on {name}, {machine.get('cores')} cores, {system}, with {software}. {facts}"


def _step_tables(lines: Lines) -> list[str]:
    """A table for each number of layers: features computed in every step, then features kept."""
    tables = []
    for layers in sorted({setting.layers for setting in lines if setting.contender == BASELINE}):
        for cached in (False, True):
            rows = {
                setting: phases
                for setting, phases in lines.items()
                if "train" in phases and setting.cached == cached and setting.contender != "train"
                and (setting.layers == layers or (setting.contender == "onnxruntime" and not cached))
            }  # fmt: skip
            if rows:
                tables.append(_step_table(rows, layers, cached))
    return tables


def _step_table(lines: Lines, layers: int, cached: bool) -> str:
    base = next((p["train"].p50_ms for s, p in lines.items() if s.contender == BASELINE), None)
    kept = "features of the frozen part kept" if cached else "whole network in every step"
    header = ["ms a step (median)", "micro-batch", *COLUMNS[:-1], "**step**", "to LANCE", "peak RSS", "spread"]
    cells = [
        [
            CONTENDERS[setting.contender].label,
            str(setting.micro_batch),
            *(_ms(phases, phase) for phase in COLUMNS),
            "-" if not base else f"{phases['train'].p50_ms / base:.2f}x",
            _rss(phases["train"]),
            f"{phases['train'].spread:.0%}" if phases["train"].n > 1 else "-",
        ]
        for setting, phases in sorted(lines.items(), key=lambda item: item[1]["train"].p50_ms)
    ]
    return f"### {layers} layers, {kept}\n\n{markdown(header, cells)}\n\n{_notes(cached)}"


def _notes(cached: bool) -> str:
    if cached:
        return "Step: everything; ours read the features from disk (`data`), PyTorch's hold them in memory."
    return "Step: without `data`, reading and decoding the images.  A `forward` without `prefix` includes it."


def _weights_table(lines: Lines) -> str:
    found = {s: p["weights"] for s, p in lines.items() if "weights" in p}
    cells = []
    for setting, row in found.items():
        if setting.contender != "weights-lance":
            continue
        other = found.get(Setting("weights-bp", setting.layers, setting.micro_batch, False))
        ratio = "-" if other is None else f"{other.p50_ms / row.p50_ms:.2f}x"
        own = [str(setting.layers), str(setting.micro_batch), f"{row.p50_ms:.2f}"]
        cells.append([*own, "-" if other is None else f"{other.p50_ms:.2f}", ratio])
    if not cells:
        return ""
    header = ["layers", "micro-batch", "LANCE, ms a batch", "BP, ms a batch", "BP / LANCE"]
    return f"### Weight gradients alone\n\n{markdown(header, sorted(cells, key=_numbers))}"


def _numbers(cells: Sequence[str]) -> tuple[int, int]:
    return int(cells[0]), int(cells[1])


def _commands_table(lines: Lines) -> str:
    cells = [
        [CONTENDERS[setting.contender].label, f"{row.p50_ms / 1000:.2f} s", _rss(row)]
        for setting, phases in lines.items()
        if setting.contender in ("help", "ready", "train")
        for row in (phases.get("start") or phases.get("ready") or phases["train"],)
    ]
    if not cells:
        return ""
    note = "For `lance-device train` the time is that of a step, reading JPEG included."
    return f"### Commands\n\n{markdown(['command', 'time', 'peak RSS'], cells)}\n\n{note}"


def _targets_table(figures: Figures, targets: Sequence[Target]) -> str:
    cells = []
    for target in targets:
        value = target.measured(figures)
        measured = target.missing if value is None else number_text(value, target.unit)
        cells.append([target.figure, target.bound_text, measured, _verdict(target, value)])
    return f"### Targets\n\n{markdown(['figure', 'target', 'measured', ''], cells)}"


def _verdict(target: Target, value: float | None) -> str:
    if value is None or target.bound is None:
        return ""
    return "met" if target.is_met(value) else "**missed**"


def _trials_table(trials: Sequence[Trial]) -> str:
    cells = [
        [
            str(trial.tuning),
            "kept" if trial.cached else "computed",
            trial.failure if trial.train_ms is None else f"{trial.train_ms:.0f}",
        ]
        for trial in trials
    ]
    if not cells:
        return ""
    return f"### Settings of PyTorch that were tried\n\n{markdown(['setting', 'features', 'ms a step'], cells)}"


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([*header], rule, *cells))


def _ms(phases: Mapping[str, PeerSummary], phase: str) -> str:
    return f"{phases[phase].p50_ms:.1f}" if phase in phases else "-"


def _rss(row: PeerSummary) -> str:
    return "-" if row.peak_rss_kib is None else size(row.peak_rss_kib * 1024)


def warnings_of(rows: Sequence[PeerRow], summaries: Sequence[PeerSummary]) -> tuple[str, ...]:
    """Why the figures may be wrong."""
    found = [_about_spread(summaries), *_about_losses(rows)]
    return tuple(text for text in found if text)


def _about_spread(summaries: Sequence[PeerSummary]) -> str:
    wide = [row for row in summaries if row.phase in ("train", "weights") and row.spread > LARGE_SPREAD]
    if not wide:
        return ""
    worst = max(wide, key=lambda row: row.spread)
    return (
        f"times of {len(wide)} settings vary by more than {LARGE_SPREAD:.0%} (standard deviation), most"
        f" those of {CONTENDERS[worst.contender].label}, {worst.spread:.0%}: other programs run, or the clock"
        " changes; measure on a quiet machine, or with more --rounds"
    )


def _about_losses(rows: Sequence[PeerRow]) -> list[str]:
    """Whoever has another loss does not compute the same.

    At the first step all must agree, whose forward is the same; at the last step that all of a method have
    taken, those of this method: the loss then shows gradients and updates.
    """
    known = [row for row in rows if row.loss is not None and row.contender != "train"]  # which shuffles images
    found = _other_losses([row for row in known if row.step == 1], "the first step")
    groups: dict[tuple[str, int], list[PeerRow]] = {}
    for row in known:
        if row.layers:
            groups.setdefault((CONTENDERS[row.contender].method, row.layers), []).append(row)
    for (method, layers), group in groups.items():
        last = _last_common_step(group)
        after = [row for row in group if row.step == last]
        if last > 1:
            found += _other_losses(after, f"step {last}")
        if last > 1 and not _moves([row for row in group if row.step == 1], after):
            found.append(
                f"{method}, {layers} layers: the loss of step {last} is still that of the first:"
                " it does not show whether gradients are right"
            )
    return found


def _last_common_step(rows: Sequence[PeerRow]) -> int:
    last: dict[Setting, int] = {}
    for row in rows:
        last[row.setting] = max(row.step, last.get(row.setting, 0))
    return min(last.values())


def _other_losses(rows: Sequence[PeerRow], step: str) -> list[str]:
    """A line for each contender that has, in any round, another loss than the middle one of `rows`."""
    middle = _middle(rows)
    others: dict[tuple[str, int], float] = {}
    for row in rows:
        if row.loss is not None and not _agree(row.loss, middle):
            others.setdefault((row.contender, row.layers), row.loss)
    return [
        f"{CONTENDERS[contender].label}, {layers} layers: the loss of {step} is {loss:.5f}, that of the"
        f" others {middle:.5f}: it does not compute the same, its times mean nothing"
        for (contender, layers), loss in others.items()
    ]


def _moves(before: Sequence[PeerRow], after: Sequence[PeerRow]) -> bool:
    return not _agree(_middle(after), _middle(before))


def _middle(rows: Sequence[PeerRow]) -> float:
    """The median over settings and rounds, however many phases each of them has."""
    losses = {(row.setting, row.round): row.loss for row in rows if row.loss is not None}
    ordered = sorted(losses.values(), key=lambda loss: (isnan(loss), loss))
    return ordered[len(ordered) // 2] if ordered else nan


def _agree(loss: float, other: float) -> bool:
    return abs(loss - other) <= LOSS_TOLERANCE * max(abs(other), 1e-9)  # never true of what is no number
