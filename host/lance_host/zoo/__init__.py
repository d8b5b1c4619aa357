"""Networks that come with lance-host, one family a file, and the table of them all."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from lance_edge.errors import ModelError
from lance_edge.manifest import Preprocessing
from lance_host.zoo.mcunet import build_mcunet

PUBLISHED_BASE = "https://hanlab18.mit.edu/projects/tinyml/mcunet/release"


@dataclass(frozen=True)
class ZooModel:
    """A network and where its published weights are.

    `build(classes)` makes it with PyTorch's default initialisation.  `head` is the module that is
    replaced for the user's classes.  `published_file` below the base address has the SHA-256
    `published_sha256`, or `None` where it is not known.  `bundled` is a file of
    `lance_host/checkpoints`.
    """

    name: str
    resolution: int
    preprocessing: Preprocessing
    build: Callable[[int], nn.Module]
    head: str
    published_file: str
    published_sha256: str | None
    bundled: str | None

    @property
    def published_url(self) -> str:
        """Where its authors publish the weights."""
        return f"{PUBLISHED_BASE}/{self.published_file}"


def _mcunet(name: str, resolution: int, file: str, sha256: str | None, bundled: str | None = None) -> ZooModel:
    return ZooModel(
        name=name,
        resolution=resolution,
        preprocessing=Preprocessing(
            resolution=resolution,
            resize=int(resolution * 256 / 224),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        build=functools.partial(build_mcunet, name),
        head="classifier.linear",
        published_file=file,
        published_sha256=sha256,
        bundled=bundled,
    )


_MODELS = (
    _mcunet(
        "mcunet",
        160,
        "mcunet-256kb-1mb_imagenet.pth",
        "63565b5773a8aa70d75baf5a349f5f384da649804c48a5e7af1f655460158c7d",
        bundled="mcunet_cifar10.safetensors",
    ),
    _mcunet(
        "mcunet-320kb",
        176,
        "mcunet-320kb-1mb_imagenet.pth",
        "c0d4ccf4bb8ba93ef69a609c60ca053be2c6bab3b4ece19d9b7e66cec8a485e5",
    ),
    _mcunet("mcunet-512kb", 160, "mcunet-512kb-2mb_imagenet.pth", None),
    _mcunet(
        "mcunet-10fps-vww",
        64,
        "mcunet-10fps_vww.pth",
        "9b5ade214cdc0aeec3919f63e9709603f86bc99af101a749e7b9ec2f6c956c0c",
    ),
    _mcunet(
        "mcunet-5fps-vww",
        80,
        "mcunet-5fps_vww.pth",
        "429dc5baa914d29df19bab6182ac8aeb0c791454a71310ec86f504ad07e0b9d6",
    ),
    _mcunet(
        "proxyless-w0.3",
        176,
        "proxyless-w0.3-r176_imagenet.pth",
        "5c94b02905bff62a4b1c11454b32e90d5c3e355d576aedf48257e2393de18d20",
    ),
)

ZOO: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _MODELS})


def zoo_model(name: str) -> ZooModel:
    """The entry called `name`.

    Raises:
        ModelError: if there is none; the message lists those there are.
    """
    if name not in ZOO:
        raise ModelError(f"--model {name}: no such network; lance-host knows {', '.join(ZOO)}")
    return ZOO[name]
