"""Class folders, `.npz` files and their division into parts, against a literal form of the rule."""

import hashlib
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lance_edge.datasets import open_dataset
from lance_edge.errors import DataError
from lance_edge.images import load_batch
from lance_edge.input_spec import Preprocessing, Split

SPLIT = Split(seed=7, test_fraction=0.25, validation_fraction=0.1)


def make(root, **counts):
    """`make(root, cat=3)`: files `cat/000.png` ... that need no content as long as they are not decoded."""
    for name, count in counts.items():
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number:03}.png").touch()
    return root


def parts(dataset):
    return {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}


def names(dataset):
    return {key: part.names for key, part in parts(dataset).items()}


def by_hash(candidates, salt, count):
    return set(sorted(candidates, key=lambda name: hashlib.sha256((salt + name).encode()).hexdigest())[:count])


# --- the rule ---


def test_membership_is_the_documented_rule(tmp_path):
    make(tmp_path, cat=20, dog=9)
    test, validation, train = set(), set(), set()
    for name, total, tests, validations in (("cat", 20, 5, 2), ("dog", 9, 2, 1)):
        images = {f"{name}/{number:03}.png" for number in range(total)}
        chosen = by_hash(images, "7:", tests)
        held_out = by_hash(images - chosen, "7:validation:", validations)
        test |= chosen
        validation |= held_out
        train |= images - chosen - held_out
    dataset = open_dataset(tmp_path, SPLIT)
    assert names(dataset) == {
        "train": tuple(sorted(train)),
        "validation": tuple(sorted(validation)),
        "test": tuple(sorted(test)),
    }
    assert dataset.classes == ("cat", "dog")
    assert dataset.root == tmp_path


def test_membership_never_changes(tmp_path):
    """Packages and boards that are out there rely on these very names."""
    dataset = open_dataset(make(tmp_path, a=8, b=4), Split(0, 0.25, 0.2))
    # as coreutils' sha256sum ranks "0:a/000.png" ... and "0:validation:a/000.png" ...
    assert dataset.test.names == ("a/002.png", "a/007.png", "b/001.png")
    assert dataset.validation.names == ("a/001.png", "b/002.png")


counts = st.dictionaries(st.sampled_from(["ant", "bee", "cat", "élan"]), st.integers(2, 12), min_size=2)
fractions = st.floats(0, 1)


@settings(max_examples=40, deadline=None)
@given(counts=counts, seed=st.integers(0, 99), test=fractions, validation=fractions)
def test_parts_are_disjoint_complete_and_stratified(tmp_path_factory, counts, seed, test, validation):
    root = make(tmp_path_factory.mktemp("data"), **counts)
    dataset = open_dataset(root, Split(seed, test, validation))
    everything = [f"{name}/{number:03}.png" for name, count in counts.items() for number in range(count)]
    assert sorted(sum(names(dataset).values(), ())) == sorted(everything)
    for part in parts(dataset).values():
        assert list(part.names) == sorted(part.names)
        assert len(part) == len(part.names) == len(part.labels)
        assert part.labels.dtype == np.int64
        assert [dataset.classes[label] for label in part.labels] == [name.split("/")[0] for name in part.names]
    for label, name in enumerate(dataset.classes):
        tests = int((dataset.test.labels == label).sum())
        pool = counts[name] - tests
        validations = int((dataset.validation.labels == label).sum())
        assert tests == min(max(round(test * counts[name]), 1), counts[name] - 1)
        least = 1 if validation > 0 and pool >= 4 else 0
        assert validations == min(max(round(validation * pool), least), pool - 1)


@settings(max_examples=15, deadline=None)
@given(counts=counts, seed=st.integers(0, 99), more=st.integers(2, 9))
def test_membership_depends_on_names_only(tmp_path_factory, counts, seed, more):
    """Not on the root's name, nor on the images of other classes, nor on where the files lie on the disk."""
    one = make(tmp_path_factory.mktemp("one"), **counts)
    other = tmp_path_factory.mktemp("other") / "photos"
    make(other, zebra=more)
    for name in reversed(counts):
        (other / name).mkdir()
        for number in reversed(range(counts[name])):
            (other / name / f"{number:03}.png").touch()
    split = Split(seed, 0.25, 0.2)
    expected = names(open_dataset(one, split))
    found = names(open_dataset(other, split))
    for key, members in expected.items():
        assert members == tuple(name for name in found[key] if not name.startswith("zebra/"))


def test_another_seed_is_another_split(tmp_path):
    make(tmp_path, a=40, b=40)
    one, other = (open_dataset(tmp_path, Split(seed, 0.25, 0.1)) for seed in (0, 1))
    assert one.test.names != other.test.names


def test_validation_is_empty_at_fraction_0(tmp_path):
    dataset = open_dataset(make(tmp_path, a=40, b=40), Split(0, 0.25, 0))
    assert len(dataset.validation) == 0
    assert dataset.validation.names == ()
    assert dataset.validation.labels.shape == (0,)


@pytest.mark.parametrize(("images", "held_out"), [(1, 0), (3, 0), (4, 1), (9, 1)])
def test_four_images_of_a_class_can_spare_one(tmp_path, images, held_out):
    make(tmp_path, train__a=images, train__b=images, test__a=1, test__b=1)
    assert len(open_dataset(tmp_path, Split(0, 0.25, 0.01)).validation) == 2 * held_out


def test_parts_are_sorted_by_the_whole_name(tmp_path):
    """Not class by class: `-` sorts before `/`."""
    dataset = open_dataset(make(tmp_path, **{"a": 5, "a-b": 5}), Split(0, 0.25, 0))
    assert dataset.classes == ("a", "a-b")
    assert list(dataset.train.names) == sorted(dataset.train.names)
    assert dataset.train.names[0].startswith("a-b/")
    assert dataset.train.labels[0] == 1


def test_accents_are_the_same_composed_and_decomposed(tmp_path):
    """macOS hands out decomposed names: the split and the classes must not notice."""
    found = []
    for form in ("NFC", "NFD"):
        root = tmp_path / form
        make(root, **{unicodedata.normalize(form, "éléphant"): 9, "zébu": 9})
        found.append(open_dataset(root, SPLIT, ("éléphant", "zébu")))
    assert found[0].classes == found[1].classes == ("éléphant", "zébu")
    assert names(found[0]) == names(found[1])


# --- what is read ---


def test_train_and_test_folders_are_kept(tmp_path):
    make(tmp_path, train__a=10, train__b=6, test__a=2, test__b=1, notes=3)
    dataset = open_dataset(tmp_path, SPLIT)
    assert dataset.test.names == ("test/a/000.png", "test/a/001.png", "test/b/000.png")
    for name, total, count in (("a", 10, 1), ("b", 6, 1)):
        images = {f"train/{name}/{number:03}.png" for number in range(total)}
        chosen = {found for found in dataset.validation.names if found in images}
        assert chosen == by_hash(images, "7:validation:", count)
    assert len(dataset.train) == 14


def test_hidden_and_other_files_are_ignored(tmp_path):
    make(tmp_path, a=3, b=3, **{".cache": 2})
    for name in ("a/.003.png", "a/readme.txt", "b/Thumbs.db", "labels.csv"):
        (tmp_path / name).touch()
    for name in ("PNG", "JPG", "jpeg", "Bmp", "webp", "gif"):
        (tmp_path / "b" / f"photo.{name}").touch()
    (tmp_path / "a" / "folder.png").mkdir()
    dataset = open_dataset(tmp_path, Split(0, 0.25, 0))
    assert dataset.classes == ("a", "b")
    assert len(dataset.train) + len(dataset.test) == 3 + 3 + 6


def test_links_to_class_folders_and_files_are_followed(tmp_path):
    make(tmp_path / "elsewhere", a=4, b=4)
    root = make(tmp_path / "root", b=3)
    (root / "a").symlink_to(tmp_path / "elsewhere/a", target_is_directory=True)
    (root / "b/linked.png").symlink_to(tmp_path / "elsewhere/b/000.png")
    dataset = open_dataset(root, Split(0, 0.25, 0))
    assert len(dataset.train) + len(dataset.test) == 8


def test_labels_follow_the_package(tmp_path):
    """A package's order of classes wins over the alphabet."""
    make(tmp_path, a=4, b=4)
    dataset = open_dataset(tmp_path, SPLIT, ["b", "a"])
    assert dataset.classes == ("b", "a")
    for part in parts(dataset).values():
        assert [dataset.classes[label] for label in part.labels] == [name[0] for name in part.names]


def test_images_are_those_of_their_names(tmp_path):
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (4, 4), (label, number, 0)).save(tmp_path / name / f"{number}.png")
    for part in parts(open_dataset(tmp_path, SPLIT)).values():
        for index, name in enumerate(part.names):
            expected = (part.labels[index], int(name[2]), 0)
            assert part.image(index).getpixel((0, 0)) == expected


def test_an_image_that_turns_out_unreadable_is_named(tmp_path):
    make(tmp_path, a=2, b=2)
    dataset = open_dataset(tmp_path, Split(0, 0.25, 0))
    with pytest.raises(DataError, match=r"\.png: cannot read this image \(found 0 bytes\)"):
        load_batch(dataset.train, [0], Preprocessing(8, 9, (0.5,) * 3, (0.5,) * 3))


# --- class folders that cannot be used ---


def refusal(root, classes=None):
    with pytest.raises(DataError) as raised:
        open_dataset(root, SPLIT, classes)
    return str(raised.value)


def test_missing_root(tmp_path):
    assert refusal(tmp_path / "none") == (
        f"{tmp_path}/none: no such folder; give a folder of class folders, or an .npz file"
    )


def test_root_is_another_file(tmp_path):
    (tmp_path / "data.zip").touch()
    assert refusal(tmp_path / "data.zip") == (
        f"{tmp_path}/data.zip: expected a folder of class folders or an .npz file, found another file"
    )


def test_no_class_folders(tmp_path):
    (tmp_path / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected a folder for each class, found no folder and 2 images;"
        " move the images of each class into a folder named after it"
    )


def test_class_folder_that_is_no_utf8(tmp_path):
    make(tmp_path, a=3, b=3)
    (tmp_path / "b").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected class folders with names in UTF-8, found 'caf\\udce9'; rename it"
    )


def test_empty_class_folder(tmp_path):
    make(tmp_path, a=3, b=0)
    assert refusal(tmp_path) == (
        f"{tmp_path}/b: no images in this class folder; expected files that end in"
        " .jpg .jpeg .png .bmp .webp .gif: add some, or remove the folder"
    )


def test_one_class(tmp_path):
    make(tmp_path, a=3)
    assert refusal(tmp_path) == (f"{tmp_path}: expected two or more classes, found only 'a'; add the others")


def test_one_image_in_a_class(tmp_path):
    make(tmp_path, a=3, b=1)
    assert refusal(tmp_path) == (
        f"{tmp_path}: class 'b' has 1 image; expected 2 or more, one to train and one to test on: add images,"
        " or give train/ and test/ folders"
    )


@pytest.mark.parametrize(("present", "absent"), [("train", "test"), ("test", "train")])
def test_half_of_train_and_test(tmp_path, present, absent):
    make(tmp_path, **{f"{present}__a": 3, f"{present}__b": 3})
    assert refusal(tmp_path) == (
        f"{tmp_path}: found {present}/ but no {absent}/; add it, or give {tmp_path}/{present} to have it split"
    )


def test_train_and_test_of_different_classes(tmp_path):
    make(tmp_path, train__a=3, train__b=3, test__a=1, test__c=1)
    assert refusal(tmp_path) == (
        f"{tmp_path}/test: the classes differ: missing 'b'; unexpected 'c';"
        " train/ and test/ need the same class folders"
    )


def test_classes_of_another_package(tmp_path):
    make(tmp_path, cat=3, dog=3, emu=3)
    assert refusal(tmp_path, ["bee", "cat", "cow"]) == (
        f"{tmp_path}: the classes differ: missing 'bee', 'cow'; unexpected 'dog', 'emu'; rename or add folders"
        " to match the package, or calibrate again on these data"
    )
    assert "missing none; unexpected 'emu'" in refusal(tmp_path, ["cat", "dog"])


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied")

    make(tmp_path, a=2, b=2)
    monkeypatch.setattr("os.scandir", denied)  # by hand: root may list any folder
    assert refusal(tmp_path) == (
        f"{tmp_path}: cannot list this folder (Permission denied); check the path and its permissions"
    )


# --- npz ---


def good_arrays(count=24, classes=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return {"x": pixels, "y": np.arange(count) % classes}


@pytest.fixture
def npz(tmp_path):
    def write(**changes):
        arrays = {**good_arrays(), **changes}
        np.savez(tmp_path / "data.npz", **{key: value for key, value in arrays.items() if value is not None})
        return tmp_path / "data.npz"

    return write


def test_npz_is_split_by_the_same_rule(npz):
    arrays = good_arrays()
    dataset = open_dataset(npz(), SPLIT)
    assert dataset.classes == ("0", "1", "2")
    chosen = set()
    for label in range(3):
        chosen |= by_hash({f"x[{row}]" for row in np.flatnonzero(arrays["y"] == label)}, "7:", 2)
    assert set(dataset.test.names) == chosen
    assert sorted(sum(names(dataset).values(), ())) == sorted(f"x[{row}]" for row in range(24))
    for part in parts(dataset).values():
        rows = [int(name[2:-1]) for name in part.names]
        assert rows == sorted(rows)  # by number, not by text
        np.testing.assert_array_equal(part.labels, arrays["y"][rows])
        for index, row in enumerate(rows):
            np.testing.assert_array_equal(np.asarray(part.image(index)), arrays["x"][row])


def test_npz_with_a_test_part_and_classes(npz):
    extra = good_arrays(count=4, classes=2)
    names_array = np.array(["bee", "ant", "cat"])
    path = npz(x_test=extra["x"], y_test=extra["y"].astype(np.uint8), classes=names_array)
    dataset = open_dataset(path, Split(0, 0.25, 0))
    assert dataset.classes == ("bee", "ant", "cat")
    assert len(dataset.train) == 24
    assert dataset.test.names == ("x_test[0]", "x_test[1]", "x_test[2]", "x_test[3]")
    assert dataset.test.labels.dtype == np.int64
    np.testing.assert_array_equal(dataset.test.image(3), extra["x"][3])
    sorted_classes = open_dataset(path, Split(0, 0.25, 0), ["ant", "bee", "cat"])
    np.testing.assert_array_equal(sorted_classes.test.labels, [1, 0, 1, 0])


def test_npz_pixels_are_held_once(npz):
    dataset = open_dataset(npz(), SPLIT)
    assert dataset.train.pixels is dataset.test.pixels
    assert dataset.train.pixels is dataset.validation.pixels


EITHER_KIND = "x must be uint8 [N, H, W, 3] (images) or float32 [N, ...] (arrays for the network as they are)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "expected an array x, found y; add it to the file"),
        ({"y": None}, "expected an array y, found x; add it to the file"),
        ({"x_test": np.zeros((2, 4, 4, 3), np.uint8)}, "expected an array y_test, found x, y, x_test; add it"),
        ({"y_test": np.zeros(2, int)}, "expected an array x_test, found x, y, y_test; add it"),
        (
            {"x": np.zeros((24, 5, 4, 3))},
            f"{EITHER_KIND}, found float64 [24, 5, 4, 3]; convert it",
        ),
        ({"x": np.zeros((24, 3, 5, 4), np.uint8)}, f"{EITHER_KIND}, found uint8 [24, 3, 5, 4]"),
        ({"x": np.zeros((24, 5, 4), np.uint8)}, f"{EITHER_KIND}, found uint8 [24, 5, 4]"),
        ({"x": np.zeros((0, 5, 4, 3), np.uint8)}, f"{EITHER_KIND}, found uint8 [0, 5, 4, 3]"),
        ({"x": np.zeros((24, 0, 4, 3), np.uint8)}, f"{EITHER_KIND}, found uint8 [24, 0, 4, 3]"),
        ({"y": np.zeros(24)}, "y must be int64 [24], one label for each of x, found float64 [24]; convert it"),
        ({"y": np.zeros(23, int)}, "y must be int64 [24], one label for each of x, found int64 [23]"),
        ({"y": np.zeros((24, 1), int)}, "y must be int64 [24], one label for each of x, found int64 [24, 1]"),
        ({"y": np.arange(24) - 1}, "y has label -1, expected 0 or more; remove such images"),
        ({"y": np.arange(24) + 2**40}, "y has label 1099511627799, expected at most 65535; number the classes"),
        ({"y": np.full(24, 2**64 - 1, np.uint64)}, "y has label 18446744073709551615, expected at most 65535"),
        ({"y": np.arange(24) % 2 * 2}, "class '1' has no image in y; labels must be 0 to 2, each used"),
        ({"y": np.zeros(24, int)}, "expected two or more classes, found only '0'; add the others"),
        ({"classes": np.array(["a", "b"])}, "y has label 2, expected 0 to 1 for 2 classes; correct the labels"),
        ({"classes": np.array(list("abcd"))}, "class 'd' has no image in y; labels must be 0 to 3"),
        ({"classes": np.array(["a", "b", "a"])}, "classes must be distinct strings [K], found <U1 [3]"),
        ({"classes": np.array([1, 2, 3])}, "classes must be distinct strings [K], found int64 [3]"),
        (
            {"x_test": np.zeros((1, 4, 4, 3), np.uint8), "y_test": np.array([3])},
            "y_test has label 3, expected 0 to 2",
        ),
    ],
)
def test_npz_that_cannot_be_used(npz, changes, message):
    path = npz(**changes)
    found = refusal(path)
    assert found.startswith(f"{path}: {message}")
    assert ";" in found  # what to do


def test_npz_of_another_package(npz):
    assert "missing 'cat'; unexpected '2'" in refusal(npz(), ["0", "1", "cat"])


def test_npz_with_pickled_objects_is_not_unpickled(npz):
    found = refusal(npz(y=np.array([{}] * 24, dtype=object)))
    assert "not a readable npz (Object arrays cannot be loaded when allow_pickle=False)" in found
    assert found.endswith("write it again with numpy.savez")


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, -30])
def test_npz_cut_off(npz, kept):
    path = npz()
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(path).startswith(f"{path}: not a readable npz (")


def test_npy_in_place_of_npz(tmp_path):
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "not a readable npz (found a single array, as of numpy.save)" in refusal(tmp_path / "data.npz")
