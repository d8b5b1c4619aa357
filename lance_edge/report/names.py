"""What people call things."""

from collections.abc import Sequence

from lance_edge.report.costs import Setting
from lance_edge.report.views import View

METHODS = {"lance": "LANCE", "bp": "BP", "asi": "ASI", "hosvd": "HOSVD"}


def method_name(method: str) -> str:
    """`LANCE`."""
    return METHODS.get(method, method)


def features(setting: Setting) -> str:
    """Whether the frozen part of the network ran."""
    return "features kept" if setting.cached else "features computed"


def distinct(values: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order in which they first came."""
    return tuple(dict.fromkeys(values))


def runs_of(views: Sequence[View]) -> tuple[View, ...]:
    """Those that train."""
    return tuple(view for view in views if not view.is_benchmark)


def benchmarks_of(views: Sequence[View]) -> tuple[View, ...]:
    """Those of `lance-device bench`."""
    return tuple(view for view in views if view.is_benchmark)
