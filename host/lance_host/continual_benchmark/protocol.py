"""The protocol: what is trained how, the same for every method.

Sources: GPM (Saha et al., ICLR 2021, arXiv 2103.09762) for data, networks, schedule and thresholds; LANCE
(Apolinario and Roy, arXiv 2509.21617) for its own rates and thresholds.  Multi-head, and the task of an image
is known at test.  No augmentation.  After task 1 the weights of convolutions and linear layers train, and
the head of the task; scale and shift of the batch-norms do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from lance_edge.errors import LanceError
from lance_edge.input_spec import Split

BatchNorm = Literal["running", "batch"]
BATCH_NORMS: tuple[BatchNorm, ...] = ("running", "batch")
SPLIT = Split(seed=0, test_fraction=0.25, validation_fraction=0.05)  # the data bring their own test part
HEAD = "head"  # the module of both networks that is new for every task


@dataclass(frozen=True)
class Recipe:
    """How one task is trained: SGD without momentum, a rate that is divided when the validation loss stalls.

    Attributes:
        patience: epochs without a better validation loss before the rate is divided by `factor`.
        least_lr: training ends when the rate falls below it.
    """

    lr: float
    epochs: int
    batch_size: int = 64
    patience: int = 6
    factor: float = 2.0
    least_lr: float = 1e-5


@dataclass(frozen=True)
class Preset:
    """How much of the protocol is run.

    Attributes:
        per_class: training and test images of each class at most; `None` takes all.
        memory_batches: batches that LANCE's memory is built from.
        gpm_samples: images that GPM's memory is built from.
        replay: images that ER and A-GEM keep of all earlier tasks together.
        fisher_samples: images that EWC's Fisher information is a mean over.
        dropout: whether the networks' dropout is on while they train.
    """

    name: str
    recipe: Recipe
    gpm_lr: float
    per_class: tuple[int, int] | None
    memory_batches: int
    gpm_samples: int
    replay: int
    fisher_samples: int
    dropout: bool
    energy: float = 0.98
    ewc_penalty: float = 5000.0

    def recipe_of(self, method: str) -> Recipe:
        """GPM's own runs have a smaller rate."""
        lr = self.gpm_lr if method == "gpm" else self.recipe.lr
        return replace(self.recipe, lr=lr)

    def at_half_rate(self) -> "Preset":
        """The same with half of every learning rate."""
        return replace(self, recipe=replace(self.recipe, lr=self.recipe.lr / 2), gpm_lr=self.gpm_lr / 2)


PAPER = Preset(
    name="paper",
    recipe=Recipe(lr=0.1, epochs=200),
    gpm_lr=0.01,
    per_class=None,
    memory_batches=11,
    gpm_samples=125,
    replay=2000,
    fisher_samples=1000,
    dropout=True,
)
QUICK = Preset(
    name="quick",
    recipe=Recipe(lr=0.02, epochs=10, patience=3),
    gpm_lr=0.02,
    per_class=(500, 200),
    memory_batches=11,
    gpm_samples=125,
    replay=200,
    fisher_samples=200,
    dropout=False,
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in (QUICK, PAPER)})


def choose_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        LanceError: if there is none of this name.
    """
    if name not in PRESETS:
        raise LanceError(f"--preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return PRESETS[name]


def as_batch_norm(name: str) -> BatchNorm:
    """One of `BATCH_NORMS` by name.

    Raises:
        LanceError: if it is none.
    """
    for one in BATCH_NORMS:
        if one == name:
            return one
    raise LanceError(f"--batch-norm: expected one of {', '.join(BATCH_NORMS)}, found {name!r}")
