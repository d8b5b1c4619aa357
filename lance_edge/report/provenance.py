"""How it was measured: machine, versions, arguments, package."""

from collections.abc import Callable, Sequence

from lance_edge.report.plots import Section, Table
from lance_edge.report.views import View

Fact = tuple[str, Callable[[View], str]]

FACTS: tuple[Fact, ...] = (
    ("machine", lambda view: view.machine.label),
    ("system", lambda view: _joined(view, ("system",), ("kernel",), ("libc",))),
    ("governor", lambda view: view.fact_text("machine", "governor")),
    ("status", lambda view: _status(view)),
    ("started", lambda view: view.fact_text("started")),
    ("command", lambda view: _command(view)),
    ("package", lambda view: view.fact_text("artifact", "path")),
    ("package identity (SHA-256)", lambda view: view.fact_text("artifact", "identity_sha256")),
    ("data", lambda view: view.fact_text("data", "path")),
    ("images", lambda view: _images(view)),
    ("versions", lambda view: _pairs(view, "versions")),
    ("options", lambda view: _pairs(view, "options")),
    ("session of the runtime", lambda view: _pairs(view, "session_options")),
    ("peak memory is", lambda view: view.fact_text("peak_rss_source")),
    ("read from", lambda view: str(view.files.steps or view.files.history)),
)


def provenance(views: Sequence[View]) -> Section:
    """A table for each run."""
    tables = tuple(_table(view) for view in views)
    return Section(
        "How it was measured", "What one needs to repeat these measurements, as run.json says.", (), tables
    )


def _table(view: View) -> Table:
    rows = tuple((name, text) for name, fact in FACTS if (text := fact(view)) != "-")
    return Table(view.name, (view.name, ""), rows)


def _joined(view: View, *paths: tuple[str, ...]) -> str:
    texts = [view.fact_text("machine", *path) for path in paths]
    return " ".join(text for text in texts if text != "-") or "-"


def _status(view: View) -> str:
    message = view.fact_text("message")
    return ("lost" if view.is_lost else view.fact_text("status")) + ("" if message == "-" else f": {message}")


def _command(view: View) -> str:
    words = view.fact("arguments")
    return "lance-device " + " ".join(map(str, words)) if isinstance(words, list) and words else "-"


def _images(view: View) -> str:
    parts = [
        f"{n} {part}" for part in ("train", "validation", "test") if (n := view.fact("data", part)) is not None
    ]
    return ", ".join(parts) or "-"


def _pairs(view: View, name: str) -> str:
    entries = view.fact(name)
    if not isinstance(entries, dict):
        return "-"
    return ", ".join(f"{key} {view.fact_text(name, key)}" for key in entries if entries[key] is not None) or "-"
