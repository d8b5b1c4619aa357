import dataclasses
import json
import pickle

import numpy as np
import pytest
from device_harness import started, train
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_package import write_tiny_package

from lance_device.checkpoint import read_checkpoint, write_checkpoint
from lance_edge.bundle import Bundle
from lance_edge.errors import CheckpointError
from lance_edge.records import to_json
from lance_edge.sealed import write_sealed


@pytest.fixture(scope="module")
def last(package, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    started(train(package, images, out, "--steps", 3, "--quiet"))
    return out / "last.npz"


@pytest.fixture(scope="module")
def bundle(package):
    with Bundle(package.path) as bundle:
        yield bundle


def _changed(last, path, **changes):
    """A sealed copy of the checkpoint with these arrays replaced, or removed where the value is None."""
    with np.load(last) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "sha256"} | changes
    with path.open("wb") as file:
        write_sealed(file, {name: value for name, value in arrays.items() if value is not None})
    return path


def _changed_meta(last, path, **changes):
    with np.load(last) as archive:
        meta = json.loads(str(archive["meta"]))
    return _changed(last, path, meta=np.array(json.dumps(meta | changes)))


def test_a_checkpoint_comes_back_bit_for_bit(last, bundle, tmp_path):
    found = read_checkpoint(last, bundle)
    write_checkpoint(tmp_path / "copy.npz", found)
    again = read_checkpoint(tmp_path / "copy.npz", bundle)
    assert again.meta == found.meta
    for name, value in found.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], value)
        np.testing.assert_array_equal(again.velocity[name], found.velocity[name])
    assert found.meta.options == dataclasses.replace(found.meta.options)
    assert (tmp_path / "copy.npz").read_bytes() == last.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head.bias": None}, "its tensors are not those of the package: head.bias"),
        ({"extra": np.zeros(1, np.float32)}, "its tensors are not those of the package: extra"),
        ({"optimizer/head.bias": None}, "not those of the package: optimizer/head.bias"),
        ({"head.bias": np.zeros(4, np.float32)}, "head.bias is float32 [4], expected finite float32 [3]"),
        ({"head.bias": np.zeros(3)}, "head.bias is float64 [3], expected finite float32 [3]"),
        ({"head.bias": np.array([0, np.nan, 0], np.float32)}, "expected finite float32 [3]"),
        ({"head.bias": np.zeros(100_000, np.float32)}, "head.bias has 400128 bytes, expected at most 4108"),
        ({"meta": None}, "not a checkpoint: expected an npz with meta"),
        ({"meta": np.array("{")}, "not a readable checkpoint"),
    ],
)
def test_wrong_content_is_named(last, bundle, tmp_path, changes, words):
    path = _changed(last, tmp_path / "bad.npz", **changes)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, bundle)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_newer_schema_says_so(last, bundle, tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint schema 4, this runtime reads 3; install a newer"):
        read_checkpoint(_changed_meta(last, tmp_path / "new.npz", schema_version=4), bundle)


def test_damaged_meta_is_named(last, bundle, tmp_path):
    with pytest.raises(CheckpointError, match=r"\$\.step: expected int, found str"):
        read_checkpoint(_changed_meta(last, tmp_path / "meta.npz", step="3"), bundle)


def test_options_out_of_range_are_named(last, bundle, tmp_path):
    options = to_json(read_checkpoint(last, bundle).meta.options)
    for name, value in (("schedule", "none"), ("micro_batch", 0), ("steps", 0), ("lr", -1.0), ("seed", -1)):
        path = _changed_meta(last, tmp_path / "options.npz", options={**options, name: value})
        with pytest.raises(CheckpointError, match=f"damaged: option {name} is {value!r}; use another"):
            read_checkpoint(path, bundle)


def test_another_package(last, tmp_path):
    other = write_tiny_package(tmp_path / "other.tar", seed=1)
    with Bundle(other.path) as bundle, pytest.raises(CheckpointError) as caught:
        read_checkpoint(last, bundle)
    assert "belongs to another package: expected" in str(caught.value)
    assert "(tiny); give the pkg.tar that this run was trained from" in str(caught.value)


def test_missing_file_and_other_files(bundle, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot open the checkpoint \(No such file"):
        read_checkpoint(tmp_path / "none.npz", bundle)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(CheckpointError, match=r"not a (readable )?checkpoint"):
        read_checkpoint(tmp_path / "array.npy", bundle)


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a checkpoint was unpickled",)


def test_nothing_is_unpickled(last, bundle, tmp_path):
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(_Bomb()))
    hidden = np.empty(3, dtype=object)
    hidden[:] = [_Bomb()] * 3
    with np.load(last) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(tmp_path / "inside.npz", **(arrays | {"head.bias": np.zeros(3)}))
    for path in (tmp_path / "plain.npz", tmp_path / "inside.npz"):
        with pytest.raises(CheckpointError):
            read_checkpoint(path, bundle)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_found_or_harmless(last, bundle, tmp_path_factory, data):
    """Flipped or missing bytes end in a CheckpointError; no other exception comes out."""
    content = bytearray(last.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damage") / "bad.npz"
    path.write_bytes(content)
    message = ""
    try:
        read_checkpoint(path, bundle)  # a byte that nobody reads, such as a time stamp, does no harm
    except CheckpointError as error:
        message = str(error)
    assert not message or message.startswith(str(path))
    assert "\n" not in message
