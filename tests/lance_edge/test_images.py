"""Decoding, preprocessing and batches, against formulas written out here and pixels known by construction."""

import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lance_edge.datasets import ArrayPart
from lance_edge.errors import DataError
from lance_edge.images import MAX_ASPECT_RATIO, MAX_PIXELS, list_images, load_batch, load_image, prepare
from lance_edge.input_spec import INTERPOLATIONS, Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(resolution, resize=None, mean=MEAN, std=STD):
    return Preprocessing(resolution, resize or int(resolution * 256 / 224), mean, std)


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def part_of(pixels):
    rows = np.arange(len(pixels))
    return ArrayPart(pixels, rows, tuple(f"x[{row}]" for row in rows), np.zeros(len(pixels), np.int64))


def colour_of(path):
    pixels = np.asarray(load_image(path))
    assert pixels.dtype == np.uint8
    assert pixels.shape[-1] == 3
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(level) for level in pixels[0, 0])


# --- colour modes ---


@pytest.mark.parametrize(
    ("mode", "colour", "extension", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("RGB", (10, 20, 30), "bmp", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "png", (10, 20, 30)),  # alpha is dropped, not blended
        ("L", 77, "png", (77, 77, 77)),
        ("L", 77, "bmp", (77, 77, 77)),
        ("LA", (77, 128), "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("1", 0, "png", (0, 0, 0)),
        ("I;16", 0, "png", (0, 0, 0)),
        ("I;16", 200 * 257, "png", (200, 200, 200)),
        ("I;16", 65535, "png", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, extension, expected):
    path = tmp_path / f"image.{extension}"
    Image.new(mode, (4, 3), colour).save(path)
    assert colour_of(path) == expected


def test_16_bit_greys_are_rounded_to_the_nearest_level(tmp_path):
    greys = np.arange(0, 65536, 13, dtype=np.uint16)[None]
    Image.fromarray(greys).save(tmp_path / "grey.png")
    found = np.asarray(load_image(tmp_path / "grey.png"))[0, :, 0]
    assert np.abs(found - greys[0] / 65535 * 255).max() <= 0.5


def test_32_bit_greys_scale_like_16_bit_ones():
    """Older pillow releases open a 16-bit PNG in this mode."""
    greys = Image.fromarray(np.full((8, 8), 200 * 257, np.int32))
    assert greys.mode == "I"
    assert (prepare(greys, preprocessing(8)) == 200).all()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red, green, blue = colour_of(tmp_path / "red.jpg")
    assert red >= 250
    assert green <= 5
    assert blue <= 5


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes([128, 64]))
    image.save(tmp_path / "clear.gif", transparency=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("plain.png", "clear.png", "clear.gif"):
            assert colour_of(tmp_path / name) == (200, 100, 50), name


@pytest.mark.parametrize("extension", ["gif", "webp"])
def test_first_frame_of_an_animation(tmp_path, extension):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("#c80000", "#00c800")]
    path = tmp_path / f"moving.{extension}"
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if "w" in extension else {})
    )
    assert colour_of(path) == (200, 0, 0)


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, extension):
    path = tmp_path / f"turned.{extension}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(5, 7).save(path, exif=exif)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    loaded = load_image(path)
    np.testing.assert_array_equal(np.asarray(loaded), expected)
    settings_5x5 = preprocessing(5, 5)
    once = prepare(loaded, settings_5x5)  # no second turn
    np.testing.assert_array_equal(once, prepare(Image.fromarray(expected), settings_5x5))


def test_a_picture_taken_with_the_camera_turned_is_upright(tmp_path):
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[:, 0] = 255  # 6 = the stored left column is the visible top row
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(load_image(tmp_path / "turned.png"))
    assert upright.shape == (6, 4, 3)
    assert (upright[0] == 255).all()
    assert (upright[1:] == 0).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_malformed_metadata_do_not_spoil_an_image(tmp_path, exif):
    noise(4, 4).save(tmp_path / "odd.jpg", exif=exif)
    assert load_image(tmp_path / "odd.jpg").size == (4, 4)


# --- resize and crop ---


def whole_then_crop(image, resolution, resize):
    """The literal form: resize everything, then cut out the centre."""
    short = min(image.size)
    size = tuple(round(side * resize / short) for side in image.size)
    whole = image.resize(size, Image.Resampling.BILINEAR)
    left, upper = (round((side - resolution) / 2) for side in size)
    return np.asarray(whole.crop((left, upper, left + resolution, upper + resolution)))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    resolution=st.integers(1, 40),
    extra=st.integers(0, 12),
    seed=st.integers(0, 9),
)
def test_prepare_is_resize_then_crop(height, width, resolution, extra, seed):
    image = noise(height, width, seed)
    found = prepare(image, preprocessing(resolution, resolution + extra))
    assert found.shape == (resolution, resolution, 3)
    if max(height, width) <= MAX_ASPECT_RATIO * min(height, width):
        np.testing.assert_array_equal(found, whole_then_crop(image, resolution, resolution + extra))


def test_bilinear_by_hand():
    """Doubling [a, b] puts the samples at 1/4 and 3/4: a, (3a+b)/4, (a+3b)/4, b."""
    row = np.array([[[0] * 3, [200] * 3]] * 2, np.uint8)
    found = prepare(Image.fromarray(row), preprocessing(4, 4))
    np.testing.assert_array_equal(found[:, :, 0], [[0, 50, 150, 200]] * 4)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_the_interpolation_is_pillows_of_that_name(name):
    image, steps = noise(9, 9), replace(preprocessing(16, 16), interpolation=name)
    expected = np.asarray(image.resize((16, 16), Image.Resampling[name.upper()]))
    np.testing.assert_array_equal(prepare(image, steps), expected)


def test_interpolations_differ():
    found = [
        prepare(noise(9, 9), replace(preprocessing(16, 16), interpolation=n)).tobytes() for n in INTERPOLATIONS
    ]
    assert len(set(found)) == len(INTERPOLATIONS)


def test_one_mean_makes_grey_images():
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B, rounded to a level."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    batch = load_batch(part_of(pixels), [1], preprocessing(6, 6, (0.5,), (0.25,)))
    assert batch.shape == (1, 1, 6, 6)
    grey = pixels[1] @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(batch[0, 0], (grey / 255 - 0.5) / 0.25, atol=1 / 255 / 0.25)


@pytest.mark.parametrize(("width", "left"), [(10, 0), (13, 2), (15, 2), (12, 1), (110, 50)])
def test_crop_is_the_centre(width, left):
    """Without scaling the crop is exact; half a pixel rounds to even: 1.5 -> 2, 2.5 -> 2."""
    image = noise(10, width)
    found = prepare(image, preprocessing(10, 10))
    np.testing.assert_array_equal(found, np.asarray(image)[:, left : left + 10])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 5000), (5000, 1), (2, 3)])
def test_tiny_and_extreme_images(size):
    found = prepare(Image.new("RGB", size, (9, 8, 7)), preprocessing(160))
    assert found.shape == (160, 160, 3)
    assert (found == (9, 8, 7)).all()


def test_resize_never_falls_below_the_resolution():
    assert prepare(noise(9, 9), preprocessing(12, 4)).shape == (12, 12, 3)


# --- batches ---


def test_normalisation_and_order_of_axes():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    batch = load_batch(part_of(pixels), [2, 0], preprocessing(6, 6))
    assert batch.dtype == np.float32
    assert batch.shape == (2, 3, 6, 6)
    assert batch.flags.c_contiguous
    for row, index in enumerate([2, 0]):
        for channel in range(3):
            expected = (pixels[index, :, :, channel] / 255 - MEAN[channel]) / STD[channel]
            # rounded once from float64: half a unit in the last place of values below 4
            np.testing.assert_allclose(batch[row, channel], expected, rtol=6e-8, atol=1e-9)


def test_published_range_is_minus_one_to_one():
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    pixels[0, 0] = 255
    batch = load_batch(part_of(pixels), np.array([0]), preprocessing(4, 4, (0.5,) * 3, (0.5,) * 3))
    assert batch.min() == -1
    assert batch.max() == 1


def test_flips_mirror_the_chosen_images_only():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    plain = load_batch(part_of(pixels), [0, 1], preprocessing(5, 5))
    flipped = load_batch(part_of(pixels), [0, 1], preprocessing(5, 5), np.array([False, True]))
    np.testing.assert_array_equal(flipped[0], plain[0])
    np.testing.assert_array_equal(flipped[1], plain[1, :, :, ::-1])


def test_an_empty_batch():
    assert load_batch(part_of(np.zeros((1, 4, 4, 3), np.uint8)), [], preprocessing(4)).shape == (0, 3, 4, 4)


# --- files that cannot be used ---


def refusal(path):
    with pytest.raises(DataError) as raised:
        load_image(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: cannot read this image (")
    assert message.endswith("expected a whole JPEG, PNG, BMP, WebP or GIF file: replace or remove it")
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert "(No such file or directory)" in refusal(tmp_path / "none.jpg")


def test_folder_instead_of_a_file(tmp_path):
    assert "(Is a directory)" in refusal(tmp_path)


def test_zero_bytes(tmp_path):
    (tmp_path / "empty.jpg").touch()
    assert "(found 0 bytes)" in refusal(tmp_path / "empty.jpg")


def test_text(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    assert "(cannot identify image file 'text.jpg')" in refusal(tmp_path / "text.jpg")


@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.95])
def test_truncated(tmp_path, extension, kept):
    path = tmp_path / f"cut.{extension}"
    noise(40, 40).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refusal(path)


def test_other_formats_are_refused_whatever_their_name(tmp_path):
    noise(4, 4).save(tmp_path / "image.png", format="TIFF")
    assert "cannot identify" in refusal(tmp_path / "image.png")


def png_header(width, height):
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("width", [MAX_PIXELS // 1000 + 1, 60_000_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(tmp_path, width):
    (tmp_path / "bomb.png").write_bytes(png_header(width, 1000))
    assert "pixels" in refusal(tmp_path / "bomb.png")


# --- finding the files to predict ---


def test_list_images(tmp_path):
    for name in ("b/2.JPG", "b/deep/1.webp", "a.png", "b/notes.txt", ".hidden/3.png", "b/.4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/deep/loop").symlink_to(tmp_path, target_is_directory=True)
    expected = [tmp_path / name for name in ("a.png", "b/2.JPG", "b/deep/1.webp")]
    assert list_images([tmp_path]) == expected
    assert list_images([tmp_path / "b", tmp_path / "a.png", tmp_path]) == expected
    assert list_images([tmp_path / "b/notes.txt"]) == [tmp_path / "b/notes.txt"]  # named: the user means it


def test_list_images_of_nothing(tmp_path):
    with pytest.raises(DataError) as raised:
        list_images([tmp_path])
    assert str(raised.value) == (
        f"{tmp_path}: no images here; expected files that end in .jpg .jpeg .png .bmp .webp .gif"
    )
    with pytest.raises(DataError, match=r"^no path: no images here"):
        list_images([])


def test_list_images_of_a_missing_path():
    with pytest.raises(DataError) as raised:
        list_images([Path("nowhere/photo.jpg")])
    assert str(raised.value) == (
        "nowhere/photo.jpg: no such file or folder; give image files or folders of images"
    )
