"""Published accuracies, to stand beside ours: only where benchmark and network are the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GPM_TABLE = "multitask, EWC, A-GEM, ER and GPM as in GPM's table, arXiv 2103.09762"
LANCE_TABLE = (
    "LANCE as in arXiv 2509.21617, with 2.32 MB of activations against 22 to 33 MB for GPM-like methods"
)
CODE_CL_TABLE = "CODE-CL, arXiv 2411.15235"


@dataclass(frozen=True)
class PublishedValue:
    """ACC in percent after the last task, and where it stands."""

    acc: float
    source: str


_SPLIT_CIFAR100 = {
    "multitask": PublishedValue(79.6, GPM_TABLE),
    "code-cl": PublishedValue(77.2, CODE_CL_TABLE),
    "gpm": PublishedValue(72.5, GPM_TABLE),
    "er": PublishedValue(71.7, GPM_TABLE),
    "lance": PublishedValue(71.5, LANCE_TABLE),
    "ewc": PublishedValue(68.8, GPM_TABLE),
    "agem": PublishedValue(64.0, GPM_TABLE),
}

PUBLISHED: Mapping[tuple[str, str], Mapping[str, PublishedValue]] = MappingProxyType(
    {("split-cifar100", "alexnet"): MappingProxyType(_SPLIT_CIFAR100)}
)
