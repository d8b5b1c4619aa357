"""Weights of a network: from a file, the cache, its authors, a package, the bundle, or random.

Reading weights never executes code: `.pth` files go through PyTorch's restricted unpickler.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from lance_edge.errors import ModelError
from lance_host.model_source import ModelSource, ProvidedWeights, Published, State
from lance_host.published import Progress, UnreachableError, fetch

RANDOM = "random"
BUNDLED = "bundled"
MANUAL = "download that file on a connected machine and give it as --weights FILE"
SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class LoadedWeights:
    """Where the weights came from, and what the user should know about it.

    `source` holds no path of this machine: it is written into the package.
    """

    source: str
    note: str | None = None


def load_weights(
    model: ModelSource,
    network: nn.Module,
    source: str | ProvidedWeights | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LoadedWeights:
    """Fill `network`, which `model.build` made, in place; its head is always new, and follows from `seed`.

    `source` is a file (.pth, .pt or .safetensors), `"random"`, `"bundled"` (the checkpoint that comes with
    lance-host), weights at hand, or `None`: what the model itself names.  Published weights come from the
    user's cache or from their address, else the bundled ones are taken; `LANCE_EDGE_OFFLINE=1` never
    connects.  Without `model.head` nothing is new.

    Raises:
        ModelError: if there are no such weights, or they do not fit the network.
    """
    if isinstance(source, ProvidedWeights):
        loaded = _load_provided(model, network, source)
    elif source == RANDOM:
        _initialise(network, seed)
        loaded = LoadedWeights(f"random, seed {seed}")
    elif source == BUNDLED:
        loaded = _load_bundled(model, network, "not asked for")
    elif source is not None:
        loaded = _load_file(model, network, Path(source))
    else:
        loaded = _load_own(model, network, progress)
    if model.head is not None:
        _initialise(network.get_submodule(model.head), seed)
    return loaded


def _initialise(module: nn.Module, seed: int) -> None:
    """PyTorch's default initialisation of every layer, without moving the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in module.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()


def _load_file(model: ModelSource, network: nn.Module, path: Path) -> LoadedWeights:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"--weights {path}: cannot read ({error.strerror}); expected a {', '.join(SUFFIXES)} file,"
            f" or '{RANDOM}'"
        ) from None
    _assign(model, network, read_state(data, path.name), path.name)
    return LoadedWeights(f"file: {path.name}, sha256 {hashlib.sha256(data).hexdigest()[:16]}")


def _load_own(model: ModelSource, network: nn.Module, progress: Progress | None) -> LoadedWeights:
    """What the model names: an installed package, its authors' address, or what it was built with."""
    if model.provided is not None:
        return _load_provided(model, network, model.provided())
    if model.published is not None:
        return _load_published(model, model.published, network, progress)
    return LoadedWeights(f"as built by {model.name}")


def _load_provided(model: ModelSource, network: nn.Module, provided: ProvidedWeights) -> LoadedWeights:
    _assign(model, network, provided.state, provided.source)
    return LoadedWeights(provided.source)


def _load_published(
    model: ModelSource, published: Published, network: nn.Module, progress: Progress | None
) -> LoadedWeights:
    """From the cache, else from its address, else the bundled checkpoint."""
    try:
        data, note = fetch(published, progress)
    except UnreachableError as reason:
        bundled = _load_bundled(model, network, f"{published.url}: {reason}")
        return replace(bundled, note=_fallback_note(model, published, reason))
    _assign(model, network, read_state(data, published.file), published.file)
    return LoadedWeights(f"published: {published.file}", note)


def _fallback_note(model: ModelSource, published: Published, reason: Exception) -> str:
    return (
        f"warning: no published weights ({published.url}: {reason}); using {model.bundled}, which comes with"
        f" lance-host and was trained on CIFAR-10's small images only: expect lower accuracy. For the weights"
        f" trained on ImageNet, {MANUAL}"
    )


def _load_bundled(model: ModelSource, network: nn.Module, reason: str) -> LoadedWeights:
    """The checkpoint that comes with lance-host; `reason` says why not the published one."""
    file = resources.files("lance_host") / "checkpoints" / (model.bundled or "none")
    if model.bundled is None or not file.is_file():
        raise ModelError(
            f"{model.name}: no published weights ({reason}), and none come with lance-host;"
            f" {MANUAL}, choose --model mcunet, or start from --weights {RANDOM}"
        )
    _assign(model, network, read_state(file.read_bytes(), model.bundled), model.bundled)
    return LoadedWeights(f"bundled: {model.bundled}")


def read_state(data: bytes, where: str) -> State:
    """Tensors by name: a `.safetensors` file, or a `.pth` of a state dict (bare, or under `state_dict`).

    Raises:
        ModelError: if the bytes are damaged, hold anything but tensors, or code.
    """
    suffix = Path(where).suffix.lower()
    if suffix not in SUFFIXES:
        raise ModelError(
            f"{where}: expected a {', '.join(SUFFIXES)} file of weights, found {suffix or 'no suffix'}"
        )
    with _readable(where):
        if suffix == ".safetensors":
            return safetensors.torch.load(data)
        state: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(map(_is_entry, state.items())):
        raise ModelError(
            f"{where}: expected a dictionary of tensors (a state dict), found {type(state).__name__};"
            " save it with torch.save(network.state_dict(), path)"
        )
    return state


def _is_entry(entry: tuple[object, object]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], torch.Tensor)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Whatever a parser raises becomes one refusal: damaged files fail in many ways."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{where}: not readable as weights ({lines[0][:160]}); expected tensors only and no code: copy the"
            " file again, or save it with torch.save(network.state_dict(), path) or as .safetensors"
        ) from None


def _assign(model: ModelSource, network: nn.Module, state: State, where: str) -> None:
    """Copy everything but the head; names and shapes must be exactly those of the network."""
    expected, found = (_without_head(model, tensors) for tensors in (network.state_dict(), state))
    missing = [n for n in expected if n not in found and not n.endswith(".num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {list(found[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = [f"{kind}: {_first(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ModelError(
            f"{where}: does not fit {model.name}; {'; '.join(problems)}. Give the --model that these weights"
            " belong to, or other --weights"
        )
    broken = [n for n, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ModelError(
            f"{where}: expected finite numbers, found NaN or infinity in {_first(broken)};"
            " these weights come from a failed training: give others"
        )
    network.load_state_dict(found, strict=False)


def _without_head(model: ModelSource, state: State) -> dict[str, torch.Tensor]:
    kept = (name for name in state if model.head is None or not name.startswith(f"{model.head}."))
    return {name: state[name] for name in kept}


def _first(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
