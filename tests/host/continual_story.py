"""The story that tests of continual learning look into: two tasks through the whole path, once for all of them.

Patch mode with a depthwise and a grouped convolution (a basis for each group), and channel mode without.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from continual_tasks import BATCH, CODE, write_tasks

from lance_edge.bundle import Bundle
from lance_edge.checkpoints import read_weights
from lance_edge.manifest import Layer, Manifest
from lance_edge.memory import Memory, read_memory
from lance_edge.names import WEIGHTS_MEMBER

MODES = ("patch", "channel")
FACTORIES = {"patch": "grouped", "channel": "plain"}
EPOCHS = 20


@dataclass(frozen=True)
class Story:
    """What the two tasks left behind; `one.tar`, `run1/`, `memory.npz`, `two.tar`, `run2/` and so on."""

    folder: Path
    mode: str

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @functools.cached_property
    def memory(self) -> Memory:
        return read_memory(self / "memory.npz")

    @functools.cached_property
    def manifest(self) -> Manifest:
        with Bundle(self / "two.tar") as bundle:
            return bundle.manifest

    @functools.cached_property
    def layers(self) -> dict[str, Layer]:
        """All that the first task trained."""
        with Bundle(self / "one.tar") as bundle:
            return {layer.name: layer for layer in bundle.manifest.layers}

    @property
    def trained(self) -> dict[str, Layer]:
        """Those that the second task trains."""
        return {layer.name: layer for layer in self.manifest.layers}

    def weights(self, package: str, run: str | None = None) -> dict[str, np.ndarray]:
        """Those of a package, with what a run made of them."""
        with Bundle(self / f"{package}.tar") as bundle:
            weights = {name: np.array(array) for name, array in bundle.arrays(WEIGHTS_MEMBER).items()}
            return weights | (read_weights(self / run / "last.npz", bundle).weights if run else {})


def accomplished(result: Any) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def story_of(mode: str, made_once: Any, lance_host: Any, lance_device: Any) -> Story:
    """Two tasks learned one after the other; the second also without a memory (`forgetful/`)."""

    def make(folder: Path) -> None:
        one, two = write_tasks(folder)
        (folder / "net.py").write_text(CODE)
        model = ("--model", f"{folder}/net.py:{FACTORIES[mode]}", "--threads", 1)

        def train(package: str, data: Path, run: str, epochs: int, *more: Any) -> None:
            words = ("--out", folder / run, "--epochs", epochs, "--threads", 1, *more)
            lance_device("train", "--artifact", folder / package, "--data", data, *words)

        first = ("--layers", "all", "--methods", "bp", "--batch-size", BATCH, "--data", one)
        accomplished(lance_host("calibrate", *model, *first, "-o", folder / "one.tar"))
        train("one.tar", one, "run1", 12)
        after = ("--checkpoint", folder / "run1/last.npz")
        words = ("--data", one, "--mode", mode, "--threshold", 0.9, "-o", folder / "memory.npz")
        said = accomplished(lance_host("memory", *after, *words))
        (folder / "memory.txt").write_text(said)
        words = ("--memory", folder / "memory.npz", "--mode", mode, "--data", two, "-o", folder / "two.tar")
        said = accomplished(lance_host("calibrate", *model, *after, *words))
        (folder / "two.txt").write_text(said)
        train("two.tar", two, "run2", EPOCHS, "--clip", 1, "--momentum", 0.9)
        words = ("--methods", "bp", "--mode", mode, "--data", two, "-o", folder / "forget.tar")
        accomplished(lance_host("calibrate", *model, *after, *words))
        train("forget.tar", two, "forgetful", EPOCHS, "--clip", 1, "--momentum", 0.9)

    return Story(made_once(f"continual-{mode}", make), mode)
