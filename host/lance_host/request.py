"""What somebody asks of a calibration, and how it talks back."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lance_edge.errors import OptionError, StorageError
from lance_edge.input_spec import DEFAULT_SPLIT, Split
from lance_edge.manifest import Mode
from lance_host.heads import FIND
from lance_host.inputs import InputRequest, check_input
from lance_host.methods import METHODS
from lance_host.model_source import ProvidedWeights
from lance_host.network import NetworkRequest

PATCH_METHODS = ("lance", "bp")
MAX_SEED = 2**63 - 1  # PyTorch's


@dataclass(frozen=True)
class After:
    """What the next task follows.

    Attributes:
        checkpoint: of the finished run.
        artifact: its package; by default the one that the run's `run.json` names.
        memory: what earlier tasks need; `None` leaves them without protection.
        statistics: second moments of the next task, in place of its images.
        null_space_below: modes of at most so many dimensions take all of their null space.
    """

    checkpoint: Path
    artifact: Path | None = None
    memory: Path | None = None
    statistics: Path | None = None
    null_space_below: int = 0


@dataclass(frozen=True)
class Request:
    """What the user asked for; `None` means: choose, and say what was chosen.

    `budgets` are bytes by method; the ranks of other methods follow from `energy`.  `data` is missing where
    `after.statistics` stand for it; `task` is the name of what the package trains.  With `dropout`
    training drops activations where the network has an `nn.Dropout` behind the first trained layer.
    """

    model: str
    data: Path | None
    output: Path
    weights: str | ProvidedWeights | None = None
    layers: str = "4"
    head: str = FIND
    train_bias: bool = False
    train_norm: bool = False
    dropout: bool = False
    methods: tuple[str, ...] = ("lance", "bp")
    energy: float = 0.7
    budgets: Mapping[str, int] = field(default_factory=dict)
    batches: int = 100
    batch_size: int | None = None
    resolution: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    seed: int = 0
    split: Split = DEFAULT_SPLIT
    threads: int | None = None
    mode: Mode = "channel"
    any_rank: bool = False
    task: str | None = None
    after: After | None = None

    @property
    def network(self) -> NetworkRequest:
        """The part that is about the network."""
        inputs = InputRequest(self.resolution, self.mean, self.std, self.interpolation)
        return NetworkRequest(
            self.model,
            self.weights,
            self.layers,
            self.head,
            self.train_bias,
            self.train_norm,
            inputs,
            self.seed,
            self.dropout,
        )


@dataclass(frozen=True)
class Feedback:
    """How the build talks to its user: a line, and progress `(done, total)` of a named piece of work."""

    say: Callable[[str], None]
    progress: Callable[[str, int, int], None]

    def download(self, done: int, size: int) -> None:
        """Progress of a download, in bytes."""
        self.progress("download", done, size)

    def say_bad_image(self, part: str, name: str, reason: str) -> None:
        """An image cannot be read, and another of its class stands in."""
        self.say(f"warning: {name} cannot be read ({reason}); another of its class stands in")


def check(request: Request) -> None:
    """Refuse what cannot work before minutes are spent on it.

    Raises:
        OptionError: naming the option.
    """
    unknown = [method for method in request.methods if method not in METHODS]
    if unknown or not request.methods:
        raise OptionError(
            f"--methods: expected all, or some of {', '.join(METHODS)}, found {', '.join(unknown) or 'none'}"
        )
    if not 0 < request.energy <= 1:
        raise OptionError(
            f"--energy: expected a share above 0 and at most 1, found {request.energy}; the paper uses 0.7"
        )
    for option, value, least in (
        ("--batches", request.batches, 1),
        ("--seed", request.seed, 0),
        ("--threads", request.threads, 1),
    ):
        if value is not None and value < least:
            raise OptionError(f"{option}: expected {least} or more, found {value}")
    if request.seed > MAX_SEED:
        raise OptionError(f"--seed: expected at most {MAX_SEED}, found {request.seed}")
    if request.mode == "patch":
        _check_patch_mode(request)
    elif request.any_rank:
        raise OptionError("--any-rank: of patch mode; add --mode patch")
    check_input(request.network.input)
    _check_output(request.output)


def _check_patch_mode(request: Request) -> None:
    without = [method for method in request.methods if method not in PATCH_METHODS]
    if without:
        raise OptionError(
            f"--methods {','.join(without)}: not in patch mode, where codecs do not compress; expected some of"
            f" {', '.join(PATCH_METHODS)}, or use --mode channel"
        )
    if request.budgets:
        raise OptionError("--memory-budget: not in patch mode; choose --energy, or use --mode channel")


def _check_output(output: Path) -> None:
    """Minutes before the package is written: can it be?"""
    if output.is_dir():
        raise OptionError(f"{output}: is a folder; name the package file, for instance pkg.tar")
    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "no permission to write to it" if nearest.is_dir() else "this file is no folder"
        raise StorageError(f"{output}: cannot write ({nearest}: {reason}); choose another place")
