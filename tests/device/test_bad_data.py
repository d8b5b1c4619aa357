"""Runs on data with bad images, and on folders that change while they are read."""

import json
import os
import re
import shutil

import pytest
from device_harness import (
    assert_same_arrays,
    lance_device,
    refused,
    spawn,
    started,
    table,
    train,
    train_words,
)
from PIL import Image

from lance_edge.other_files import of_folders

LENGTH = ("--epochs", 4, "--lr", 0.2)


@pytest.fixture
def spoiled(images, tmp_path):
    """A copy of the images of which three, of two classes, are bad."""
    root = tmp_path / "spoiled"
    shutil.copytree(images, root)
    (root / "red/000.png").write_bytes(b"")
    (root / "red/007.png").write_bytes((root / "red/007.png").read_bytes()[:90])
    (root / "blue/011.png").write_bytes(b"no image")
    return root


BAD = {"red/000.png", "red/007.png", "blue/011.png"}


def test_bad_images_are_left_out_counted_and_listed(package, spoiled, tmp_path):
    out = tmp_path / "run"
    result = started(train(package, spoiled, out, *LENGTH))
    assert (
        f"warning: 3 images cannot be used and are left out; they are listed in {out / 'skipped.csv'}"
        in result.stderr
    )
    rows = {row["name"]: row for row in table(out / "skipped.csv")}
    assert rows.keys() == BAD
    assert rows["red/000.png"]["reason"] == "found 0 bytes"
    assert {row["step"] for row in rows.values()} == {"0"}
    split = {row["name"]: row["part"] for row in table(out / "split.csv")}
    assert not BAD & split.keys()
    assert len(split) == 57


def test_large_images_are_refused_in_one_s_own_words(package, images, tmp_path):
    """Pillow would warn of them on stderr, and of broken metadata, naming none."""
    root = tmp_path / "large"
    shutil.copytree(images, root)
    for number, side in enumerate((12_000, 16_000)):  # more than pillow likes, more than it takes
        Image.new("1", (side, side)).save(root / f"red/{number:03}.png")
    Image.new("RGB", (32, 32)).save(root / "red/exif.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    process = spawn(*train_words(package, root, tmp_path / "run"), "--steps", 1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "EXIF" not in errors
    assert "Decompression" not in errors
    assert ".py:" not in errors  # how a warning begins
    rows = {row["name"]: row["reason"] for row in table(tmp_path / "run/skipped.csv")}
    assert rows == {
        "red/000.png": "found 12000x12000 pixels, more than 89478485 in all",
        "red/001.png": "found more than 178956970 pixels, expected at most 89478485",
    }


def test_what_is_not_taken_as_an_image_is_said_once(package, images, tmp_path):
    root = tmp_path / "others"
    shutil.copytree(images, root)
    for name in ("a.tiff", "b.TIFF", "c.ppm", "notes", ".hidden"):
        (root / "red" / name).write_bytes(b"some")
    (root / "blue/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "blue/folder.jpg").mkdir()
    os.mkfifo(root / "blue/pipe.jpg")
    line = (
        f"{root}: 7 entries are not taken as images (.tiff 2, .ppm 1, broken links 1, folders 1, pipes or"
        " devices 1, without suffix 1); images are files that end in .jpg .jpeg .png .bmp .webp .gif"
    )
    out = tmp_path / "run"
    result = started(train(package, root, out, "--steps", 1))
    assert result.stderr.splitlines().count(line) == 1
    assert line not in started(train(package, root, out, "--resume")).stderr
    checkpoint = ("--artifact", package.path, "--checkpoint", out / "last.npz")
    result = started(lance_device("eval", *checkpoint, "--data", root))
    assert result.stderr.splitlines() == [line]
    result = started(lance_device("predict", *checkpoint, root / "red", root / "blue"))
    below = line.replace(f"{root}: 7", f"{root / 'red'} and 1 more: 6").replace(
        "folders 1, ", ""
    )  # looked through
    assert result.stderr.splitlines() == [below]


def test_many_kinds_of_other_files_are_not_all_named(tmp_path):
    for number in range(30):
        (tmp_path / f"frame.{number:04}").write_bytes(b"")
    (tmp_path / "a.b\x1b[2J").write_bytes(b"")
    line = of_folders([tmp_path])
    assert line.startswith(f"{tmp_path}: 31 entries are not taken as images ('.b\\x1b[2j' 1, .0000 1, .0001 1,")
    assert line.count(" 1") == 8
    assert ", others 23);" in line
    (tmp_path / "only").mkdir()
    (tmp_path / "only/x.tif").write_bytes(b"")
    assert of_folders([tmp_path / "only"]).startswith(
        f"{tmp_path}/only: 1 entry is not taken as an image (.tif 1);"
    )


def test_a_run_without_bad_images_lists_none(package, images, tmp_path):
    result = started(train(package, images, tmp_path / "run", *LENGTH))
    assert "warning" not in result.stderr
    assert table(tmp_path / "run/skipped.csv") == []


def test_strict_refuses_before_anything_is_written(package, spoiled, tmp_path):
    line = refused(train(package, spoiled, tmp_path / "run", *LENGTH, "--strict"), 5)
    assert "cannot read" in line
    assert "and 2 more; replace or remove such images, or leave --strict out to skip them" in line
    assert not (tmp_path / "run").exists()


def test_a_class_of_bad_images_is_an_error(package, spoiled, tmp_path):
    for file in (spoiled / "green").iterdir():
        file.write_bytes(b"")
    line = refused(train(package, spoiled, tmp_path / "run", *LENGTH), 5)
    assert "class 'green': none of its 12 training images can be read" in line
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_taken_up_leaves_out_the_same(package, spoiled, tmp_path):
    started(train(package, spoiled, tmp_path / "whole", *LENGTH))
    out = tmp_path / "run"
    prelude = """
import os
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 4:
        os.kill(os.getpid(), 15)
RunLog.step = step
"""
    process = spawn(*train_words(package, spoiled, out), *LENGTH, prelude=prelude)
    assert process.communicate(timeout=60)[1]
    assert process.returncode == 130
    listed = (out / "skipped.csv").read_bytes()
    result = started(train(package, spoiled, out, "--resume"))
    assert "warning: 3 images cannot be used" in result.stderr
    assert_same_arrays(out / "last.npz", tmp_path / "whole" / "last.npz")
    assert (out / "skipped.csv").read_bytes() == listed


@pytest.mark.parametrize("damage", [b"", b"junk", None, b"0", b"split"])
def test_a_list_that_is_lost_is_made_again(package, spoiled, tmp_path, damage):
    out = tmp_path / "run"
    started(train(package, spoiled, out, *LENGTH))
    listed = (out / "skipped.csv").read_bytes()
    (out / "skipped.csv").unlink()
    if damage in (b"0", b"split"):  # another step, or another name
        changed = listed.replace(b",0,", b",7,", 1) if damage == b"0" else listed.replace(b"007", b"008")
        assert changed != listed
        (out / "skipped.csv").write_bytes(changed)
        if damage == b"split":
            (out / "split.csv").unlink()
    elif damage is not None:
        (out / "skipped.csv").write_bytes(damage)
    started(train(package, spoiled, out, "--resume"))
    assert sorted((out / "skipped.csv").read_bytes().splitlines()) == sorted(listed.splitlines())


@pytest.fixture
def stopped(package, spoiled, tmp_path):
    """A run on a folder with bad images, stopped after its second step."""
    prelude = """
import os
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 2:
        os.kill(os.getpid(), 15)
RunLog.step = step
"""
    out = tmp_path / "run"
    process = spawn(*train_words(package, spoiled, out), *LENGTH, "--cache", "off", prelude=prelude)
    assert process.communicate(timeout=60)[1]
    assert process.returncode == 130
    return out


def test_new_images_take_no_part_in_a_run_that_is_taken_up(package, spoiled, images, stopped, tmp_path):
    started(train(package, spoiled, tmp_path / "whole", *LENGTH, "--cache", "off"))
    for number in range(3):
        shutil.copy(images / "red/001.png", spoiled / f"red/new{number}.png")
    (spoiled / "violet").mkdir()  # a class of which the package knows nothing: the listing is refused
    result = started(train(package, spoiled, stopped, "--resume"))
    assert "are new" not in result.stderr
    assert_same_arrays(stopped / "last.npz", tmp_path / "whole" / "last.npz")
    (spoiled / "violet").rmdir()
    result = started(train(package, spoiled, stopped, "--resume"))
    assert f"{spoiled}: 3 images are new; this run goes on without them, as it began" in result.stderr


def test_an_image_that_is_gone_when_a_run_is_taken_up_is_stood_in_for(package, spoiled, stopped):
    split = {row["name"]: row["part"] for row in table(stopped / "split.csv")}
    gone = [name for name, part in split.items() if part == "train"][:12:4]
    for name in gone:
        (spoiled / name).unlink()
    result = started(train(package, spoiled, stopped, "--resume"))
    assert f"warning: 3 images of this run are gone from {spoiled}; others of their class" in result.stderr
    later = {row["name"]: row["reason"] for row in table(stopped / "skipped.csv") if row["step"] != "0"}
    assert later == dict.fromkeys(gone, "No such file or directory")
    assert {row["name"] for row in table(stopped / "skipped.csv") if row["step"] == "0"} == BAD
    assert {row["name"]: row["part"] for row in table(stopped / "split.csv")} == split


def test_strict_also_looks_at_a_run_that_is_taken_up(package, spoiled, images, stopped, tmp_path):
    line = refused(train(package, spoiled, stopped, "--resume", "--strict"), 5)
    assert "and 2 more; replace or remove such images, or leave --strict out" in line
    good, out = tmp_path / "good", tmp_path / "strict"
    shutil.copytree(images, good)
    started(train(package, good, out, *LENGTH, "--strict"))
    started(train(package, good, out, "--resume", "--strict"))
    (good / "red/002.png").write_bytes(b"")
    assert "red/002.png (found 0 bytes)" in refused(train(package, good, out, "--resume", "--strict"), 5)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_files_that_vanish_during_a_run(package, spoiled, tmp_path, cache):
    """Others of their class stand in; the run says so, lists them and goes on to its end."""
    prelude = f"""
import os
from pathlib import Path
from lance_device.run_log import RunLog
write, root = RunLog.step, Path({str(spoiled)!r})
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 2:
        for name in self._dataset.train.names[:20:4]:
            (root / name).unlink()
        (root / self._dataset.test.names[0]).write_bytes(b"")
        (root / "red/new.png").write_bytes(b"new and no image")
RunLog.step = step
"""
    out = tmp_path / "run"
    process = spawn(*train_words(package, spoiled, out), *LENGTH, "--cache", cache, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    gone = [row for row in table(out / "skipped.csv") if row["step"] != "0"]
    assert len(gone) == errors.count("can no longer be read") >= (1 if cache == "on" else 6)
    assert {row["reason"] for row in gone} <= {"No such file or directory", "found 0 bytes"}
    assert len(table(out / "history.csv")) == 4
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_a_cache_holds_no_stand_ins(package, images, tmp_path):
    """A disk that is away for a while: a shared cache outlives the run that did without its images."""
    root, away = tmp_path / "images", tmp_path / "away"
    shutil.copytree(images, root)
    away.mkdir()
    prelude = f"""
import os
from pathlib import Path
from lance_device.run_log import RunLog
write, root = RunLog.step, Path({str(root)!r})
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 1:
        for name in self._dataset.train.names[::2]:
            (root / name).rename(Path({str(away)!r}) / name.replace("/", "+"))
    if self._run.progress.step == 6:
        os.kill(os.getpid(), 15)
RunLog.step = step
"""
    shared = (*LENGTH, "--cache", "on", "--cache-dir", tmp_path / "cache")
    process = spawn(*train_words(package, root, tmp_path / "first"), *shared, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.count("another of its class stands in") > 5
    for file in away.iterdir():
        file.rename(root / file.name.replace("+", "/"))
    result = started(train(package, root, tmp_path / "second", *shared))
    assert int(re.search(r"holds (\d+) of", result.stderr)[1]) > 0
    started(train(package, root, tmp_path / "own", *LENGTH, "--cache", "on"))
    assert_same_arrays(tmp_path / "second" / "last.npz", tmp_path / "own" / "last.npz")


def test_a_class_that_vanishes_during_a_run_ends_it_with_its_state(package, spoiled, tmp_path):
    prelude = f"""
import shutil
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 3:
        shutil.rmtree({str(spoiled / "green")!r})
RunLog.step = step
"""
    out = tmp_path / "run"
    process = spawn(*train_words(package, spoiled, out), *LENGTH, "--cache", "off", prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "no other image of its class can be read either" in errors.splitlines()[-1]
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert (out / "last.npz").exists()


def test_eval_leaves_bad_images_out_too(package, spoiled, images, tmp_path):
    out = tmp_path / "run"
    started(train(package, images, out, *LENGTH))
    common = ("eval", "--artifact", package.path, "--checkpoint", out / "last.npz", "--data", spoiled)
    result = started(lance_device(*common, "--part", "train"))
    left_out = [line for line in result.stderr.splitlines() if "is left out (" in line]
    in_train = {row["name"] for row in table(out / "split.csv") if row["part"] == "train"} & BAD
    assert len(left_out) == len(in_train) > 0
    assert f"of {36 - len(in_train)} images" in result.stdout
    assert "leave --strict out" in refused(lance_device(*common, "--part", "train", "--strict"), 5)


def test_data_are_not_read_before_what_can_be_said_at_once(package, spoiled, tmp_path):
    """A method that is not there, or a run that is: nobody shall wait for a thousand images to be decoded."""
    prelude = """
from lance_edge import screening
def find_bad(*arguments):
    raise AssertionError("images were read")
screening.find_bad = find_bad
import lance_device.run_data
lance_device.run_data.find_bad = find_bad
"""
    process = spawn(*train_words(package, spoiled, tmp_path / "run"), "--method", "none", prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
