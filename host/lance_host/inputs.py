"""What a network takes: as its source says, or as the user does."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import nn

from lance_edge.errors import LanceError, ModelError
from lance_edge.input_spec import INTERPOLATIONS, ArrayInput, InputSpec, Preprocessing
from lance_host.model_source import ModelSource

LEAST_INPUT_SIZE = 32  # pixels; usual networks halve them five times
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_GREY_MEAN, IMAGENET_GREY_STD = (0.449,), (0.226,)  # the means of the above
USUAL_SIZE = 224


@dataclass(frozen=True)
class InputRequest:
    """What the user says about the input; `None` leaves it to the model."""

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None


def resize_for(resolution: int) -> int:
    """The short side that images are resized to before the crop: 256 for 224, as in the usual recipe."""
    return resolution * 256 // 224


def check_input(request: InputRequest) -> None:
    """Refuse what no network can take.

    Raises:
        LanceError: naming the option.
    """
    if request.size is not None and request.size < LEAST_INPUT_SIZE:
        raise LanceError(f"--input-size: expected {LEAST_INPUT_SIZE} or more, found {request.size}")
    for option, values in (("--mean", request.mean), ("--std", request.std)):
        if values is not None and len(values) not in (1, 3):
            raise LanceError(
                f"{option}: expected one number or three, found {len(values)}; they are per channel"
            )
    if request.std is not None and min(request.std) <= 0:
        raise LanceError(f"--std: expected numbers above 0, found {min(request.std):g}")
    if request.interpolation is not None and request.interpolation not in INTERPOLATIONS:
        raise LanceError(
            f"--interpolation: expected one of {', '.join(INTERPOLATIONS)}, found {request.interpolation}"
        )


def settle_input(
    source: ModelSource,
    network: nn.Module,
    request: InputRequest,
    array_shape: tuple[int, ...] | None,
    say: Callable[[str], None],
) -> InputSpec:
    """What becomes of the user's data before the network.

    Args:
        array_shape: of the user's float32 arrays, which stay as they are; `None` for images.  Of their
            preprocessing, what nobody says is ImageNet's, and is said aloud.

    Raises:
        LanceError: if mean or std have another number of channels than the network, or the data are arrays.
    """
    if array_shape is not None:
        _expect_nothing(request)
        return ArrayInput(array_shape)
    known = source.preprocessing
    steps = known or _assumed(source, network)
    if request.size is not None:
        steps = replace(steps, resolution=request.size, resize=resize_for(request.size))
    channels = len(steps.mean)
    steps = replace(
        steps,
        mean=_per_channel("--mean", request.mean or steps.mean, channels),
        std=_per_channel("--std", request.std or steps.std, channels),
        interpolation=request.interpolation or steps.interpolation,
    )
    size = request.size or source.input_shape
    if known is None and None in (size, request.mean, request.std):
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (steps.mean, steps.std))
        say(
            f"input: {channels} x {steps.resolution} x {steps.resolution}, mean {mean}, std {std}; the model"
            " does not say: check them, and correct them with --input-size, --mean, --std"
        )
    return steps


def _expect_nothing(request: InputRequest) -> None:
    given = [field.name for field in fields(request) if getattr(request, field.name) is not None]
    if given:
        option = "--input-size" if given[0] == "size" else f"--{given[0]}"
        raise LanceError(
            f"{option}: --data holds float32 arrays, which go to the network unchanged; leave it out"
        )


def usual_preprocessing(channels: int, size: int = USUAL_SIZE) -> Preprocessing:
    """ImageNet's; of grey images where there is one channel."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (IMAGENET_GREY_MEAN, IMAGENET_GREY_STD)
    return Preprocessing(resolution=size, resize=resize_for(size), mean=mean, std=std)


def _assumed(source: ModelSource, network: nn.Module) -> Preprocessing:
    shape = source.input_shape
    if shape is None:
        return usual_preprocessing(input_channels(network))
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ModelError(
            f"--model {source.name}: takes {list(shape)}, which are no square images of one or three channels;"
            " give float32 arrays of that shape as --data FILE.npz"
        )
    return usual_preprocessing(shape[0], shape[1])


def input_channels(network: nn.Module) -> int:
    """1 where the first convolution reads one channel, else 3."""
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    first = next(convolutions, None)
    return 1 if first is not None and first.in_channels == 1 else 3


def _per_channel(option: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        raise LanceError(
            f"{option}: the network reads {channels} channel, found {len(values)} numbers; give one"
        )
    return values
