"""Float32 arrays as data: an .npz of them, batches that are what the file holds, files to predict on."""

import dataclasses

import numpy as np
import pytest

from lance_edge.arrays import FloatPart, read_arrays
from lance_edge.datasets import ArrayPart, open_dataset
from lance_edge.errors import DataError
from lance_edge.images import load_batch
from lance_edge.input_spec import ArrayInput, Preprocessing, Split
from lance_edge.records import RecordError, from_json, to_json

SPLIT = Split(seed=0, test_fraction=0.25, validation_fraction=0.2)
SHAPE = (4, 1, 7)


def arrays(count=20, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "windows.npz"
    np.savez(path, x=arrays(), y=np.arange(20) % 2, classes=np.array(["still", "moving"]))
    return path


def refusal(path, **changes):
    with np.load(path) as archive:
        content = dict(archive) | changes
    np.savez(path, **content)
    with pytest.raises(DataError) as caught:
        open_dataset(path, SPLIT)
    return str(caught.value)


# --- data sets ---


def test_arrays_are_divided_like_images_and_never_changed(file):
    dataset = open_dataset(file, SPLIT)
    assert dataset.array_shape == SHAPE
    assert dataset.classes == ("still", "moving")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [12, 4, 4]
    whole = arrays()
    for part in (dataset.train, dataset.validation, dataset.test):
        batch = load_batch(part, range(len(part)), ArrayInput(SHAPE))
        assert batch.dtype == np.float32
        assert batch.flags.c_contiguous
        rows = [int(name[2:-1]) for name in part.names]
        np.testing.assert_array_equal(batch, whole[rows])
        np.testing.assert_array_equal(part.labels, np.array(rows) % 2)


def test_the_parts_of_a_float_file_hold_the_same_rows_as_those_of_images(file, tmp_path):
    """Membership depends on names alone."""
    np.savez(tmp_path / "images.npz", x=np.zeros((20, 5, 5, 3), np.uint8), y=np.arange(20) % 2)
    for part in ("train", "validation", "test"):
        found = [getattr(open_dataset(path, SPLIT), part).names for path in (file, tmp_path / "images.npz")]
        assert found[0] == found[1]


def test_a_batch_in_any_order_and_a_test_part_of_its_own(file, tmp_path):
    path = tmp_path / "both.npz"
    np.savez(path, x=arrays(8), y=np.arange(8) % 2, x_test=arrays(4, seed=1), y_test=np.arange(4) % 2)
    test = open_dataset(path, SPLIT).test
    np.testing.assert_array_equal(
        load_batch(test, np.array([3, 0, 3]), ArrayInput(SHAPE)), arrays(4, seed=1)[[3, 0, 3]]
    )


def test_images_have_no_array_shape(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.zeros((8, 5, 5, 3), np.uint8), y=np.arange(8) % 2)
    dataset = open_dataset(tmp_path / "images.npz", SPLIT)
    assert dataset.array_shape is None
    assert isinstance(dataset.train, ArrayPart)


@pytest.mark.parametrize("kind", ["float64", "float16", "int16"])
def test_other_kinds_of_numbers(file, kind):
    assert refusal(file, x=arrays().astype(kind)) == (
        f"{file}: x must be uint8 [N, H, W, 3] (images) or float32 [N, ...] (arrays for the network as"
        f" they are), found {kind} [20, 4, 1, 7]; convert it"
    )


@pytest.mark.parametrize("shape", [(20,), (20, 0, 7)])
def test_arrays_of_nothing(file, shape):
    assert f"found float32 {list(shape)}; convert it" in refusal(file, x=np.zeros(shape, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(file, bad):
    broken = arrays()
    broken[13, 2, 0, 5] = bad
    assert refusal(file, x=broken) == f"{file}: x[13] holds NaN or infinity; remove or mend such arrays"


def test_a_test_part_of_another_kind_or_shape(file):
    labels = np.arange(4) % 2
    message = refusal(file, x_test=arrays(4, (4, 1, 8)), y_test=labels)
    assert (
        "x is float32 [20, 4, 1, 7], x_test float32 [4, 4, 1, 8]; they must be of one kind, and arrays"
        in message
    )
    message = refusal(file, x_test=np.zeros((4, 5, 5, 3), np.uint8), y_test=labels)
    assert "x_test uint8 [4, 5, 5, 3]; they must be of one kind" in message


# --- what does not belong together ---


def test_images_for_a_package_of_arrays(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.zeros((8, 5, 5, 3), np.uint8), y=np.arange(8) % 2)
    part = open_dataset(tmp_path / "images.npz", SPLIT).train
    with pytest.raises(DataError) as caught:
        load_batch(part, [0], ArrayInput(SHAPE))
    assert str(caught.value) == (
        f"{part.names[0]}: the package takes float32 arrays [4, 1, 7], found images; give an .npz with x"
        " float32 [N, 4, 1, 7]"
    )


def test_arrays_of_another_shape(file):
    part = open_dataset(file, SPLIT).train
    with pytest.raises(
        DataError, match=r"takes float32 arrays \[4, 1, 8\], found arrays \[4, 1, 7\]; give an .npz"
    ):
        load_batch(part, [0], ArrayInput((4, 1, 8)))


def test_arrays_for_a_package_of_images(file):
    part = open_dataset(file, SPLIT).train
    with pytest.raises(
        DataError, match=r"x\[\d+\]: expected an image, found a float32 array \[4, 1, 7\]; give images"
    ):
        load_batch(part, [0], Preprocessing(8, 9, (0.5,) * 3, (0.5,) * 3))


# --- files to predict on ---


def test_files_of_one_or_many_arrays(tmp_path):
    np.savez(tmp_path / "many.npz", x=arrays(2))
    np.save(tmp_path / "one.npy", arrays(1)[0])
    np.save(tmp_path / "more.npy", arrays(2, seed=3))
    names = ("many.npz", "one.npy", "more.npy")
    part = read_arrays([tmp_path / name for name in names], SHAPE)
    assert isinstance(part, FloatPart)
    assert [name.removeprefix(f"{tmp_path}/") for name in part.names] == [
        *("many.npz[0]", "many.npz[1]", "one.npy", "more.npy[0]", "more.npy[1]"),
    ]
    batch = load_batch(part, range(5), ArrayInput(SHAPE))
    np.testing.assert_array_equal(batch[2], arrays(1)[0])
    np.testing.assert_array_equal(batch[3:], arrays(2, seed=3))


def test_files_that_hold_something_else(tmp_path):
    np.save(tmp_path / "wide.npy", arrays(2, (4, 1, 8)))
    np.save(tmp_path / "nan.npy", np.where(np.arange(7) < 2, np.nan, arrays(2)).astype(np.float32))
    np.savez(tmp_path / "no.npz", y=np.arange(3))
    (tmp_path / "text.npy").write_text("not an array")
    cases = {
        "wide.npy": r"expected float32 \[N, 4, 1, 7\], found float32 \[2, 4, 1, 8\]; convert it",
        "nan.npy": "expected finite values, found 16 that are NaN or infinite; repair them",
        "no.npz": r"no array x in this file; write it with numpy.savez\(file, x=...\)",
        "text.npy": r"not a readable .npz or .npy file \(",
        "absent.npy": r"not a readable .npz or .npy file \(No such file or directory\)",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_arrays([tmp_path / name], SHAPE)
    with pytest.raises(DataError, match=r"no arrays here; give .npz files with x, or .npy files"):
        read_arrays([], SHAPE)


# --- the manifest's record ---


def test_both_kinds_of_input_come_back_from_json():
    @dataclasses.dataclass(frozen=True)
    class Holder:
        steps: Preprocessing | ArrayInput

    for steps in (ArrayInput(SHAPE), Preprocessing(8, 9, (0.5,), (0.5,))):
        assert from_json(Holder, to_json(Holder(steps))) == Holder(steps)
    with pytest.raises(RecordError, match="steps"):
        from_json(Holder, {"steps": {"shape": [1], "mean": [0.5]}})
