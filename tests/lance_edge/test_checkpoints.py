import io
import json
import zipfile

import numpy as np
import pytest

from lance_edge import manifest as manifests
from lance_edge.bundle import Bundle, write_bundle
from lance_edge.checkpoints import SCHEMA_VERSION, read_weights
from lance_edge.errors import CheckpointError
from lance_edge.input_spec import Preprocessing, Split
from lance_edge.manifest import Manifest, TensorSpec, Variant
from lance_edge.sealed import write_sealed

SHAPES = {"conv.weight": (4, 3, 3, 3), "head.weight": (2, 4), "head.bias": (2,)}


def variant(method):
    return Variant(
        method=method,
        energy=0.7 if method == "lance" else None,
        schedule="one pass",
        graphs={},
        parameters=tuple(SHAPES),
        layers=(),
        boundary=(),
        activations=(),
        saved=(),
        statistics=(),
        batch_projections=(),
        projections=(),
        graph_macs={},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A package that trains three tensors and holds no file but its manifest."""
    manifest = Manifest(
        schema_version=manifests.SCHEMA_VERSION,
        created_by="test",
        model="tiny",
        weights_source="random",
        classes=("a", "b"),
        preprocessing=Preprocessing(8, 9, (0.5,) * 3, (0.5,) * 3),
        split=Split(0, 0.25, 0.1),
        seed=0,
        mode="channel",
        energy=0.7,
        batch_size=4,
        calibration_batches=0,
        parameters=tuple(TensorSpec(name, shape, "float32") for name, shape in SHAPES.items()),
        layers=(),
        variants=(variant("bp"),),
        members=(),
    )
    path = tmp_path_factory.mktemp("package") / "pkg.tar"
    write_bundle(path, manifest, {})
    with Bundle(path) as opened:
        yield opened


def good_tensors():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def good_meta(bundle, **changes):
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact_sha256": bundle.sha256,
        "method": "bp",
        "layers": 0,
        "model": "tiny",
        **changes,
    }


def checkpoint_bytes(tensors, meta):
    buffer = io.BytesIO()
    write_sealed(buffer, {**tensors, "meta": np.array(json.dumps(meta))})
    return buffer.getvalue()


@pytest.fixture
def refused(bundle, tmp_path):
    """Give a file's bytes, get the one-line message with which it is refused."""

    def read(data):
        path = tmp_path / "last.npz"
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as raised:
            read_weights(path, bundle)
        message = str(raised.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message

    return read


def test_the_weights_come_back_bit_for_bit_and_momentum_is_left_out(bundle, tmp_path):
    tensors = good_tensors()
    momentum = {f"optimizer/{name}": 2 * value for name, value in tensors.items()}
    path = tmp_path / "last.npz"
    path.write_bytes(checkpoint_bytes({**tensors, **momentum}, good_meta(bundle)))
    found = read_weights(path, bundle).weights
    assert list(found) == list(SHAPES)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == np.float32
        assert found[name].flags.writeable


def test_a_file_that_is_cut_off_is_refused_at_every_length(bundle, refused):
    data = checkpoint_bytes(good_tensors(), good_meta(bundle))
    for length in [*range(0, len(data), 97), len(data) - 1]:
        message = refused(data[:length])
        assert "not a readable checkpoint" in message
        assert "copy it again, or use another" in message


def test_a_flipped_byte_never_changes_a_weight(bundle, tmp_path):
    """It is refused, or it was one that means nothing (a date): what is read is never wrong."""
    data = checkpoint_bytes(good_tensors(), good_meta(bundle))
    path, tensors, refusals = tmp_path / "last.npz", good_tensors(), 0
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            found = read_weights(path, bundle).weights
        except CheckpointError:
            refusals += 1
            continue
        for name, value in tensors.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"byte {position}")
    assert refusals > len(data) // 3 // 2  # most of the file is content


def test_random_bytes_are_refused(refused):
    rng = np.random.default_rng(1)
    for length in (0, 1, 4, 100, 10_000):
        assert "not a readable checkpoint" in refused(rng.bytes(length))
        assert "not a readable checkpoint" in refused(b"PK\x03\x04" + rng.bytes(length))


def test_a_missing_file_is_named(bundle, tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.npz: cannot open the checkpoint \(No such file .*\)"):
        read_weights(tmp_path / "no.npz", bundle)


def test_a_folder_is_refused(bundle, tmp_path):
    with pytest.raises(CheckpointError, match="cannot open the checkpoint"):
        read_weights(tmp_path, bundle)


def test_an_array_or_another_npz_is_no_checkpoint(refused):
    array, other = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    np.savez(other, x=np.zeros(3))
    for data in (array.getvalue(), other.getvalue()):
        assert "not a checkpoint: expected an npz with meta" in refused(data)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was unpickled",))


@pytest.mark.parametrize("name", ["meta", "head.bias"])
def test_nothing_is_unpickled(name, bundle, refused):
    arrays = {**good_tensors(), "meta": np.array(json.dumps(good_meta(bundle)))}
    arrays[name] = np.array([Bomb()], dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    refused(buffer.getvalue())


def test_a_huge_array_is_refused_before_it_is_unpacked(bundle, refused):
    good = checkpoint_bytes(good_tensors(), good_meta(bundle))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(64 << 20) if name == "head.bias.npy" else old.read(name))
    assert len(buffer.getvalue()) < 1 << 20
    message = refused(buffer.getvalue())
    assert "it is compressed, so its arrays could be of any size" in message


def test_another_package_is_named(bundle, refused):
    message = refused(checkpoint_bytes(good_tensors(), good_meta(bundle, artifact_sha256="f" * 64)))
    assert f"belongs to another package: expected {bundle.sha256[:12]}, found ffffffffffff (tiny)" in message
    assert "give the pkg.tar that this run was trained from" in message


def test_a_newer_schema_says_what_it_needs(bundle, refused):
    message = refused(checkpoint_bytes(good_tensors(), good_meta(bundle, schema_version=4)))
    assert "checkpoint schema 4, this runtime reads 3; install a newer lance-edge" in message


@pytest.mark.parametrize("meta", [[], 3, "text", {}, {"artifact_sha256": 3}, None])
def test_meta_that_says_nothing_is_damaged(meta, refused):
    assert "its meta is damaged; use another checkpoint" in refused(checkpoint_bytes(good_tensors(), meta))


@pytest.mark.parametrize("method", [None, "lance", 3, ["bp"]])
def test_a_method_that_the_package_does_not_have_is_damage(method, bundle, refused):
    message = refused(checkpoint_bytes(good_tensors(), good_meta(bundle, method=method)))
    assert "its meta is damaged" in message


@pytest.mark.parametrize("layers", [None, 1, "0", [0]])
def test_a_number_of_layers_that_the_package_does_not_have_is_damage(layers, bundle, refused):
    message = refused(checkpoint_bytes(good_tensors(), good_meta(bundle, layers=layers)))
    assert "its meta is damaged: expected a method and number of layers of the package (bp of 0)," in message
    assert f"found 'bp' of {layers!r}; use another checkpoint" in message


def test_meta_that_is_no_json(refused):
    buffer = io.BytesIO()
    np.savez(buffer, **good_tensors(), meta=np.array("{"))
    assert "not a readable checkpoint" in refused(buffer.getvalue())


def test_missing_and_unexpected_tensors_are_named(bundle, refused):
    tensors = good_tensors()
    del tensors["head.bias"]
    tensors["extra"] = np.zeros(1, np.float32)
    message = refused(checkpoint_bytes(tensors, good_meta(bundle)))
    assert "its tensors are not those of the package: extra, head.bias; use another checkpoint" in message


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.zeros((2,), np.float64), "float64 [2]"),
        (np.zeros((2,), ">f4"), ">f4 [2]"),
        (np.zeros((2,), np.int32), "int32 [2]"),
        (np.zeros((3,), np.float32), "float32 [3]"),
        (np.zeros((2, 1), np.float32), "float32 [2, 1]"),
        (np.array([0, np.nan], np.float32), "float32 [2]"),
        (np.array([0, np.inf], np.float32), "float32 [2]"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(value, found, bundle, refused):
    message = refused(checkpoint_bytes({**good_tensors(), "head.bias": value}, good_meta(bundle)))
    assert f"head.bias is {found}, expected finite float32 [2]; use another checkpoint" in message
