"""The table of methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lance_edge.errors import LanceError
from lance_host.continual_benchmark.in_engine import learn_finetune, learn_gpm, learn_lance
from lance_host.continual_benchmark.in_pytorch import learn_baseline, learn_jointly
from lance_host.continual_benchmark.job import Job, Learnt


@dataclass(frozen=True)
class Method:
    """A way to learn one task after the other.

    Attributes:
        learn: learns a task.
        where: `engine` (package and device runtime) or `torch`.
        is_joint: learns all tasks at once.
        relaxes: has a protection that `--relax` loosens.
        compresses: keeps of activations what has `--energy`.
    """

    learn: Callable[[Job], Learnt]
    where: str
    is_joint: bool = False
    relaxes: bool = False
    compresses: bool = False


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "finetune": Method(learn_finetune, "engine"),
        "gpm": Method(learn_gpm, "engine", relaxes=True),
        "lance": Method(learn_lance, "engine", relaxes=True, compresses=True),
        "ewc": Method(learn_baseline, "torch"),
        "agem": Method(learn_baseline, "torch"),
        "er": Method(learn_baseline, "torch"),
        "multitask": Method(learn_jointly, "torch", is_joint=True),
    }
)


def choose_methods(text: str) -> tuple[str, ...]:
    """`lance,gpm` to `("lance", "gpm")`; `all` stands for every method.

    Raises:
        LanceError: if there is no such method.
    """
    names = tuple(METHODS) if text == "all" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in METHODS:
            raise LanceError(f"--method: expected some of {', '.join(METHODS)}, or all, found {name!r}")
    return names
