"""Preprocessing: what the model says, what the user says, and what is assumed aloud."""

import pytest
from torch import nn

from lance_edge.errors import LanceError, ModelError
from lance_edge.input_spec import Preprocessing
from lance_host.inputs import InputRequest, check_input, settle_input
from lance_host.model_source import ModelSource

KNOWN = Preprocessing(160, 182, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")
COLOUR, GREY = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(1, 4, 3))


def settled(known, network, shape=None, arrays=None, **request):
    said = []
    source = ModelSource("net", lambda classes: network, preprocessing=known, input_shape=shape)
    return settle_input(source, network, InputRequest(**request), arrays, said.append), said


def test_a_source_that_says_the_shape_alone():
    steps, (line,) = settled(None, COLOUR, shape=(3, 96, 96))
    assert (steps.sample_shape, steps.resize) == ((3, 96, 96), 109)
    assert line.startswith("input: 3 x 96 x 96, mean 0.485")
    assert settled(None, COLOUR, shape=(3, 96, 96), mean=(0.5,), std=(0.5,))[1] == []


@pytest.mark.parametrize("shape", [(40, 100), (3, 96, 64), (4, 96, 96)])
def test_a_shape_that_is_no_square_image(shape):
    with pytest.raises(
        ModelError, match=r"net: takes \[.*\], which are no square images .* give float32 arrays"
    ):
        settled(None, COLOUR, shape=shape)


def test_a_model_that_says_everything_is_believed():
    assert settled(KNOWN, COLOUR) == (KNOWN, [])


def test_the_user_wins():
    steps, said = settled(KNOWN, COLOUR, size=96, mean=(0.1, 0.2, 0.3), std=(0.4,), interpolation="nearest")
    assert steps == Preprocessing(96, 109, (0.1, 0.2, 0.3), (0.4, 0.4, 0.4), "nearest")
    assert not said


def test_what_nobody_says_is_imagenets_and_said_aloud():
    steps, (line,) = settled(None, COLOUR)
    assert steps == Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert line == (
        "input: 3 x 224 x 224, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225; the model does not say:"
        " check them, and correct them with --input-size, --mean, --std"
    )


def test_a_network_of_one_channel_reads_grey_images():
    steps, (line,) = settled(None, GREY, size=32)
    assert steps.sample_shape == (1, 32, 32)
    assert line.startswith("input: 1 x 32 x 32, mean 0.449, std 0.226; ")
    assert settled(None, GREY, size=32, mean=(0.1,), std=(0.3,))[1] == []


def test_three_means_for_one_channel():
    with pytest.raises(LanceError, match=r"--mean: the network reads 1 channel, found 3 numbers; give one"):
        settled(None, GREY, mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"size": 31}, "--input-size: expected 32 or more, found 31"),
        ({"mean": (0.1, 0.2)}, "--mean: expected one number or three, found 2; they are per channel"),
        ({"std": ()}, "--std: expected one number or three, found 0; they are per channel"),
        ({"std": (0.1, 0.0, 0.2)}, "--std: expected numbers above 0, found 0"),
        (
            {"interpolation": "area"},
            "--interpolation: expected one of bilinear, bicubic, lanczos, nearest, found area",
        ),
    ],
)
def test_what_no_network_takes(request_, message):
    with pytest.raises(LanceError, match=message):
        check_input(InputRequest(**request_))
