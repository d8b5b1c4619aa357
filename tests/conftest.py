"""For all tests: the folder of optional large files, generated photographs, and what is made of them.

Makes the host tests' helpers importable.  Whatever takes seconds is made once, for all workers of xdist.
"""

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "host"))

CLASSES = ("disc", "square", "stripes")
PHOTOS_PER_CLASS = 20
MODEL, RESOLUTION = "mcunet-10fps-vww", 96  # the smallest network, with maps of 3 x 3 at its end
RESIZE = RESOLUTION * 256 // 224


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published checkpoints and photographs; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("LANCE_SHARED", TESTS.parent.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set LANCE_SHARED to the folder that holds weights/ and data/")
    return folder


MadeOnce = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)`: a folder that `make` fills for the first worker that asks; others wait."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        with (root / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of 20 images: a red disc, a green square, blue stripes on a noisy ground.

    JPEG of several shapes; in each class one is stored lying on its side, and one is a greyscale PNG.
    The short side is what the network resizes to: no pixel is interpolated, so that two implementations
    agree on every one of them, and gradients can be compared to rounding.
    """
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(PHOTOS_PER_CLASS):
            image = _photo(name, rng)
            path = root / name / f"{name}{number:02}.jpg"
            if number == 3:
                image.convert("L").save(path.with_suffix(".png"))
            elif number == 5:
                exif = Image.Exif()
                exif[0x0112] = 6  # orientation: turn clockwise to see it upright
                image.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)
            else:
                image.save(path, quality=95)
    return root


def _photo(name: str, rng: np.random.Generator) -> Image.Image:
    long = int(rng.integers(RESIZE, 2 * RESIZE))
    width, height = (long, RESIZE) if rng.integers(2) else (RESIZE, long)
    image = Image.fromarray(rng.integers(60, 200, (height, width, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    x, y = int(width * rng.uniform(0.35, 0.65)), int(height * rng.uniform(0.35, 0.65))
    size = int(min(width, height) * rng.uniform(0.25, 0.4))
    bright = int(rng.integers(180, 255))
    if name == "disc":
        draw.ellipse((x - size, y - size, x + size, y + size), fill=(bright, 30, 30))
    elif name == "square":
        draw.rectangle((x - size, y - size, x + size, y + size), fill=(30, bright, 30))
    else:
        for offset in range(-size, size, 8):
            draw.rectangle((x + offset, y - size, x + offset + 3, y + size), fill=(30, 30, bright))
    return image


@pytest.fixture(scope="session")
def operators_read_once() -> Iterator[None]:
    """PyTorch's exporter reads the source of its 500 operators at every call: two thirds of a small export.

    Our exports add none to them, so that one process can keep what it read.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        kept = functools.cache(ONNXRegistry.from_torchlib)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(kept))
        yield


@pytest.fixture(scope="session")
def lance_host(operators_read_once: None) -> Callable[..., Result]:
    """Run `lance-host` in this process."""

    def run(*words: Any) -> Result:
        from lance_host.cli import cli

        return CliRunner().invoke(cli, [str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def lance_device() -> Callable[..., Result]:
    """Run `lance-device` in this process; it must end well."""

    def run(*words: Any) -> Result:
        from lance_device.cli import main

        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, (result.output, result.exception)
        return result

    return run


@pytest.fixture(scope="session")
def spawn_host() -> Callable[..., subprocess.Popen[str]]:
    """Start `lance-host` in a process of its own, by its entry point."""

    def spawn(*words: Any, **environment: str) -> subprocess.Popen[str]:
        # A test run in the background of a shell ignores Ctrl-C, and would hand that on.
        start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{start}; from lance_host.entry import main; main()"
        command = [sys.executable, "-c", code, *map(str, words)]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    return spawn


@pytest.fixture(scope="session")
def start_weights(photos: Path, made_once: MadeOnce) -> Path:
    """Random weights through which images survive: batch-norm has the statistics of the photographs.

    A plainly random network of this depth gives features near zero; nothing could be seen in its gradients.
    """

    def make(folder: Path) -> None:
        import torch

        torch.save(_network_for(photos).state_dict(), folder / "start.pth")

    return made_once("weights", make) / "start.pth"


def _network_for(photos: Path) -> Any:
    import torch

    from lance_host.zoo import ZOO

    # With this seed no unit of the trained layers is within 2e-5 of a kink of its ReLU6 on the first batch:
    # one that lies on a kink would let rounding decide whether it has a gradient.
    torch.manual_seed(6)
    network = ZOO[MODEL].build(len(CLASSES)).train()
    pixels = [
        np.asarray(Image.open(path).convert("RGB").resize((RESOLUTION, RESOLUTION)))
        for path in sorted(photos.rglob("*.jpg"))[::2]
    ]
    images = np.stack(pixels).transpose(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # running statistics are those of the one batch below
                module.weight.uniform_(0.7, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        network(torch.from_numpy(images.astype(np.float32)))
    return network


@pytest.fixture(scope="session")
def calibrate_words(photos: Path, start_weights: Path) -> Sequence[Any]:
    """The command line of `photo_package`, but its output."""
    return (
        "calibrate",
        *("--model", MODEL, "--resolution", RESOLUTION, "--weights", start_weights),
        *("--data", photos, "--threads", 1, "--layers", 4),
    )


@pytest.fixture(scope="session")
def twin_packages(
    calibrate_words: Sequence[Any], spawn_host: Callable[..., subprocess.Popen[str]], made_once: MadeOnce
) -> tuple[Path, Path]:
    """The same command in two processes that order sets differently."""
    names = ("first.tar", "second.tar")

    def make(folder: Path) -> None:
        processes = [
            spawn_host(*calibrate_words, "-o", folder / name, PYTHONHASHSEED=str(seed))
            for seed, name in enumerate(names, 1)
        ]
        for process in processes:
            _, errors = process.communicate(timeout=500)
            assert process.returncode == 0, errors

    folder = made_once("packages", make)
    return folder / names[0], folder / names[1]


@pytest.fixture(scope="session")
def photo_package(twin_packages: tuple[Path, Path]) -> Path:
    """A package for the photographs: lance and bp, 4 layers, batches of 16."""
    return twin_packages[0]


@pytest.fixture(scope="session")
def trained(
    photo_package: Path, photos: Path, lance_device: Callable[..., Result], made_once: MadeOnce
) -> dict[str, Path]:
    """A run of six epochs for each method."""

    def make(folder: Path) -> None:
        for method in ("lance", "bp"):
            lance_device(
                *("train", "--artifact", photo_package, "--data", photos, "--out", folder / method),
                *("--method", method, "--epochs", 6, "--threads", 1),
            )

    folder = made_once("runs", make)
    return {method: folder / method for method in ("lance", "bp")}
