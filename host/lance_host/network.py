"""From `--model` to a network that is ready to be captured."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from lance_edge.errors import ModelError
from lance_edge.input_spec import InputSpec
from lance_host.extras import NOTHING_MORE, Extras, norm_modules
from lance_host.heads import FIND, check_classes, choose_head, find_classifier, replace_head
from lance_host.inputs import InputRequest, settle_input
from lance_host.layers import running_layers, select_layers
from lance_host.model_source import ModelSource, ProvidedWeights
from lance_host.published import Progress
from lance_host.selection import single_selections
from lance_host.sources import open_source
from lance_host.text import one_line
from lance_host.weights import load_weights

MANY_CLASSES = 1000  # ImageNet's: what a network is built with where the user's classes are not known

Say = Callable[[str], None]


@dataclass(frozen=True)
class NetworkRequest:
    """Which network, with which weights, and what of it trains."""

    model: str
    weights: str | ProvidedWeights | None = None
    layers: str = "4"
    head: str = FIND
    train_bias: bool = False
    train_norm: bool = False
    input: InputRequest = field(default_factory=InputRequest)
    seed: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class OpenNetwork:
    """A network as its source builds it, in evaluation mode.

    `head` is the module name of the classifier that becomes new, `None` where the old one, `kept`, stays.
    """

    source: ModelSource
    module: torch.nn.Module
    preprocessing: InputSpec
    head: str | None
    kept: str | None


@dataclass(frozen=True)
class Network:
    """A network with its weights and a head for the user's classes.

    `selections` are the module names that train, one selection for each count that was asked for,
    ascending: the last holds all others.  `extras` train beside their weights.  `has_dropout`: training drops
    activations where the network has an `nn.Dropout`.
    """

    module: torch.nn.Module
    name: str
    preprocessing: InputSpec
    weights_source: str
    selections: tuple[tuple[str, ...], ...]
    head: str | None
    extras: Extras = NOTHING_MORE
    has_dropout: bool = False


def load_network(
    request: NetworkRequest,
    classes: int,
    say: Say,
    progress: Progress,
    array_shape: tuple[int, ...] | None = None,
) -> Network:
    """Open the network, fill in weights, make its head new, choose what trains.

    Args:
        array_shape: of the user's float32 arrays; `None` for images.

    Raises:
        ModelError: if there is no such network, or it cannot be used for these classes.
    """
    opened = open_network(request, classes, say, array_shape)
    module, head = opened.module, opened.head
    source = replace(opened.source, head=head)
    loaded = load_weights(source, module, request.weights, request.seed, progress)
    say(f"weights: {loaded.source}")
    if loaded.note:
        say(loaded.note)
    running = running_layers(module, opened.preprocessing.sample_shape)
    selections = tuple(
        tuple(select_layers(module, one, head, opened.kept, among=running))
        for one in single_selections(request.layers)
    )
    if head is None and not selections[0]:
        raise ModelError("--layers 0 --head none: nothing is left to train; ask for layers, or for a new head")
    extras = Extras(request.train_bias, norm_modules(module) if request.train_norm else ())
    return Network(
        module, source.name, opened.preprocessing, loaded.source, selections, head, extras, request.dropout
    )


def open_network(
    request: NetworkRequest, classes: int | None, say: Say, array_shape: tuple[int, ...] | None = None
) -> OpenNetwork:
    """The network as its source builds it, with a head for `classes` if they are known.

    Raises:
        ModelError: if there is no such network, or it does not give one logit for each class.
    """
    source = open_source(request.model)
    source = source if array_shape is None else source.for_arrays()
    module = build(source, classes or MANY_CLASSES, request.seed)
    if source.note and array_shape is None and request.input.interpolation is None:
        say(source.note)
    preprocessing = settle_input(source, module, request.input, array_shape, say)
    shape = preprocessing.sample_shape
    head = choose_head(module, request.head, source.head, shape)
    kept = (source.head or find_classifier(module, shape)) if head is None else None
    if classes is not None:
        if head is not None:
            replace_head(module, head, classes)
        check_classes(module, shape, classes)
    return OpenNetwork(source, module, preprocessing, head, kept)


def build(source: ModelSource, classes: int, seed: int) -> torch.nn.Module:
    """The network as its source makes it, on the CPU in float32; random weights follow from `seed`.

    Every parameter asks for a gradient, also one that the source froze.

    Raises:
        ModelError: if the source's own code fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = source.build(classes)
        except ModelError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise ModelError(
                f"--model {source.name}: building it raised {one_line(error)}; correct it"
            ) from error
    for module in network.modules():
        if getattr(module, "inplace", None) is True:
            setattr(module, "inplace", False)  # noqa: B010 - the first layer would overwrite the user's samples
    network.to("cpu", torch.float32).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # `--layers` says what trains, not the factory
    return network
