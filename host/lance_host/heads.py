"""The head: the layer that gives the logits, and is made new for the user's classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lance_edge.errors import ModelError
from lance_host.text import one_line

FIND, KEEP = "linear", "none"
RUN_SAMPLES = 2  # of a trial run
ADVICE = "name it with --head MODULE.NAME, or keep the classifier as it is with --head none"


def choose_head(network: nn.Module, choice: str, known: str | None, shape: Sequence[int]) -> str | None:
    """The module name of the head; `None` where the classifier is to stay as it is.

    Args:
        choice: `linear` (the known head, else the layer that gives the logits), `none`, or a module name.
        shape: of one sample, `[3, R, R]`.

    Raises:
        ModelError: if there is no such layer, or it is no head that can be replaced.
    """
    if choice == KEEP:
        return None
    name = (known or _found(network, shape)) if choice == FIND else choice
    try:
        module = network.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"--head {name}: the network has no module of this name; {_candidates(network)}"
        ) from None
    if not is_classifier(module):
        raise ModelError(
            f"--head {name}: expected an nn.Linear or a 1x1 nn.Conv2d, found {type(module).__name__};"
            f" {_candidates(network)}"
        )
    return name


def replace_head(network: nn.Module, name: str, classes: int) -> None:
    """Put a layer with `classes` outputs in the place of the head; initialised as PyTorch does."""
    old: Any = network.get_submodule(name)
    has_bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias=has_bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, 1, bias=has_bias)
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def is_classifier(module: nn.Module) -> bool:
    """Whether a module can be a head: a linear layer, or one written as a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def run_once(network: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """The logits `[2, classes]` of two samples of zeros.

    Raises:
        ModelError: if the network cannot be run on them, or gives anything else.
    """
    samples = torch.zeros(RUN_SAMPLES, *shape)
    try:
        with torch.no_grad():
            logits = network.eval()(samples)
    except Exception as error:  # whatever the user's code raises
        raise ModelError(
            f"the network cannot be run on float32 {list(samples.shape)}: {one_line(error)};"
            " say what it takes with --input-size (and --mean of calibrate, of one or three numbers)"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != RUN_SAMPLES:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"the network's output: expected one tensor [N, classes], found {found} for 2 samples;"
            " wrap the network in a module that returns the logits alone"
        )
    return logits


def check_classes(network: nn.Module, shape: Sequence[int], classes: int) -> None:
    """Refuse a network whose logits are not one for each class.

    Raises:
        ModelError: naming both numbers.
    """
    found = run_once(network, shape).shape[1]
    if found != classes:
        raise ModelError(
            f"the network gives {found} logits, but --data has {classes} classes; leave --head none away to"
            " get a new head, or name the layer that gives the logits with --head MODULE.NAME"
        )


def _found(network: nn.Module, shape: Sequence[int]) -> str:
    name = find_classifier(network, shape)
    if name is None:
        raise ModelError(
            "no nn.Linear or 1x1 nn.Conv2d gives the network's"
            f" {run_once(network, shape).shape[1]} logits, so no head can be replaced; {ADVICE}"
        )
    return name


def find_classifier(network: nn.Module, shape: Sequence[int]) -> str | None:
    """The last classifier that ran and has as many outputs as there are logits, if there is one."""
    called: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda module, inputs, output: called.append((name, module.weight.shape[0]))

    handles = [m.register_forward_hook(note(n)) for n, m in network.named_modules() if n and is_classifier(m)]
    try:
        outputs = run_once(network, shape).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    fitting = [name for name, width in called if width == outputs]
    return fitting[-1] if fitting else None


def _candidates(network: nn.Module) -> str:
    modules = {name: module for name, module in network.named_modules() if name and is_classifier(module)}
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)] or list(modules)
    return f"it could be {', '.join(names[-3:])}" if names else "keep the classifier with --head none"
