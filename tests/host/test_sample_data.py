"""Handwritten digits as class folders."""

import hashlib
import sys

import numpy as np
import pytest
from PIL import Image

from lance_edge.errors import DataError, LanceError, StorageError
from lance_host.sample_data import write_digits

datasets = pytest.importorskip("sklearn.datasets")


def digest(folder):
    files = sorted(folder.rglob("*.png"))
    return [(str(f.relative_to(folder)), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]


def test_class_folders_of_every_digit(tmp_path):
    assert write_digits(tmp_path / "digits", 3) == 30
    folders = sorted(folder.name for folder in (tmp_path / "digits").iterdir())
    assert folders == [str(digit) for digit in range(10)]
    assert all(len(list((tmp_path / "digits" / name).iterdir())) == 3 for name in folders)


def test_all_images_by_default(tmp_path):
    assert write_digits(tmp_path / "digits") == 1797
    assert len(digest(tmp_path / "digits")) == 1797


def test_an_image_is_the_digit_enlarged(tmp_path):
    write_digits(tmp_path, 1)
    original = datasets.load_digits()
    with Image.open(tmp_path / "0" / "000.png") as image:
        assert image.size == (32, 32)
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
    first = original.images[list(original.target).index(0)] * 255 / 16
    assert np.corrcoef(small.ravel(), first.ravel())[0, 1] > 0.95  # bilinear enlargement blurs a little


def test_the_same_files_every_time(tmp_path):
    write_digits(tmp_path / "a", 2)
    write_digits(tmp_path / "b", 2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(
        DataError, match=r"expected a new or empty folder, found files in it; name another folder"
    ):
        write_digits(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["own.txt"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "digits").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*; free some space or choose another place"):
        write_digits(tmp_path / "digits")


def test_at_least_one_image_of_each_class(tmp_path):
    with pytest.raises(DataError, match="--per-class: expected at least 1 image of each class, found 0"):
        write_digits(tmp_path / "digits", 0)


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(LanceError, match=r"not installed; pip install scikit-learn"):
        write_digits(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()
