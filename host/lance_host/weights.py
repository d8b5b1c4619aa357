"""Weights of a network of the zoo: from a file, the cache, the network, the bundle, or random.

Reading weights never executes code: `.pth` files go through PyTorch's restricted unpickler.
"""

import hashlib
import http.client
import io
import os
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from lance_edge.errors import ModelError, StorageError
from lance_edge.files import atomic_writer
from lance_host.zoo import PUBLISHED_BASE, ZooModel

CONNECT_TIMEOUT_S = 10.0
MAX_DOWNLOAD_BYTES = 256 * 2**20
OFFLINE_VARIABLE = "LANCE_EDGE_OFFLINE"
RANDOM = "random"
BUNDLED = "bundled"
MANUAL = "download that file on a connected machine and give it as --weights FILE"
SUFFIXES = (".pth", ".pt", ".safetensors")

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0: not known)
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LoadedWeights:
    """Where the weights came from, and what the user should know about it.

    `source` holds no path of this machine: it is written into the package.
    """

    source: str
    note: str | None = None


class _UnreachableError(Exception):
    """The published file could not be fetched; the message is the reason."""


def load_weights(
    model: ZooModel,
    network: nn.Module,
    source: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    base_url: str = PUBLISHED_BASE,
) -> LoadedWeights:
    """Fill `network`, which `model.build` made, in place; its head is always new, and follows from `seed`.

    `source` is a file (.pth, .pt or .safetensors), `"random"`, `"bundled"` (the checkpoint that comes with
    lance-host), or `None`: the published weights from the user's cache or from `base_url`, else bundled.
    `LANCE_EDGE_OFFLINE=1` never connects.

    Raises:
        ModelError: if there are no such weights, or they do not fit the network.
    """
    if source == RANDOM:
        _initialise(network, seed)
        loaded = LoadedWeights(f"random, seed {seed}")
    elif source == BUNDLED:
        loaded = _load_bundled(model, network, "not asked for")
    elif source is not None:
        loaded = _load_file(model, network, Path(source))
    else:
        loaded = _load_published(model, network, progress, f"{base_url}/{model.published_file}")
    _initialise(network.get_submodule(model.head), seed)
    return loaded


def cache_folder() -> Path:
    """`lance-edge` in `$XDG_CACHE_HOME`, by default in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "lance-edge"


def _initialise(module: nn.Module, seed: int) -> None:
    """PyTorch's default initialisation of every layer, without moving the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in module.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()


def _load_file(model: ZooModel, network: nn.Module, path: Path) -> LoadedWeights:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"--weights {path}: cannot read ({error.strerror}); expected a {', '.join(SUFFIXES)} file,"
            f" or '{RANDOM}'"
        ) from None
    _assign(model, network, read_state(data, path.name), path.name)
    return LoadedWeights(f"file: {path.name}, sha256 {hashlib.sha256(data).hexdigest()[:16]}")


def _load_published(model: ZooModel, network: nn.Module, progress: Progress | None, url: str) -> LoadedWeights:
    """From the cache, else from `url`, else the bundled checkpoint."""
    note = None
    try:
        data = _cached(model)
        if data is None:
            data = _download(url, progress)
            _check_hash(model, data, url)
            note = _store(model, data)
    except _UnreachableError as reason:
        return replace(
            _load_bundled(model, network, f"{url}: {reason}"), note=_fallback_note(model, url, reason)
        )
    _assign(model, network, read_state(data, model.published_file), model.published_file)
    return LoadedWeights(f"published: {model.published_file}", note)


def _fallback_note(model: ZooModel, url: str, reason: Exception) -> str:
    return (
        f"warning: no published weights ({url}: {reason}); using {model.bundled}, which comes with lance-host"
        f" and was trained on CIFAR-10's small images only: expect lower accuracy. For the weights trained on"
        f" ImageNet, {MANUAL}"
    )


def _load_bundled(model: ZooModel, network: nn.Module, reason: str) -> LoadedWeights:
    """The checkpoint that comes with lance-host; `reason` says why not the published one."""
    file = resources.files("lance_host") / "checkpoints" / (model.bundled or "none")
    if model.bundled is None or not file.is_file():
        raise ModelError(
            f"{model.name}: no published weights ({reason}), and none come with lance-host;"
            f" {MANUAL}, choose --model mcunet, or start from --weights {RANDOM}"
        )
    _assign(model, network, read_state(file.read_bytes(), model.bundled), model.bundled)
    return LoadedWeights(f"bundled: {model.bundled}")


def _cached(model: ZooModel) -> bytes | None:
    """The published file from the cache; `None` if absent or damaged (then it is fetched again)."""
    try:
        data = (cache_folder() / model.published_file).read_bytes()
    except OSError:
        return None
    return data if _hash_fits(model, data) else None


def _store(model: ZooModel, data: bytes) -> str | None:
    """Keep the download; a cache that cannot be written costs a note, not the run."""
    try:
        with atomic_writer(cache_folder() / model.published_file) as file:
            file.write(data)
    except StorageError as error:
        return f"warning: the weights will be downloaded again next time: {error}"
    return None


def _hash_fits(model: ZooModel, data: bytes) -> bool:
    expected = model.published_sha256
    return expected is None or hashlib.sha256(data).hexdigest() == expected


def _check_hash(model: ZooModel, data: bytes, url: str) -> None:
    if not _hash_fits(model, data):
        raise ModelError(
            f"{url}: expected SHA-256 {model.published_sha256}, found {hashlib.sha256(data).hexdigest()}: not"
            f" the published file, nothing was kept; try again, give a file you trust as --weights FILE,"
            f" or set {OFFLINE_VARIABLE}=1 to stay offline"
        )


def _download(url: str, progress: Progress | None) -> bytes:
    """The whole file at `url`.

    Raises:
        _UnreachableError: if it cannot be had: offline, refused, timed out, cut short, too large.
    """
    if os.environ.get(OFFLINE_VARIABLE, "") not in ("", "0"):
        raise _UnreachableError(f"not tried, {OFFLINE_VARIABLE} is set")
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as response:
            expected = int(response.headers.get("Content-Length") or 0)
            data = bytearray()
            while chunk := response.read(2**16):
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    raise _UnreachableError(f"more than {MAX_DOWNLOAD_BYTES >> 20} MiB")
                if progress is not None:
                    progress(len(data), expected)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _UnreachableError(str(getattr(error, "reason", "") or error) or type(error).__name__) from None
    if expected and len(data) != expected:
        raise _UnreachableError(f"cut short, {len(data)} of {expected} bytes")
    return bytes(data)


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


def _assign(model: ZooModel, network: nn.Module, state: State, where: str) -> None:
    """Copy everything but the head; names and shapes must be exactly those of the network."""
    head = f"{model.head}."
    expected = {name: value for name, value in network.state_dict().items() if not name.startswith(head)}
    found = {name: value for name, value in state.items() if not name.startswith(head)}
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


def _first(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
