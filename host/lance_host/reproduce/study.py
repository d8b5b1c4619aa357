"""What somebody asks of a reproduction, and how long each of its studies is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lance_edge.counts import parse_counts
from lance_edge.errors import LanceError
from lance_edge.manifest import METHOD_NAMES

DEFAULT_DATASETS = ("cifar10", "cifar100")
EXAMPLES = {"--data": "cifar10=FOLDER", "--weights": "mcunet=FILE"}


@dataclass(frozen=True)
class Preset:
    """The length of the studies.

    Attributes:
        train_images, test_images: of a data set at most, the same share of each class; `None`: all.
        small_batch_epochs: of table 8, whose batches of 4 make 32 times as many steps.
        batches: calibration batches at most, as in `lance-host calibrate --batches`.
        gradient_batches: that the angle of gradients is measured on.
        energies: ε of figures 3 and 4.
        calibrations: numbers of calibration batches of figure 3.
        bench_layers, bench_steps, bench_trials: of figure 5.
        pretrain_epochs, pretrain_size: of table 1; pixels, `None` for the network's own.
    """

    train_images: int | None
    test_images: int | None
    epochs: int
    small_batch_epochs: int
    batches: int
    gradient_batches: int
    energies: tuple[float, ...]
    calibrations: tuple[int, ...]
    bench_layers: str
    bench_steps: int
    bench_trials: int
    pretrain_epochs: int
    pretrain_size: int | None


PRESETS = {
    "quick": Preset(
        train_images=2000,
        test_images=1000,
        epochs=5,
        small_batch_epochs=1,
        batches=15,
        gradient_batches=2,
        energies=(0.5, 0.7, 0.9),
        calibrations=(1, 4, 15),
        bench_layers="1,2,4",
        bench_steps=2,
        bench_trials=1,
        pretrain_epochs=3,
        pretrain_size=96,
    ),
    "paper": Preset(
        train_images=None,
        test_images=None,
        epochs=50,
        small_batch_epochs=50,
        batches=100,
        gradient_batches=4,
        energies=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        calibrations=(1, 5, 20, 50, 100),
        bench_layers="1-10",
        bench_steps=5,
        bench_trials=3,
        pretrain_epochs=100,
        pretrain_size=None,
    ),
}


@dataclass(frozen=True)
class Study:
    """A reproduction: what to run, on what, and where it goes.

    Attributes:
        places: where a data set is, by name; others are looked for in `data_root`.
        weights: `--weights` of a network, by name; others are the published ones.
        seeds: of the new head, the calibration and the order of images; a cell is run with each.
        layers: counts of trained layers, ascending; the head trains always.
        methods: of tables 1, 2, 8 and figure 5.
        batch_size, lr, weight_decay: the published recipe's; table 8 has its own batches.
    """

    out: Path
    preset: str = "paper"
    models: tuple[str, ...] = ("mcunet",)
    datasets: tuple[str, ...] = DEFAULT_DATASETS
    places: Mapping[str, Path] | None = None
    data_root: Path = Path("data")
    weights: Mapping[str, str] | None = None
    seeds: tuple[int, ...] = (0,)
    layers: tuple[int, ...] = (2, 4)
    methods: tuple[str, ...] = ("lance", "bp", "asi", "hosvd")
    batch_size: int = 128
    lr: float = 0.05
    weight_decay: float = 0.0
    threads: int | None = None
    say: Callable[[str], None] = print

    @property
    def size(self) -> Preset:
        """How long its studies are."""
        return PRESETS[self.preset]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every network with every data set."""
        return [(model, dataset) for model in self.models for dataset in self.datasets]


def check(study: Study) -> None:
    """Refuse what cannot work before hours are spent on it.

    Raises:
        LanceError: naming the option.
    """
    for option, names in (("--models", study.models), ("--datasets", study.datasets)):
        if not names:
            raise LanceError(f"{option}: expected names, found none; leave it out for the default")
    for option, rate in (("--lr", study.lr), ("--weight-decay", study.weight_decay)):
        if not (math.isfinite(rate) and rate >= 0):
            raise LanceError(f"{option}: expected a number that is not below 0, found {rate:g}")
    unknown = [method for method in study.methods if method not in METHOD_NAMES]
    if unknown or "lance" not in study.methods:
        raise LanceError(
            f"--methods: expected lance and some of {', '.join(METHOD_NAMES)}, found"
            f" {', '.join(study.methods)}; everything is compared with lance: name it too"
        )
    if study.layers[0] < 1:
        raise LanceError(
            "--layers: expected counts from 1, found 0; the head alone stands in every table anyway"
        )
    if study.out.exists() and not study.out.is_dir():
        raise LanceError(f"{study.out}: expected a folder, found a file; choose another --out")


def named_values(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    """`("cifar10=data/c10",)` to `{"cifar10": "data/c10"}`.

    Raises:
        LanceError: for what is not `NAME=VALUE`.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise LanceError(
                f"{option}: expected NAME=VALUE, found {text!r}; write {option} {EXAMPLES[option]}, say"
            )
        found[name] = value
    return found


def counts(option: str, text: str) -> tuple[int, ...]:
    """`0-2` to `(0, 1, 2)`.

    Raises:
        LanceError: for what is no list of counts.
    """
    found = parse_counts(text)
    if not found:
        raise LanceError(f"{option}: expected counts such as 2,4 or 0-2, found {text!r}; correct it")
    return found
