"""Which layers train: what `--layers` means, and what a network offers.

4                     the last four in module order, convolutions and linear layers alike
conv:4, linear:4      the last four of a kind
pointwise:4           the last four that are not depthwise or grouped
layer4.*,layer3.1     names and globs of modules; a module stands for all layers in it
[13]                  the module of this very name, which may be a number; where there is none, a glob too
all                   every one: the network has no frozen part then

The layer that gives the logits is not counted: as a new head it trains anyway; one that is kept (`--head none`)
stays frozen, unless it is among the names, or `all` are asked for.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lance_edge.errors import ModelError
from lance_host.heads import RUN_SAMPLES, run_once

ALL = "all"
TRAINABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear  # the output projection of MultiheadAttention
LAYER_KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "": lambda module: True,
    "conv": lambda module: isinstance(module, nn.Conv1d | nn.Conv2d),
    "linear": lambda module: isinstance(module, nn.Linear),
    "pointwise": lambda module: getattr(module, "groups", 1) == 1,
}


@dataclass(frozen=True)
class Candidate:
    """A layer that can be trained; shapes of one sample."""

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Values of its weight."""
        return math.prod(self.weight_shape)

    def bp_bytes(self, batch_size: int) -> int:
        """What plain backpropagation keeps for it: its float32 input."""
        return 4 * batch_size * math.prod(self.input_shape)


def layer_modules(network: nn.Module) -> list[str]:
    """Names of all 1-D and 2-D convolutions and linear layers with a weight of their own, in module order.

    Without those inside of `nn.MultiheadAttention`, which reads their weights and never calls them, and those
    whose weight is computed, as by weight normalisation.
    """
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, TRAINABLE)
        and not isinstance(module, UNCALLED)
        and "weight" in dict(module.named_parameters(recurse=False))
    ]


def running_layers(network: nn.Module, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Input shape of one sample of each of the `layer_modules` that takes part when the network runs.

    Args:
        shape: of one sample, `[3, R, R]`.
    """
    inputs: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        return lambda module, arguments, output: inputs.update({name: _sample_shape(module, arguments[0])})

    names = layer_modules(network)
    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        run_once(network, shape)
    finally:
        for handle in handles:
            handle.remove()
    return {name: inputs[name] for name in names if name in inputs}


def select_layers(
    network: nn.Module,
    selection: str,
    head: str | None = None,
    kept: str | None = None,
    among: Collection[str] | None = None,
) -> list[str]:
    """The trainable layers in module order; never the new head, which trains anyway.

    Args:
        kept: the network's own last layer, where it is no new head: it does not count.
        among: these layers, such as `running_layers`; by default all `layer_modules`.

    Raises:
        ModelError: for a selection that is not understood, matches nothing, or asks for more layers than
            there are.
    """
    names = [name for name in layer_modules(network) if name != head and (among is None or name in among)]
    kind, _, count = selection.rpartition(":")
    if kind in LAYER_KINDS and count.isdecimal():
        modules = dict(network.named_modules())
        return _last(selection, int(count), [n for n in names if n != kept and LAYER_KINDS[kind](modules[n])])
    if selection.strip() == ALL:
        return names
    return _matching(selection, names)


def exactly(names: Iterable[str]) -> str:
    """The selection of the layers of these names, whatever they are."""
    return ",".join(f"[{name}]" for name in names) or "0"


def _last(selection: str, count: int, names: list[str]) -> list[str]:
    if count > len(names):
        meant = f", or for the layer of this name with '[{selection}]'" if selection in names else ""
        raise ModelError(
            f"--layers {selection}: the network has only {len(names)} such layers; ask for fewer{meant}"
        )
    return names[len(names) - count :]


def _matching(selection: str, names: Sequence[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in (text.strip() for text in selection.split(",")):
        found = _exact(names, pattern) or {name for name in names if _fits(name, pattern)}
        if not found:
            raise ModelError(_no_match(selection, pattern, names))
        chosen |= found
    return [name for name in names if name in chosen]


def _exact(names: Sequence[str], pattern: str) -> set[str]:
    """The layer, or those in the module, that `[13]` is the name of."""
    if not (pattern.startswith("[") and pattern.endswith("]")):
        return set()
    own = pattern[1:-1]
    return {name for name in names if name == own or name.startswith(f"{own}.")}


def _fits(name: str, pattern: str) -> bool:
    return bool(pattern) and (fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*"))


def _no_match(selection: str, pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or names[-3:]
    written = ", ".join(map(_written, close)) or "features.*"
    return (
        f"--layers {selection}: expected a count such as 4, several such as 1-10 or 2,4, or pointwise:4, or"
        f" all, or names such as {written}; no layer is called {pattern!r}, or"
        " it takes no part: lance-host layers lists them"
    )


def _written(name: str) -> str:
    """A name as `--layers` takes it."""
    return f"[{name}]" if name.isdecimal() else name


def list_layers(network: nn.Module, shape: Sequence[int], head: str | None) -> list[Candidate]:
    """Every layer that can be trained and takes part when the network runs, in module order.

    Args:
        head: is left out: the new one, or the network's own that is kept.
        shape: of one sample, `[3, R, R]`.
    """
    return [
        Candidate(name, describe(module), tuple(module.weight.shape), input_shape)
        for name, input_shape in running_layers(network, shape).items()
        if name != head and isinstance(module := network.get_submodule(name), TRAINABLE)
    ]


def _sample_shape(module: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    """`[C, H, W]`, `[C, W]`, `[T, F]` or `[F]` of the input of a layer for two samples."""
    if not isinstance(module, nn.Linear):
        return tuple(x.shape[1:])
    tokens = x.numel() // (RUN_SAMPLES * module.in_features)
    return (module.in_features,) if tokens == 1 else (tokens, module.in_features)


def describe(module: nn.Module) -> str:
    """`linear`, or `3x3, stride 2, depthwise`, or `1-D 3, stride 2`: what a person calls a layer."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return "linear"
    kernel = "x".join(map(str, module.kernel_size))
    words = [f"1-D {kernel}" if isinstance(module, nn.Conv1d) else kernel]
    if max(module.stride) > 1:
        words.append(f"stride {max(module.stride)}")
    if max(module.dilation) > 1:
        words.append(f"dilation {max(module.dilation)}")
    if module.groups > 1:
        words.append("depthwise" if module.groups == module.in_channels else f"{module.groups} groups")
    return ", ".join(words)
