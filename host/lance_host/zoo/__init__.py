"""Networks that come with lance-host, one family a file, and the table of them all."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from lance_edge.input_spec import Preprocessing
from lance_host.inputs import resize_for, usual_preprocessing
from lance_host.model_source import ModelSource, Published
from lance_host.zoo.continual import ALEXNET_SIDE, ContinualAlexNet, ReducedResNet18
from lance_host.zoo.efficientnet_lite import EfficientNetLite0, installed_weights
from lance_host.zoo.mcunet import build_mcunet
from lance_host.zoo.mobilenet import MobileNetV2
from lance_host.zoo.resnet import build_resnet

MCUNET_BASE = "https://hanlab18.mit.edu/projects/tinyml/mcunet/release"
TORCHVISION_BASE = "https://download.pytorch.org/models"
HALF = (0.5, 0.5, 0.5)
CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)  # of continual-learning benchmarks
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


def _mcunet(
    name: str, resolution: int, file: str, sha256: str | None, bundled: str | None = None
) -> ModelSource:
    return ModelSource(
        name=name,
        build=functools.partial(build_mcunet, name),
        preprocessing=Preprocessing(resolution, resize_for(resolution), mean=HALF, std=HALF),
        head="classifier.linear",
        published=Published(MCUNET_BASE, file, sha256),
        bundled=bundled,
    )


def _torchvision(
    name: str, build: Callable[[int], nn.Module], head: str, file: str, digits: str
) -> ModelSource:
    # torchvision writes the first eight digits of a file's SHA-256 into its name.
    return ModelSource(
        name=name,
        build=build,
        preprocessing=usual_preprocessing(channels=3),
        head=head,
        published=Published(TORCHVISION_BASE, f"{file}-{digits}.pth", digits),
    )


def _efficientnet_lite0() -> ModelSource:
    # TensorFlow's recipe: (x - 127) / 128 of pixels to 255, bicubic.
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    return ModelSource(
        name="efficientnet-lite0",
        build=EfficientNetLite0,
        preprocessing=Preprocessing(224, resize_for(224), mean, std, interpolation="bicubic"),
        head="_fc",
        provided=installed_weights,
    )


def _small(name: str, build: Callable[[int], nn.Module]) -> ModelSource:
    """A network that is trained from nothing, on images that are not resized."""
    steps = Preprocessing(ALEXNET_SIDE, ALEXNET_SIDE, CIFAR_MEAN, CIFAR_STD)
    return ModelSource(name=name, build=build, preprocessing=steps, head="head")


# fmt: off
_MODELS = (
    _mcunet("mcunet", 160, "mcunet-256kb-1mb_imagenet.pth",
            "63565b5773a8aa70d75baf5a349f5f384da649804c48a5e7af1f655460158c7d", "mcunet_cifar10.safetensors"),
    _mcunet("mcunet-320kb", 176, "mcunet-320kb-1mb_imagenet.pth",
            "c0d4ccf4bb8ba93ef69a609c60ca053be2c6bab3b4ece19d9b7e66cec8a485e5"),
    _mcunet("mcunet-512kb", 160, "mcunet-512kb-2mb_imagenet.pth", None),
    _mcunet("mcunet-10fps-vww", 64, "mcunet-10fps_vww.pth",
            "9b5ade214cdc0aeec3919f63e9709603f86bc99af101a749e7b9ec2f6c956c0c"),
    _mcunet("mcunet-5fps-vww", 80, "mcunet-5fps_vww.pth",
            "429dc5baa914d29df19bab6182ac8aeb0c791454a71310ec86f504ad07e0b9d6"),
    _mcunet("proxyless-w0.3", 176, "proxyless-w0.3-r176_imagenet.pth",
            "5c94b02905bff62a4b1c11454b32e90d5c3e355d576aedf48257e2393de18d20"),
    _torchvision("mobilenetv2", MobileNetV2, "classifier.1", "mobilenet_v2", "b0353104"),
    _torchvision("resnet18", functools.partial(build_resnet, "resnet18"), "fc", "resnet18", "f37072fd"),
    _torchvision("resnet34", functools.partial(build_resnet, "resnet34"), "fc", "resnet34", "b627a593"),
    _efficientnet_lite0(),
    _small("alexnet", ContinualAlexNet),
    _small("resnet18-reduced", ReducedResNet18),
)
# fmt: on

ZOO: Mapping[str, ModelSource] = MappingProxyType({model.name: model for model in _MODELS})
