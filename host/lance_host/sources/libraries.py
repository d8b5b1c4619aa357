"""Networks of torchvision and timm, where they are installed.

Neither is needed by lance-host, so neither is imported before the user asks for it.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch

from lance_edge.errors import ModelError, PlatformError
from lance_edge.input_spec import INTERPOLATIONS, Preprocessing
from lance_host.model_source import OTHER_WEIGHTS, ModelSource, ProvidedWeights
from lance_host.text import one_line

STAND_IN = "bilinear"  # where images are resized in a way that pillow has not, or that is drawn at random


def torchvision_source(text: str) -> ModelSource:
    """`torchvision:NAME` with the library's default weights and their transforms.

    Raises:
        PlatformError: if torchvision is not installed, or does not load.
        ModelError: if it has no such classifier.
    """
    name = text.partition(":")[2]
    models = _library("torchvision.models", "torchvision", text)
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"--model {text}: torchvision has no such network; it has {_some(name, known)}")
    weights = models.get_model_weights(name).DEFAULT
    return ModelSource(
        name=text,
        build=lambda classes: models.get_model(name, weights=None, **_pretrained_arguments(name, weights)),
        preprocessing=_torchvision_preprocessing(weights.transforms()),
        note=_interpolation_note(text, weights.transforms().interpolation.value),
        provided=functools.partial(_provide, text, lambda: weights.get_state_dict(check_hash=True)),
    )


def _pretrained_arguments(name: str, weights: Any) -> dict[str, Any]:
    """What torchvision's builders set when they load the weights themselves: no state dict holds it."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True}  # trained with another mean and std than the transforms say
    if name.startswith("vit_"):
        return {"image_size": int(weights.transforms().crop_size[0])}  # the number of positions follows from it
    return {}


def timm_source(text: str) -> ModelSource:
    """`timm:NAME` with the library's pretrained weights and their configuration.

    Raises:
        PlatformError: if timm is not installed, or does not load.
        ModelError: if it has no such network.
    """
    name = text.partition(":")[2]
    timm = _library("timm", "timm", text)
    if not timm.is_model(name):
        known = timm.list_models(f"*{name[:6]}*") or timm.list_models()
        raise ModelError(f"--model {text}: timm has no such network; it has {_some(name, known)}")
    config = timm.models.get_pretrained_cfg(name)
    head = getattr(config, "classifier", None)
    return ModelSource(
        name=text,
        build=lambda classes: timm.create_model(name, pretrained=False, num_classes=classes),
        preprocessing=_timm_preprocessing(config),
        note="" if config is None else _interpolation_note(text, config.interpolation),
        head=head if isinstance(head, str) else None,
        provided=functools.partial(
            _provide, text, lambda: timm.create_model(name, pretrained=True).state_dict()
        ),
    )


def _library(module: str, package: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise PlatformError(
            f"--model {text}: {missing} is not installed; install it with: pip install {package}"
        ) from None
    except Exception as error:  # a library built for another version of torch fails in many ways
        raise PlatformError(
            f"--model {text}: {package} does not load beside torch {torch.__version__} ({one_line(error)});"
            f" install versions that belong together: pip install --upgrade torch {package}"
        ) from None


def _provide(text: str, load: Any) -> ProvidedWeights:
    try:
        state = load()
    except Exception as error:  # offline, a damaged cache, no weights for this network
        raise ModelError(
            f"--model {text}: its weights cannot be had ({one_line(error)}); {OTHER_WEIGHTS}"
        ) from None
    return ProvidedWeights(dict(state), f"default of {text}")


def _torchvision_preprocessing(transforms: Any) -> Preprocessing:
    return Preprocessing(
        resolution=int(transforms.crop_size[0]),
        resize=int(transforms.resize_size[0]),
        mean=tuple(map(float, transforms.mean)),
        std=tuple(map(float, transforms.std)),
        interpolation=_interpolation(transforms.interpolation.value),
    )


def _timm_preprocessing(config: Any) -> Preprocessing | None:
    if config is None:
        return None
    resolution = int(config.input_size[-1])
    return Preprocessing(
        resolution=resolution,
        resize=math.floor(resolution / config.crop_pct),
        mean=tuple(map(float, config.mean)),
        std=tuple(map(float, config.std)),
        interpolation=_interpolation(config.interpolation),
    )


def _interpolation(name: str) -> str:
    return name if name in INTERPOLATIONS else STAND_IN


def _interpolation_note(text: str, name: str) -> str:
    """What is to be said of it; nothing where images are resized as the library does."""
    if name in INTERPOLATIONS:
        return ""
    return (
        f"--model {text}: resizes images by {name}, which is not known here: {STAND_IN} stands in; choose"
        " another with --interpolation"
    )


def _some(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    return ", ".join(close)
