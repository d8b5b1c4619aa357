"""Which images calibrate, and spectra of a micro network against the same network in numpy."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lance_edge.errors import DataError, LanceError, ModelError, NumericalError
from lance_host import calibrate
from lance_host.calibrate import calibration_batches, choose_batch_size, layer_spectra
from lance_host.hosvd import ModeCovariances

SIDE = 4
MIX = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32)  # a 1x1 convolution
TAPS = {"first": "mixed", "second": "rectified", "third": "rectified"}
SHAPES = dict.fromkeys(TAPS, (6, SIDE, SIDE))


def model() -> bytes:
    """images [N, 3, 4, 4] -> mixed [N, 6, 4, 4] -> rectified."""
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "w"], ["mixed"]),
            helper.make_node("Relu", ["mixed"], ["rectified"]),
        ],
        "micro",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 6, SIDE, SIDE])
            for name in ("mixed", "rectified")
        ],
        [numpy_helper.from_array(MIX[:, :, None, None], "w")],
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def images(number: int, batch_size: int) -> Iterator[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    for _ in range(number):
        yield rng.standard_normal((batch_size, 3, SIDE, SIDE)).astype(np.float32)


def ignore(done: int) -> None:
    pass


# --- spectra


@pytest.mark.parametrize("batch_size", [5, 32, 70])  # less than a chunk, exactly one, and two and a rest
def test_spectra_are_those_of_the_network_in_numpy(batch_size: int) -> None:
    spectra = layer_spectra(model(), TAPS, SHAPES, images(3, batch_size), batch_size, 1, ignore)
    expected = {name: ModeCovariances((batch_size, 6, SIDE, SIDE)) for name in ("mixed", "rectified")}
    for batch in images(3, batch_size):
        mixed = np.einsum("oc,nchw->nohw", MIX, batch)
        expected["mixed"].add(mixed)
        expected["rectified"].add(np.maximum(mixed, 0))
    assert list(spectra) == list(TAPS)
    for layer, tensor in TAPS.items():
        for ours, theirs in zip(spectra[layer], expected[tensor].spectra(), strict=True):
            scale = theirs.eigenvalues[0]
            np.testing.assert_allclose(ours.eigenvalues, theirs.eigenvalues, atol=1e-5 * scale)


def test_layers_that_share_an_input_share_its_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(calibrate, "ModeCovariances", lambda s: made.append(s) or ModeCovariances(s))
    spectra = layer_spectra(model(), TAPS, SHAPES, images(1, 4), 4, 1, ignore)
    assert spectra["second"] is spectra["third"]
    assert len(made) == 2


def test_chunks_are_at_most_32_images(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []

    class Spy:
        def __init__(self, data: bytes, threads: int) -> None:
            self.session = real(data, threads)

        def get_outputs(self) -> object:
            return self.session.get_outputs()

        def run(self, names: list[str], feeds: dict[str, NDArray[np.float32]]) -> object:
            fed.append(len(feeds["images"]))
            return self.session.run(names, feeds)

    real = calibrate.open_session
    monkeypatch.setattr(calibrate, "open_session", Spy)
    layer_spectra(model(), TAPS, SHAPES, images(2, 70), 70, 1, ignore)
    assert fed == [32, 32, 6] * 2


def test_a_tap_may_be_the_images_themselves() -> None:
    """The first convolution of a network reads the images; as an output they have their own name."""
    proto = onnx.load_from_string(model())
    proto.graph.output.append(helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, SIDE, SIDE]))
    spectra = layer_spectra(
        proto.SerializeToString(), {"stem": "images"}, {"stem": (3, SIDE, SIDE)}, images(2, 8), 8, 1, ignore
    )
    expected = ModeCovariances((8, 3, SIDE, SIDE))
    for batch in images(2, 8):
        expected.add(batch)
    np.testing.assert_allclose(spectra["stem"][1].eigenvalues, expected.spectra()[1].eigenvalues)


def test_progress_counts_the_batches_done() -> None:
    seen: list[int] = []
    layer_spectra(model(), TAPS, SHAPES, images(3, 4), 4, 1, seen.append)
    assert seen == [1, 2, 3]


def test_the_same_images_give_the_same_bytes() -> None:
    first, second = (layer_spectra(model(), TAPS, SHAPES, images(3, 8), 8, 1, ignore) for _ in range(2))
    for layer in TAPS:
        for one, other in zip(first[layer], second[layer], strict=True):
            assert one.projection(2).tobytes() == other.projection(2).tobytes()


def test_memory_does_not_follow_the_number_of_batches() -> None:
    def peak(number: int) -> int:
        tracemalloc.start()
        layer_spectra(model(), TAPS, SHAPES, images(number, 32), 32, 1, ignore)
        _, bytes_ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return bytes_

    peak(1)  # first use of the runtime
    assert peak(40) <= peak(3) + 16384  # one batch's taps are 24 kB


def test_says_which_output_the_model_lacks() -> None:
    with pytest.raises(ModelError, match=r"input of b: .* output 'gone', found mixed, rectified; export"):
        layer_spectra(model(), {"b": "gone"}, {"b": (6, 4, 4)}, images(1, 4), 4, 1, ignore)


def test_says_which_layer_has_another_shape() -> None:
    with pytest.raises(
        ModelError, match=r"input of b: expected shape \(6, 5, 5\) per image, found \(6, 4, 4\)"
    ):
        layer_spectra(model(), {"b": "mixed"}, {"b": (6, 5, 5)}, images(1, 4), 4, 1, ignore)


def test_refuses_a_short_batch() -> None:
    with pytest.raises(DataError, match="calibration batch 1: expected 8 images, found 4"):
        layer_spectra(model(), TAPS, SHAPES, images(1, 4), 8, 1, ignore)


def test_refuses_no_batches_at_all() -> None:
    with pytest.raises(DataError, match="expected at least one full batch of images, found none; add images"):
        layer_spectra(model(), TAPS, SHAPES, [], 8, 1, ignore)


def test_says_where_the_network_is_not_finite() -> None:
    batch = np.full((4, 3, SIDE, SIDE), np.nan, np.float32)
    with pytest.raises(NumericalError, match=r"batch 1, input of first: .* found NaN or infinity; check the"):
        layer_spectra(model(), TAPS, SHAPES, [batch], 4, 1, ignore)


# --- batch size


@pytest.mark.parametrize(
    ("train_images", "expected"),
    [(2, 1), (3, 1), (4, 2), (60, 16), (63, 16), (64, 32), (255, 64), (256, 128), (50_000, 128)],
)
def test_default_batch_size_fills_two_batches(train_images: int, expected: int) -> None:
    assert choose_batch_size(train_images, None) == expected


def test_default_is_the_largest_such_power_of_two() -> None:
    for train_images in range(2, 600):
        fitting = [1 << k for k in range(8) if 2 << k <= train_images]
        assert choose_batch_size(train_images, None) == max(fitting)


@pytest.mark.parametrize("requested", [1, 50, 60])
def test_a_request_is_kept(requested: int) -> None:
    assert choose_batch_size(60, requested) == requested


def test_refuses_a_batch_larger_than_the_data() -> None:
    with pytest.raises(DataError, match="at most the 60 training images, found 61; ask for 16 or add images"):
        choose_batch_size(60, 61)


def test_refuses_an_empty_batch() -> None:
    with pytest.raises(DataError, match="batch size: expected at least 1, found 0"):
        choose_batch_size(60, 0)


@pytest.mark.parametrize("train_images", [0, 1])
def test_refuses_a_single_image(train_images: int) -> None:
    with pytest.raises(DataError, match=f"training images: expected at least 2, found {train_images}; add"):
        choose_batch_size(train_images, None)


# --- calibration batches


@pytest.mark.parametrize(
    ("train_images", "batch_size", "requested", "number"),
    [(60, 16, 100, 3), (64, 16, 100, 4), (1000, 10, 7, 7), (16, 16, 1, 1)],
)
def test_batches_are_full_and_no_image_comes_twice(
    train_images: int, batch_size: int, requested: int, number: int
) -> None:
    batches = calibration_batches(train_images, batch_size, requested, seed=0)
    assert batches.shape == (number, batch_size)
    assert len(np.unique(batches)) == batches.size
    assert batches.min() >= 0
    assert batches.max() < train_images


def test_the_seed_decides_the_order() -> None:
    first, again, other = (calibration_batches(60, 16, 3, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_fewer_batches_are_the_first_of_more() -> None:
    assert np.array_equal(calibration_batches(60, 16, 3, 0)[:2], calibration_batches(60, 16, 2, 0))


def test_refuses_no_calibration_batches() -> None:
    with pytest.raises(LanceError, match="calibration batches: expected at least 1, found 0; the usual"):
        calibration_batches(60, 16, 0, seed=0)


@pytest.mark.parametrize("batch_size", [0, 61])
def test_refuses_batches_that_do_not_fit(batch_size: int) -> None:
    with pytest.raises(DataError, match=f"from 1 to the 60 training images, found {batch_size}; ask for"):
        calibration_batches(60, batch_size, 1, seed=0)
