"""The report as one page of HTML that needs no network: style, figures and tables stand in it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lance_edge.report.colours import INK, hatched_key, method_colour
from lance_edge.report.names import method_name
from lance_edge.report.plots import Line, LinePlot, Plot, Section, Table
from lance_edge.report.views import View
from lance_edge.units import count, duration, percent, size

STYLE = Path(__file__).with_name("style.css")
MOST_OPEN_ROWS = 12  # of a table; a longer one is folded
MOST_TILES = 8
RESULTS = (
    "A row for each setting. Spread is the standard deviation of the step over its mean; peak RSS is that of"
    " the steps (above: of the whole run, evaluations too); saved bytes are all that is alive between forward"
    " and backward of a micro-batch."
)
DASHES = {"solid": "", "dashed": ' stroke-dasharray="6 3"', "dotted": ' stroke-dasharray="2 3"'}
KEY_BOX = '<rect width="22" height="12" rx="2" fill="{fill}"/>'
HATCH = f'<path d="M1 11L11 1M7 11L17 1M13 11L21 3" stroke="{INK}"/>'

Draw = Callable[[Plot], str]


@dataclass(frozen=True)
class Report:
    """What stands on the page.

    Attributes:
        made: a line at the end: when, and by what.
        refresh_s: the page asks for itself again after so many seconds.
    """

    title: str
    lead: str
    findings: tuple[str, ...]
    notices: tuple[str, ...]
    views: tuple[View, ...]
    results: tuple[Table, ...]
    sections: tuple[Section, ...]
    made: str
    refresh_s: int | None = None


def render(report: Report, draw: Draw) -> str:
    """The page; `draw` gives a figure as an `<svg>` element."""
    refresh = "" if report.refresh_s is None else f'<meta http-equiv="refresh" content="{report.refresh_s}">\n'
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(report.lead)}</p>',
        *(f'<p class="finding">{escape(text)}</p>' for text in report.findings),
        *(f'<p class="notice" role="note">{escape(text)}</p>' for text in report.notices),
        _tiles(report.views),
        _results(report.results),
        *(_section(section, draw) for section in report.sections),
        f"<footer>{escape(report.made)}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'{refresh}<link rel="icon" href="data:,">\n<title>{escape(report.title)}</title>\n'
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _tiles(views: Sequence[View]) -> str:
    """The first thing that is seen: a tile for each run."""
    tiles = [_tile(view) for view in views[:MOST_TILES]]
    more = len(views) - MOST_TILES
    note = f'<p class="about">and {count(more, "run")} more below</p>' if more > 0 else ""
    return f'<div class="tiles">{"".join(tiles)}</div>{note}'


def _tile(view: View) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _tile_facts(view))
    colour = "#77828d" if view.is_benchmark else method_colour(view.method)
    return (
        f'<section class="tile" style="border-top-color: {colour}"><h3>{_breakable(view.name)}</h3>'
        f'<p class="of">{escape(_subtitle(view))}</p><dl>{facts}</dl></section>'
    )


def _subtitle(view: View) -> str:
    status = "" if view.status in (None, "finished") else f", {view.status}"
    layers = sorted({setting.layers for setting in view.measured()})
    if view.is_benchmark:
        methods = {setting.method for setting in view.measured()}
        span = f"{layers[0]} to {layers[-1]} layers" if len(layers) > 1 else count(layers[0], "layer")
        return f"benchmark of {view.model}, {count(len(methods), 'method')}, {span}{status}"
    trained = count(layers[-1], "layer") if layers else ""
    return ", ".join(text for text in (method_name(view.method), view.model, trained) if text) + status


def _tile_facts(view: View) -> list[tuple[str, str]]:
    if view.is_benchmark:
        return [("settings", str(len(view.measured()))), ("steps", str(view.steps))]
    costs = list(view.measured().values())
    step = next((row for cost in reversed(costs) if (row := cost.phases().get("step")) is not None), None)
    facts = [
        ("test accuracy", percent(view.test_accuracy)),
        ("step, median", "-" if step is None else f"{step.p50_ms:.1f} ms"),
        ("peak RSS", size(None if view.peak_rss_kib is None else view.peak_rss_kib * 1024)),
        ("activation bytes", size(max((cost.activation_bytes for cost in costs), default=None))),
        ("steps", str(view.steps) if view.total_steps is None else f"{view.steps} of {view.total_steps}"),
        ("time", duration(max((row.time_s for row in view.latest.values()), default=0.0))),
    ]
    return [fact for fact in facts if fact[1] != "-"]


def _results(tables: Sequence[Table]) -> str:
    if not tables:
        return ""
    body = "".join(_folded(table) for table in tables)
    return f'<h2>Results</h2><p class="about">{RESULTS}</p>{body}'


def _folded(table: Table) -> str:
    body = _table(table, "results")
    if len(table.rows) <= MOST_OPEN_ROWS:
        return body
    return f"<details><summary>All {len(table.rows)} settings</summary>{body}</details>"


def _section(section: Section, draw: Draw) -> str:
    head = f'<h2>{escape(section.title)}</h2><p class="about">{escape(section.text)}</p>'
    if not section.plots and not section.tables:
        return f'{head}<p class="missing">{escape(section.missing)}</p>'
    figures = "".join(_figure(plot, draw) for plot in section.plots)
    cards = f'<div class="cards">{figures}</div>' if figures else ""
    kind = "results" if figures else "facts"
    return head + cards + "".join(_table(table, kind) for table in section.tables)


def _figure(plot: Plot, draw: Draw) -> str:
    keys = "".join(f"<li>{mark}<span>{_breakable(label)}</span></li>" for label, mark in _keys(plot))
    return (
        f'<figure id="{escape(plot.name)}"><h3>{_breakable(plot.title)}</h3><ul class="keys">{keys}</ul>'
        f"{draw(plot)}<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _keys(plot: Plot) -> list[tuple[str, str]]:
    if isinstance(plot, LinePlot):
        return [(line.label, _line_mark(line)) for line in plot.lines if line.label]
    keys = [(label, _mark(KEY_BOX.format(fill=fill))) for label, fill in plot.keys]
    return [*keys, (plot.hatched, _mark(KEY_BOX.format(fill=hatched_key()) + HATCH))] if plot.hatched else keys


def _line_mark(line: Line) -> str:
    if line.style == "points":
        return _mark(f'<circle cx="11" cy="6" r="5" fill="{line.colour}"/>')
    return _mark(f'<path d="M0 6H22" stroke="{line.colour}" stroke-width="3"{DASHES[line.style]}/>')


def _mark(shape: str) -> str:
    return f'<svg viewBox="0 0 22 12" aria-hidden="true">{shape}</svg>'


def _table(table: Table, kind: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "".join(f"<tr>{_row(table.header, row)}</tr>" for row in table.rows)
    inner = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{inner}</div>'


def _row(header: Sequence[str], cells: Sequence[str]) -> str:
    texts = (_breakable(cells[0]), *map(escape, cells[1:]))  # the first is a name
    return "".join(
        f'<td data-label="{escape(name)}"><span>{text}</span></td>'
        for name, text in zip(header, texts, strict=True)
    )


def _breakable(name: str) -> str:
    """Escaped; where it is too long for a line it breaks after a dot or the like, but not within 0.5."""
    return re.sub(r"([._/])(?=[^\W\d_])", r"\1<wbr>", escape(name))
