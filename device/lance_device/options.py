"""How to train: the options of a run, with every `auto` resolved on this machine."""

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from lance_device.board import choose_board
from lance_device.class_weights_text import is_understood
from lance_device.numerics import ON_NAN
from lance_device.schedule import PLATEAU, SCHEDULES
from lance_edge.boards import Advice
from lance_edge.errors import CheckpointError
from lance_edge.input_spec import ArrayInput, InputSpec
from lance_edge.manifest import Manifest

AUGMENTS = ("flip", "none")
CACHES = ("on", "off")
# In a resumed run: they change no weights, or only those of steps that could not be made before.
FREE_TO_CHANGE = ("cache_size", "cache_dir", "on_nan")
DEFAULT_MICRO_BATCH = 8  # larger ones gain little speed and cost memory in proportion


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides which weights come out, and where features are kept meanwhile.

    Stored in every checkpoint; a resumed run keeps them, so that it ends with the same bits.

    Attributes:
        layers: number of trained layers.
        steps: train so many batches, whatever `epochs` says; `None` follows `epochs`.
        clip: largest global gradient norm; 0 is off.
        label_smoothing: share of the target that all classes divide.
        class_weights: `none`, `balanced`, or a number for each class, with commas.
        eval_every: epochs between evaluations; 0 evaluates at the end only.
        cache: `on` or `off`; `auto` until a new run has decided.
        cache_size: bytes of features on disk at most.
        cache_dir: folder of features that runs share; `None` keeps them in the run's own.
        on_nan: what to do about a step whose loss or gradients are no numbers (`numerics.py`).
        protect: digest of the memory whose subspaces gradients are projected off; empty without one.
        patience, min_lr: of schedule `plateau`: evaluations without a lower loss before the learning rate is
            halved, and the learning rate below which the run ends.
    """

    method: str
    layers: int
    epochs: int
    steps: int | None
    lr: float
    momentum: float
    weight_decay: float
    clip: float
    schedule: str
    augment: str
    label_smoothing: float
    class_weights: str
    seed: int
    threads: int
    micro_batch: int
    shuffle: bool
    eval_every: int
    cache: str
    cache_size: int
    cache_dir: str | None
    on_nan: str = "stop"
    patience: int = 6
    min_lr: float = 1e-5
    protect: str = ""


def check_options(options: TrainOptions) -> None:
    """What the command line guarantees, for options that were read from a file.

    Raises:
        ValueError: naming the first option that is out of its range.
    """
    counts = {"epochs": options.epochs, "steps": options.steps, "threads": options.threads}
    counts |= {"micro_batch": options.micro_batch, "patience": options.patience}
    wrong = [name for name, value in counts.items() if value is not None and value < 1]
    least_zero = ("layers", "seed", "eval_every", "clip", "weight_decay", "cache_size")
    wrong += [name for name in least_zero if not getattr(options, name) >= 0]
    wrong += ["lr"] * (not 0 < options.lr < math.inf) + ["momentum"] * (not 0 <= options.momentum < 1)
    wrong += ["schedule"] * (options.schedule not in SCHEDULES) + ["augment"] * (
        options.augment not in AUGMENTS
    )
    wrong += ["label_smoothing"] * (not 0 <= options.label_smoothing < 1)
    wrong += ["class_weights"] * (not is_understood(options.class_weights))
    wrong += ["min_lr"] * (not 0 < options.min_lr < math.inf)
    wrong += ["eval_every"] * (options.schedule == PLATEAU and options.eval_every != 1)
    wrong += ["cache"] * (options.cache not in CACHES) + ["on_nan"] * (options.on_nan not in ON_NAN)
    if wrong:
        raise ValueError(f"option {wrong[0]} is {getattr(options, wrong[0])!r}")


def resolve(values: Mapping[str, Any], manifest: Manifest) -> TrainOptions:
    """The options with `None` for "auto" replaced by what fits this board and this package.

    Args:
        values: the fields of `TrainOptions`, and `board`: a name, or `auto`.

    `cache` stays `auto`: what fits depends on the images too (`cache_plan.choose`).

    Raises:
        PlatformError: if there is no profile of the board.
        ArtifactError: if the package does not hold the method, or not with so many layers.
    """
    chosen = {field.name: values[field.name] for field in fields(TrainOptions) if field.name in values}
    variant = manifest.variant(values["method"], values["layers"])
    chosen["method"], chosen["layers"] = variant.method, len(variant.layers)
    advice = choose_board(values.get("board")).advice
    chosen["augment"] = values["augment"] or _augment_for(manifest.preprocessing)
    chosen["threads"] = values["threads"] or advised_threads(advice)
    if values["cache_dir"] is not None:
        chosen["cache_dir"] = str(Path(values["cache_dir"]).absolute())
    chosen["micro_batch"] = min(values["micro_batch"] or advice.micro_batch, manifest.batch_size)
    return TrainOptions(**chosen)


def _augment_for(preprocessing: InputSpec) -> str:
    """Photographs are mirrored; of arrays nobody knows what may be done to them."""
    return "none" if isinstance(preprocessing, ArrayInput) else "flip"


def keep_stored(stored: TrainOptions, wanted: TrainOptions, given: Collection[str], where: str) -> TrainOptions:
    """The options of the run that is resumed.

    Args:
        wanted: what the command line asks for.
        given: the options that were written on the command line; all others follow the stored run.

    Raises:
        CheckpointError: naming the first given option that differs.
    """
    changed = {name: getattr(wanted, name) for name in FREE_TO_CHANGE if name in given}
    for field in fields(TrainOptions):
        before, now = getattr(stored, field.name), getattr(wanted, field.name)
        is_open = field.name in changed or (field.name == "cache" and now == "auto")
        if field.name in given and before != now and not is_open:
            raise CheckpointError(
                f"{where}: this run was started with {_flag(field.name, before)}, not {_flag(field.name, now)};"
                f" {_reason(field.name)}: leave the option out, or start a new run with another --out"
            )
    return replace(stored, **changed)


def advised_threads(advice: Advice) -> int:
    """As many as the board advises, but no more than the cores that this process may use."""
    return min(advice.threads or available_cores(), available_cores())


def available_cores() -> int:
    """Cores that this process may use; one thread a physical core is fastest for matrix products."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(allowed, physical))


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    if name == "shuffle":
        return flag if value else "--no-shuffle"
    return f"no {flag}" if value is None else f"{flag} {value}"


def _reason(name: str) -> str:
    if name in ("epochs", "steps"):
        return "the learning-rate schedule runs over the length that was planned at the start"
    return "a resumed run keeps its options, so that it ends as it would have without the break"
