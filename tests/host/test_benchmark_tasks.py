"""From data sets in their forms to tasks: splits, order and normalisation of the protocol."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_sets import idx, pixels_of, write_folders, write_idx, write_npz
from PIL import Image

from lance_edge.errors import DataError
from lance_host.continual_benchmark.benchmarks import (
    BENCHMARKS,
    CIFAR10,
    CIFAR100,
    FASHION,
    MNIST,
    NOTMNIST,
    SVHN,
    Benchmark,
    Source,
)
from lance_host.continual_benchmark.image_sets import digest_of, find_set, in_label_order, to_square
from lance_host.continual_benchmark.tasks import make_tasks

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HERE_ONLY = replace(FASHION, elsewhere=None)  # what Debian's package brings must not be found


def ignore(text: str) -> None:
    """Somebody to talk to."""


def of_one(source: Source, classes_per_task: int = 2) -> Benchmark:
    return Benchmark("split", (source,), classes_per_task, "alexnet")


# --- protocol ---


def test_the_tasks_are_those_of_the_protocol() -> None:
    found = {
        name: (b.classes_per_task, [(s.name, s.classes) for s in b.sources]) for name, b in BENCHMARKS.items()
    }
    assert found == {
        "split-cifar100": (10, [("cifar100", 100)]),
        "split-cifar10": (2, [("cifar10", 10)]),
        "split-fashion": (2, [("fashion-mnist", 10)]),
        "five-datasets": (
            10,
            [(name, 10) for name in ("cifar10", "mnist", "svhn", "fashion-mnist", "notmnist")],
        ),
    }
    assert [b.network for b in BENCHMARKS.values()] == ["alexnet"] * 3 + ["resnet18-reduced"]


@pytest.mark.parametrize(("source", "mean", "std"), [(MNIST, 0.1307, 0.3081), (FASHION, 0.2860, 0.3530)])
def test_grey_images_are_normalised_with_their_margin(source: Source, mean: float, std: float) -> None:
    """From the usual values of 28 by 28 pixels (as PyTorch's examples have them), with zeros up to 32 by 32.

    The four digits of both sides allow for 1e-4.
    """
    share = 28**2 / 32**2
    second = share * (std**2 + mean**2)
    assert source.mean == pytest.approx([share * mean] * 3, abs=1e-4)
    assert source.std == pytest.approx([(second - (share * mean) ** 2) ** 0.5] * 3, abs=1e-4)


def test_the_other_sets_are_normalised_as_published() -> None:
    """The loaders of HAT (github.com/joansj/hat, src/dataloaders/mixture.py), which GPM took over."""
    assert (SVHN.mean, SVHN.std) == ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197))
    assert (NOTMNIST.mean, NOTMNIST.std) == ((0.4254,) * 3, (0.4501,) * 3)
    for source in (CIFAR10, CIFAR100):
        assert [round(255 * value, 1) for value in (*source.mean, *source.std)] == [
            *(125.3, 123.0, 113.9),
            *(63.0, 62.1, 66.7),
        ]


# --- forms ---


def test_class_folders_idx_and_npz_become_the_same_task(tmp_path: Path) -> None:
    """Colour images as folders and as an npz; their labels in the order of the names."""
    write_folders(tmp_path / "a" / "cifar10", CLASSES)
    (tmp_path / "b").mkdir()
    write_npz(tmp_path / "b" / "cifar10.npz")
    from_folders, from_npz = (find_set(tmp_path / name, CIFAR10, may_be_root=True) for name in "ab")
    assert from_folders is not None
    assert from_npz is not None
    assert from_folders.classes == tuple(CLASSES)
    for label in (0, 9):
        for found, numbers in ((from_folders, range(4)), (from_npz, range(label, 40, 10))):
            rows = np.flatnonzero(found.train.labels == label)
            expected = np.stack([pixels_of(label, number) for number in numbers])
            np.testing.assert_array_equal(found.train.read(rows), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_grey_idx_images_get_a_black_margin_and_three_channels(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path / "mnist", packed=packed)
    found = find_set(tmp_path, MNIST, may_be_root=False)
    assert found is not None
    assert found.train.labels.tolist() == list(range(10)) * 4
    (image,) = found.train.read(np.array([13]))
    expected = np.zeros((32, 32), np.uint8)
    expected[2:30, 2:30] = pixels_of(3, 13, 28, 1)
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], expected)


def test_the_digest_is_of_the_data_wherever_they_lie(tmp_path: Path) -> None:
    for name in "ab":
        write_folders(tmp_path / name / "cifar10", CLASSES)
        write_idx(tmp_path / name / "mnist", packed=False)
        write_npz(tmp_path / name / "svhn.npz")
    (tmp_path / "b" / "cifar10" / "out.csv").touch()  # results may lie in the same folder
    places = ("cifar10", "mnist", "svhn.npz")
    before = [digest_of(tmp_path / "a" / place) for place in places]
    assert len(set(before)) == 3
    assert [digest_of(tmp_path / "b" / place) for place in places] == before
    (tmp_path / "b" / "cifar10" / "train" / "cat" / "0000.png").unlink()
    labels = tmp_path / "b" / "mnist" / "train-labels-idx1-ubyte"  # of the same size
    labels.write_bytes(labels.read_bytes()[::-1])
    write_npz(tmp_path / "b" / "svhn.npz", train=5)
    assert not {digest_of(tmp_path / "b" / place) for place in places} & set(before)


def test_other_data_have_other_files(tmp_path: Path) -> None:
    write_folders(tmp_path / "a", CLASSES)
    write_folders(tmp_path / "b", CLASSES, train=5)
    one, other, again = (
        make_tasks(of_one(CIFAR10), tmp_path / n, tmp_path / "out", None, ignore) for n in "aba"
    )
    assert one == again
    assert not {task.path for task in one} & {task.path for task in other}


def test_large_images_are_resized() -> None:
    wide = Image.new("RGB", (64, 48), (10, 20, 30))
    np.testing.assert_array_equal(to_square(wide), np.broadcast_to(np.uint8([10, 20, 30]), (32, 32, 3)))


def test_folders_called_by_numbers_stand_in_the_order_of_these() -> None:
    assert in_label_order(("0", "1", "10", "2")) == ("0", "1", "2", "10")
    assert in_label_order(("b", "10", "a")) == ("10", "a", "b")


# --- tasks ---


def test_every_task_has_its_classes_in_label_order_and_five_percent_for_validation(tmp_path: Path) -> None:
    write_folders(tmp_path / "cifar10", CLASSES, train=40, test=3)
    tasks = make_tasks(of_one(CIFAR10), tmp_path, tmp_path / "out", None, ignore)
    assert [task.classes for task in tasks] == [tuple(CLASSES[n : n + 2]) for n in range(0, 10, 2)]
    assert [task.name for task in tasks] == [f"cifar10-{n}-{n + 1}" for n in range(0, 10, 2)]
    data = tasks[3].open()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [76, 4, 6]
    assert sorted(np.unique(data.train.labels)) == [0, 1]


def test_pixels_are_normalised_per_channel(tmp_path: Path) -> None:
    """To 1e-6: float32 of a float64 formula."""
    write_folders(tmp_path / "cifar10", CLASSES)
    task = make_tasks(of_one(CIFAR10), tmp_path, tmp_path / "out", None, ignore)[2]
    with np.load(task.path) as file:
        x, y = file["x"], file["y"]
    assert x.dtype == np.float32
    assert y.tolist() == [0] * 4 + [1] * 4
    mean, std = np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255
    expected = (pixels_of(5, 2) / 255 - mean) / std
    np.testing.assert_allclose(x[6], expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)


def test_a_preset_takes_the_first_images_of_each_class(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", train=6, test=4)
    task = make_tasks(of_one(MNIST), tmp_path, tmp_path / "out", (3, 2), ignore)[0]
    with np.load(task.path) as file:
        assert file["y"].tolist() == [0, 1] * 3
        assert file["y_test"].tolist() == [0, 1] * 2


def test_a_missing_set_is_skipped_and_named(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    write_folders(tmp_path / "cifar10", CLASSES)
    said: list[str] = []
    sources = tuple(replace(source, elsewhere=None) for source in BENCHMARKS["five-datasets"].sources)
    five = replace(BENCHMARKS["five-datasets"], sources=sources)
    tasks = make_tasks(five, tmp_path, tmp_path / "out", None, said.append)
    assert [task.name for task in tasks] == ["cifar10", "mnist"]
    assert [text for text in said if "skipped" in text] == [
        f"{name}: not found below {tmp_path}; skipped" for name in ("svhn", "fashion-mnist", "notmnist")
    ]


def test_a_set_that_a_system_package_brought_is_found(tmp_path: Path) -> None:
    source = replace(FASHION, elsewhere=write_idx(tmp_path / "usr"))
    (tmp_path / "data").mkdir()
    assert find_set(tmp_path / "data", source, may_be_root=True) is not None


# --- refusals ---


def refused(root: Path, source: Source) -> str:
    with pytest.raises(DataError) as error:
        find_set(root, source, may_be_root=True)
    return str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the data sets of split is here; expected a folder mnist with"):
        make_tasks(of_one(MNIST), tmp_path, tmp_path / "out", None, ignore)


def test_too_few_classes(tmp_path: Path) -> None:
    write_folders(tmp_path, CLASSES[:3])
    assert "expected 10 classes with training and test images of cifar10, found 3" in refused(tmp_path, CIFAR10)


def test_an_idx_file_that_is_missing(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", packed=False)
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    assert "expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz beside" in refused(tmp_path, MNIST)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (idx(np.zeros((3, 2, 2)))[:-1], "expected [3, 2, 2] values, found 11"),
        (b"\x89PNG....", "expected unsigned bytes of 3 dimensions, found a header 89504e47"),
        (b"\0\0\x08\x03\0\0", "found a header"),
    ],
)
def test_an_idx_file_that_is_none(tmp_path: Path, data: bytes, reason: str) -> None:
    write_idx(tmp_path / "mnist", packed=False)
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(data)
    message = refused(tmp_path, MNIST)
    assert "not a readable IDX file" in message
    assert reason in message


def test_an_idx_file_that_is_cut_off_while_packed(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "mnist")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable IDX file" in refused(tmp_path, MNIST)


def test_idx_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", packed=False)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(7)))
    assert "has 40 images, train-labels-idx1-ubyte 7 labels" in refused(tmp_path, MNIST)


def test_an_npz_without_a_test_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "cifar10.npz", x=np.zeros((20, 32, 32, 3), np.uint8), y=np.arange(20) % 10)
    assert "expected images x uint8 [N, H, W, 3] and x_test" in refused(tmp_path, CIFAR10)
