"""What the comparison works on: photographs, a package of all methods, the network for inference."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lance_edge.bundle import Bundle
from lance_edge.datasets import LEAST_FOR_VALIDATION
from lance_edge.errors import LanceError
from lance_edge.input_spec import Split
from lance_edge.names import WEIGHTS_MEMBER

Say = Callable[[str], None]

CLASSES = tuple(f"crop{number}" for number in range(10))
PHOTO_SIDE = (200, 160)  # pixels of a stored photograph, width and height
BATCHES = 4  # of calibration, all different images
SPLIT = Split(seed=0, test_fraction=0.25, validation_fraction=0.1)  # of a new package


@dataclass(frozen=True)
class Material:
    """Files that every contender reads."""

    package: Path
    photos: Path
    model: Path


@dataclass(frozen=True)
class Recipe:
    """How to make them; `artifact` is a package to use instead of a new one."""

    model: str = "mcunet"
    weights: str = "bundled"
    layers: tuple[int, ...] = (2, 4)
    methods: tuple[str, ...] = ("lance", "bp", "asi", "hosvd")
    batch_size: int = 128
    resolution: int | None = None
    threads: int = 1
    artifact: Path | None = None


def make_material(recipe: Recipe, folder: Path, say: Say) -> Material:
    """Write photographs, package and inference model into a folder.

    Raises:
        LanceError: if a package cannot be made or read.
    """
    photos, model = folder / "photos", folder / "inference.onnx"
    if recipe.artifact is None:
        package, classes, batch_size, split = folder / "pkg.tar", CLASSES, recipe.batch_size, SPLIT
    else:
        with Bundle(recipe.artifact) as bundle:
            manifest = bundle.manifest
        package, classes, batch_size = recipe.artifact, manifest.classes, manifest.batch_size
        split = manifest.split
    write_photos(photos, classes, photos_per_class(batch_size, len(classes), split))
    if recipe.artifact is None:
        _make_package(recipe, photos, package, say)
    model.write_bytes(inference_model(package))
    return Material(package, photos, model)


def photos_per_class(batch_size: int, classes: int, split: Split) -> int:
    """The least number that leaves training images for all batches of a calibration; see `datasets.py`."""
    needed = -(-batch_size * BATCHES // classes)
    number = needed + 1  # one to test on
    while _training_images(number, split) < needed:
        number += 1
    return number


def _training_images(number: int, split: Split) -> int:
    """Of so many of a class, those that are neither for testing nor for validation."""
    rest = number - max(1, round(split.test_fraction * number))
    return rest - max(round(split.validation_fraction * rest), int(rest >= LEAST_FOR_VALIDATION))


def write_photos(folder: Path, classes: tuple[str, ...], per_class: int) -> None:
    """JPEG crops, of many sizes, of the two photographs that come with scikit-learn; always the same.

    Ranks follow the images: noise would have other ones than photographs.

    Raises:
        LanceError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise LanceError(
            "benchmarks: needs the sample photographs of scikit-learn, which is not installed;"
            " pip install 'lance-edge[dev]'"
        ) from None
    pictures = [Image.fromarray(np.asarray(picture)) for picture in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        picture = pictures[number % len(pictures)]
        for index in range(per_class):
            crop = picture.crop(_random_box(rng, picture.size)).resize(PHOTO_SIDE, Image.Resampling.BILINEAR)
            crop.save(folder / name / f"{index:03}.jpg", quality=90)


def _random_box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
    share = rng.uniform(0.25, 1)
    width, height = (int(side * share) for side in size)
    left, top = (
        int(rng.integers(0, side - part + 1)) for side, part in zip(size, (width, height), strict=True)
    )
    return left, top, left + width, top + height


def _make_package(recipe: Recipe, photos: Path, package: Path, say: Say) -> None:
    from lance_host.build import calibrate
    from lance_host.request import Feedback, Request

    request = Request(
        model=recipe.model,
        data=photos,
        output=package,
        weights=recipe.weights,
        layers=",".join(map(str, recipe.layers)),
        methods=recipe.methods,
        batches=BATCHES,
        batch_size=recipe.batch_size,
        resolution=recipe.resolution,
        threads=recipe.threads,
        split=SPLIT,
    )
    calibrate(request, Feedback(say, lambda name, done, total: None))


def inference_model(package: Path) -> bytes:
    """The network of a package from images to logits, batch-norm folded, all weights constant.

    Raises:
        ArtifactError: if the package cannot be read.
        ModelError: if its network is none of lance-host's own.
    """
    from benchmarks.torch_network import load_network
    from lance_host.capture import capture_layers, export
    from lance_host.compile import serialise
    from lance_host.shapes import infer_specs
    from lance_host.stages import extract

    with Bundle(package) as bundle:
        manifest, arrays = bundle.manifest, bundle.arrays(WEIGHTS_MEMBER)
        weights = {name: arrays[name] for name in arrays}
    network = load_network(manifest, weights, ())
    captured = capture_layers(export(network, manifest.preprocessing.sample_shape), (), None)
    model = extract(captured.model, [captured.images], [captured.logits], infer_specs(captured.model))
    return serialise(model, "inference")
