"""Images of every bad kind: found, left out, named; and files that go while they are in use."""

import io
import re
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from lance_edge import screening
from lance_edge.datasets import ArrayPart, FilePart, open_dataset
from lance_edge.errors import DataError
from lance_edge.input_spec import Split
from lance_edge.screening import SteadyPart, find_bad, refuse, steady, without

SPLIT = Split(seed=0, test_fraction=0.25, validation_fraction=0.2)


def encoded(form, mode="RGB", size=(20, 16), **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))


def animated():
    frames = [Image.new("RGB", (20, 16), color) for color in ("red", "blue", "green")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


GOOD = {
    "plain.jpg": encoded("JPEG"),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "grey16.png": encoded("PNG", "I;16"),
    "palette.png": encoded("PNG", "P"),
    "alpha.png": encoded("PNG", "RGBA"),
    "animated.gif": animated(),
    "really-a-png.jpg": encoded("PNG"),
    "progressive.jpg": encoded("JPEG", progressive=True),
}
BAD = {
    "empty.jpg": (b"", "found 0 bytes"),
    "truncated.jpg": (encoded("JPEG", size=(200, 160))[:2000], "truncated"),
    "truncated.png": (encoded("PNG", size=(200, 160))[:2000], "truncated|Truncated|broken|bytes"),
    "text.jpg": (b"this is no image\n", "cannot identify image file"),
    "bomb.png": (bomb(), "60000x60000 pixels|decompression bomb"),
    "script.png": (b"#!/bin/sh\nexit 1\n", "cannot identify image file"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
    "tiff.png": (encoded("TIFF"), "cannot identify image file"),
    "damaged.png": (encoded("PNG")[:60] + b"XXXX" + encoded("PNG")[64:], "."),
}


@pytest.fixture
def root(tmp_path):
    """Two classes; `a` holds every kind of image, good and bad."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            (tmp_path / name / f"{number}.jpg").write_bytes(encoded("JPEG"))
    for name, data in GOOD.items():
        (tmp_path / "a" / name).write_bytes(data)
    for name, (data, _) in BAD.items():
        (tmp_path / "a" / name).write_bytes(data)
    return tmp_path


def members(dataset):
    return {part: set(getattr(dataset, part).names) for part in ("train", "validation", "test")}


@pytest.mark.parametrize("threads", [1, 4])
def test_bad_images_are_found_with_their_reasons_and_good_ones_are_not(root, threads):
    found = find_bad(open_dataset(root, SPLIT), threads)
    assert {row.name for row in found} == {f"a/{name}" for name in BAD}
    for row in found:
        _, words = BAD[row.name.removeprefix("a/")]
        assert re.search(words, row.reason), row
        assert "\n" not in row.reason
        assert row.step == 0
    order = ["train", "validation", "test"]
    assert [row.part for row in found] == sorted((row.part for row in found), key=order.index)


def test_leaving_out_moves_no_other_image(root):
    dataset = open_dataset(root, SPLIT)
    bad = {row.name for row in find_bad(dataset, 1)}
    left = without(dataset, bad)
    assert members(left) == {part: names - bad for part, names in members(dataset).items()}
    for part in (left.train, left.validation, left.test):
        for index in range(len(part)):
            assert part.image(index).mode == "RGB"
            assert dataset.classes[part.labels[index]] == part.names[index][0]
    assert without(dataset, ()) is dataset


def test_a_class_that_ends_empty_is_an_error(root):
    for file in (root / "b").iterdir():
        file.write_bytes(b"")
    dataset = open_dataset(root, SPLIT)
    bad = {row.name for row in find_bad(dataset, 1)}
    count = sum(name.startswith("b/") for name in dataset.train.names)
    with pytest.raises(DataError) as raised:
        without(dataset, bad)
    assert str(raised.value) == (
        f"{root}: class 'b': none of its {count} training images can be read; replace them, or remove the class"
        " from data and package"
    )


def test_strict_names_the_first_and_counts_the_others(root):
    found = find_bad(open_dataset(root, SPLIT), 1)
    with pytest.raises(DataError) as raised:
        refuse(root, found)
    assert str(raised.value) == (
        f"{root}: cannot read {found[0].name} ({found[0].reason}) and {len(found) - 1} more; replace or remove"
        " such images, or leave --strict out to skip them"
    )
    with pytest.raises(DataError, match=r"\(.*\); replace or remove"):
        refuse(root, found[:1])
    refuse(root, ())


def test_only_the_parts_that_are_asked_for_are_read(root):
    dataset = open_dataset(root, SPLIT)
    assert {row.part for row in find_bad(dataset, 1, ("test",))} <= {"test"}


def test_threads_that_find_no_memory_leave_it_to_one(root, monkeypatch):
    """Several large images at a time may be too many where each fits by itself."""
    expected = find_bad(open_dataset(root, SPLIT), 1)
    main, load = threading.get_ident(), screening.load_image

    def lack(path):
        if threading.get_ident() != main:
            raise MemoryError
        return load(path)

    monkeypatch.setattr(screening, "load_image", lack)
    assert find_bad(open_dataset(root, SPLIT), 2) == expected


def test_the_reason_is_whole_whatever_the_name(tmp_path):
    (tmp_path / "IMG (1).jpg").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        screening.load_image(tmp_path / "IMG (1).jpg")
    assert raised.value.reason == "found 0 bytes"


def test_a_file_that_vanishes_while_it_is_read_is_a_bad_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no image")

    def vanish(path, **options):
        path.unlink()
        raise ValueError("cannot identify image file")

    monkeypatch.setattr("lance_edge.images.Image.open", vanish)
    with pytest.raises(DataError, match=r"cannot read this image \(cannot identify image file\)"):
        screening.load_image(tmp_path / "a.png")


def test_memory_that_runs_out_is_not_an_image_s_fault(root, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("lance_edge.images.Image.open", fail)
    with pytest.raises(MemoryError):
        find_bad(open_dataset(root, SPLIT), 1)


def test_arrays_hold_no_files(tmp_path):
    x = np.zeros((8, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(8) % 2)
    dataset = open_dataset(tmp_path / "d.npz", SPLIT)
    assert find_bad(dataset, 1) == ()
    assert isinstance(steady(dataset, print).train, ArrayPart)


# --- files that go ---


@pytest.fixture
def part(tmp_path):
    """Six images, classes 0 0 0 1 1 1, each of one grey."""
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (40 * number,) * 3).save(path)
    return FilePart(tuple(paths), tuple(path.name for path in paths), np.array([0, 0, 0, 1, 1, 1]))


def grey(image):
    return image.getpixel((0, 0))[0] // 40


def test_the_next_of_the_same_class_stands_in_and_is_said_once(part):
    said = []
    kept = SteadyPart.of(part, lambda name, reason: said.append((name, reason)), lambda: None)
    assert [grey(kept.image(index)) for index in range(6)] == [0, 1, 2, 3, 4, 5]
    part.paths[1].unlink()
    part.paths[5].write_bytes(b"")
    assert [grey(kept.image(index)) for index in range(6)] == [0, 2, 2, 3, 4, 3]  # around the end of the class
    assert [grey(kept.image(index)) for index in range(6)] == [0, 2, 2, 3, 4, 3]
    assert said == [("1.png", "No such file or directory"), ("5.png", "found 0 bytes")]
    assert len(kept) == 6
    assert kept.names == part.names


def test_it_comes_back_when_the_file_does(part):
    kept = SteadyPart.of(part, lambda name, reason: None, lambda: None)
    data = part.paths[0].read_bytes()
    part.paths[0].unlink()
    assert grey(kept.image(0)) == 1
    part.paths[0].write_bytes(data)
    assert grey(kept.image(0)) == 0


def test_when_the_whole_class_is_gone_that_is_an_error(part):
    kept = SteadyPart.of(part, lambda name, reason: None, lambda: None)
    for path in part.paths[:3]:
        path.unlink()
    with pytest.raises(DataError, match="no other image of its class can be read either"):
        kept.image(1)
    assert grey(kept.image(4)) == 4


def test_a_part_of_a_steady_part_is_steady_no_more(part):
    kept = SteadyPart.of(part, lambda name, reason: None, lambda: None)
    assert type(kept.select(np.array([0]))) is FilePart
