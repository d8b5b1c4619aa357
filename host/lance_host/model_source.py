"""What `--model` names: a network that can be built, and what is known of it beforehand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lance_edge.input_spec import Preprocessing

State = Mapping[str, torch.Tensor]

OTHER_WEIGHTS = "give a file as --weights FILE, or start from --weights random"


@dataclass(frozen=True)
class Published:
    """A file of weights where its authors publish it.

    `sha256` may be the first digits only (torchvision writes eight into the file's name), or `None`
    where it is not known.
    """

    base: str
    file: str
    sha256: str | None

    @property
    def url(self) -> str:
        """The file's address."""
        return f"{self.base}/{self.file}"


@dataclass(frozen=True)
class ProvidedWeights:
    """Weights that an installed Python package brings; `source` is what the package of `-o` says of them."""

    state: State
    source: str


@dataclass(frozen=True)
class ModelSource:
    """A network of the zoo, of a library or of the user: whatever comes after treats them alike.

    Attributes:
        name: as written after `--model`, without folders of this machine: packages carry it.
        build: classes -> a new network.  Where the number of classes cannot be chosen, it is ignored.
        build_for_arrays: the network for float32 arrays, where it is not the one for images.
        preprocessing: what the network was trained with; `None` where nobody says.
        input_shape: of one sample, where the source says that and no more.
        head: module that is replaced for the user's classes; `None`: the one that gives the logits.
        note: what is to be said of its preprocessing.
        published, bundled, provided: where weights are found unless the user names some; `bundled` is a
            file of `lance_host/checkpoints`.  Without any of them `build` gives a network with weights.
    """

    name: str
    build: Callable[[int], nn.Module]
    preprocessing: Preprocessing | None = None
    input_shape: tuple[int, ...] | None = None
    head: str | None = None
    published: Published | None = None
    bundled: str | None = None
    provided: Callable[[], ProvidedWeights] | None = None
    build_for_arrays: Callable[[int], nn.Module] | None = None
    note: str = ""

    def for_arrays(self) -> "ModelSource":
        """The source of the network that takes float32 arrays unchanged."""
        return self if self.build_for_arrays is None else replace(self, build=self.build_for_arrays)
