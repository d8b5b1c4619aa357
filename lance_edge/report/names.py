"""What people call things."""

from collections.abc import Callable, Iterable, Sequence

from lance_edge.report.costs import Setting
from lance_edge.report.views import View
from lance_edge.units import count

COMPUTED, KEPT = "features computed", "features kept"
METHODS = {"lance": "LANCE", "bp": "BP", "asi": "ASI", "hosvd": "HOSVD"}


def method_name(method: str) -> str:
    """`LANCE`."""
    return METHODS.get(method, method)


def features(setting: Setting) -> str:
    """Whether the frozen part of the network ran."""
    return KEPT if setting.cached else COMPUTED


TELLING: tuple[Callable[[Setting], str], ...] = (
    lambda setting: f"batch {setting.batch_size}",
    lambda setting: f"micro-batch {setting.micro_batch}",
    lambda setting: count(setting.threads, "thread"),
    features,
)


def setting_name(setting: Setting, among: Iterable[Setting]) -> str:
    """`BP, 4 layers`, and what else it takes to tell it from those that it stands among."""
    others = list(among)
    parts = [method_name(setting.method), count(setting.layers, "layer")]
    parts += [name(setting) for name in TELLING if len({name(other) for other in others}) > 1]
    return ", ".join(parts)


def distinct(values: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order in which they first came."""
    return tuple(dict.fromkeys(values))


def runs_of(views: Sequence[View]) -> tuple[View, ...]:
    """Those that train."""
    return tuple(view for view in views if not view.is_benchmark)


def benchmarks_of(views: Sequence[View]) -> tuple[View, ...]:
    """Those of `lance-device bench`."""
    return tuple(view for view in views if view.is_benchmark)
