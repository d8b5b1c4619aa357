"""Networks and images of a reproduction: what is named and not there, what is absent, what a preset takes."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from lance_edge.errors import LanceError
from lance_host.reproduce import cells as cells_module
from lance_host.reproduce.cells import Cells
from lance_host.reproduce.claims import reproduce
from lance_host.reproduce.material import (
    AbsentError,
    Material,
    class_names,
    find_data,
    find_weights,
    sized_data,
)
from lance_host.reproduce.study import PRESETS, Study


@pytest.fixture
def study(tmp_path):
    return Study(out=tmp_path / "out", preset="quick", data_root=tmp_path / "data", say=lambda text: None)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"places": {"cifar10": "none"}},
            r"--data cifar10=.*none: expected a folder or an .npz, found nothing",
        ),
        (
            {"places": {"cifr10": "."}},
            r"--data cifr10=.*: expected one of cifar10, cifar100, found cifr10; name it",
        ),
        ({"weights": {"mcunet": "none.pth"}}, "--weights mcunet=none.pth: expected a file, found none there"),
        ({"weights": {"mcunetx": "a.pth"}}, "--weights mcunetx=a.pth: expected one of mcunet, found mcunetx"),
        ({"models": ("mcunet", "mcunetx")}, "--model mcunetx: no such network; lance-host knows mcunet"),
    ],
)
def test_what_is_named_must_be_there(named, message, study, tmp_path):
    """An error before anything is done: rows of what is absent would replace those of an earlier call."""
    places = {name: tmp_path / place for name, place in named.get("places", {}).items()}
    with pytest.raises(LanceError, match=message):
        reproduce("fig4", dataclasses.replace(study, **{**named, "places": places}))
    assert not study.out.exists()


def test_a_data_set_that_a_claim_does_not_take_is_for_nothing(study, tmp_path):
    given = dataclasses.replace(study, places={"imagenet": tmp_path})
    with pytest.raises(LanceError, match="expected one of cifar10, cifar100, found imagenet"):
        reproduce("table2", given)
    with pytest.raises(LanceError, match=r"table1\.csv: not written"):  # which takes it, and finds no images
        reproduce("table1", given)


def test_where_nothing_could_run_results_stay(study, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.touch()
    study = dataclasses.replace(study, weights={"mcunet": str(weights)})  # else they are absent first
    study.out.mkdir()
    (study.out / "fig4.csv").write_text("of an earlier call")
    message = r"fig4\.csv: not written, as there was nothing to run: no images: .*cifar10 or .*; no images: "
    with pytest.raises(LanceError, match=message):
        reproduce("fig4", study)
    assert (study.out / "fig4.csv").read_text() == "of an earlier call"
    assert not list(study.out.glob("fig4.[mpj]*"))


def test_what_is_not_there_is_said(study, tmp_path, monkeypatch):
    with pytest.raises(
        AbsentError, match=r"no images: .*cifar10 or .*cifar10.npz is not there \(--data cifar10="
    ):
        find_data(study, "cifar10")
    monkeypatch.setenv("LANCE_EDGE_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        AbsentError, match=r"no weights: https://.*: not tried.*\(--weights mcunet=FILE names some\)"
    ):
        find_weights(study, "mcunet")  # the bundled checkpoint is no stand-in
    (tmp_path / "data" / "empty").mkdir(parents=True)
    for use in (class_names, sized_data):
        with pytest.raises(AbsentError, match=r"no usable images: .*expected a folder for each class"):
            use(study, "empty")


def test_a_quick_study_takes_the_same_share_of_each_class(study, photos, monkeypatch):
    monkeypatch.setitem(
        PRESETS, "quick", PRESETS["quick"].__class__(**{**vars(PRESETS["quick"]), "train_images": 9})
    )
    given = Study(out=study.out, preset="quick", places={"photos": photos})
    cut = sized_data(given, "photos")
    counts_of = {folder.name: len(list(folder.iterdir())) for folder in (cut / "train").iterdir()}
    assert counts_of == {"disc": 3, "square": 3, "stripes": 3}
    assert all(path.is_symlink() and path.exists() for path in (cut / "train").rglob("*.*"))
    assert sized_data(given, "photos") == cut
    assert sized_data(Study(out=study.out, places={"photos": photos}), "photos") == photos
    half = sized_data(given, "photos", ("disc", "stripes"), "half")
    assert sorted(folder.name for folder in (half / "test").iterdir()) == ["disc", "stripes"]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_are_cut_too(study, tmp_path, dtype):
    y = np.repeat(np.arange(4), 50)
    shape = (200, 8, 8, 3) if dtype is np.uint8 else (200, 7)
    x = np.broadcast_to(y.reshape(-1, *[1] * (len(shape) - 1)), shape).astype(dtype)
    place = tmp_path / "some.npz"
    np.savez(place, x=x, y=y, x_test=x[::5], y_test=y[::5], classes=np.array(list("abcd")))
    cut = sized_data(Study(out=study.out, preset="quick", places={"some": place}), "some", ("b", "d"), "half")
    arrays = np.load(cut, allow_pickle=False)
    assert list(arrays["classes"]) == ["b", "d"]
    for suffix in ("", "_test"):  # every sample carries the number of its old class
        old = arrays[f"x{suffix}"].reshape(len(arrays[f"y{suffix}"]), -1)[:, 0]
        np.testing.assert_array_equal(np.array([1, 3])[arrays[f"y{suffix}"]], old)


def flat_images(place, value, mtime_ns=None):
    y = np.repeat(np.arange(2), 4)
    np.savez(
        place,
        x=np.full((8, 8, 8, 3), value, np.uint8),
        y=y,
        x_test=np.full((8, 8, 8, 3), value, np.uint8),
        y_test=y,
    )
    if mtime_ns is not None:
        os.utime(place, ns=(mtime_ns, mtime_ns))
    return place


def test_another_place_or_another_content_is_another_data_set(study, tmp_path):
    def cut(place):
        return sized_data(dataclasses.replace(study, places={"c": place}), "c")

    first, second = (
        flat_images(tmp_path / f"{name}.npz", value, 10**18) for name, value in (("a", 1), ("b", 2))
    )
    assert [np.load(cut(place))["x"].max() for place in (first, second)] == [1, 2]
    before = cut(first)
    assert cut(first) == before
    flat_images(first, 3)
    assert np.load(cut(first))["x"].max() == 3


def test_a_package_is_of_the_images_that_are_there(study, photos, tmp_path, monkeypatch):
    """Of all images, which are not cut: the place is the same, the images are not."""
    calibrated = []
    monkeypatch.setattr(cells_module, "calibrate", lambda request, feedback: calibrated.append(request.output))
    place = tmp_path / "photos"
    shutil.copytree(photos, place)
    material = Material("mcunet", None, "photos", place)
    before = Cells(study).package(material, 0, layers="2")
    assert Cells(study).package(material, 0, layers="2") == before
    next(place.rglob("*.jpg")).unlink()
    assert Cells(study).package(material, 0, layers="2") != before
