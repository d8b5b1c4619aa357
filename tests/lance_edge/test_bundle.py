"""Packages: the same bytes for the same content, and a readable refusal of anything else."""

import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import random
import tarfile

import numpy as np
import pytest

from lance_edge.bundle import DIGEST_MEMBER, MANIFEST_MEMBER, Bundle, describe, npz_bytes, write_bundle
from lance_edge.errors import ArtifactError, StorageError
from lance_edge.input_spec import Preprocessing, Split
from lance_edge.manifest import (
    SCHEMA_VERSION,
    FrozenLayer,
    Layer,
    LayerPlan,
    Manifest,
    Task,
    TensorSpec,
    Variant,
)
from lance_edge.manifest_json import decode, encode
from lance_edge.records import to_json

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "bn.num_batches_tracked": np.array(7, np.int64),  # no dimension
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "empty": np.zeros((0, 4), np.float32),
}
CONTENTS = {"graphs/forward.onnx": b"not a real graph", "weights.npz": npz_bytes(ARRAYS), "none": b""}


def layer_plan(**changes):
    plan = LayerPlan("conv", (2, 1, 1, 1), (0.71, 0.72, 0.73, 0.74), 100, 2000, 300)
    return dataclasses.replace(plan, **changes)


def variant(method):
    return Variant(
        method=method,
        energy=0.7 if method == "lance" else None,
        schedule="one pass",
        graphs={"forward": ("graphs/forward.onnx",)},
        parameters=("conv.weight",),
        layers=(layer_plan(), layer_plan(activation_bytes=23)),
        boundary=(TensorSpec("boundary", ("N", 3, 4, 4), "float32"),),
        activations=(),
        saved=(TensorSpec("mask", ("N", 5), "uint8"),),
        statistics=(TensorSpec("core", (2, 1, 1, 1), "float32"), TensorSpec("count", (), "int64")),
        batch_projections=("conv/U0",),
        projections=("conv/U1",),
        graph_macs={"forward": 1},
    )


def manifest(contents=CONTENTS, **changes):
    layer = Layer("conv", "conv.weight", (2, 3, 2, 2), (3, 4, 4), (2, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    complete = Manifest(
        schema_version=SCHEMA_VERSION,
        created_by="test",
        model="tiny",
        weights_source="random",
        classes=("élan", "b"),
        preprocessing=Preprocessing(8, 9, (0.5,) * 3, (0.5,) * 3),
        split=Split(0, 0.25, 0.1),
        seed=0,
        mode="channel",
        energy=0.7,
        batch_size=4,
        calibration_batches=1,
        parameters=(TensorSpec("conv.weight", (2, 3, 2, 2), "float32"),),
        layers=(layer,),
        variants=(variant("lance"), variant("bp")),
        members=tuple(describe(name, data) for name, data in contents.items()),
    )
    return dataclasses.replace(complete, **changes)


@pytest.fixture
def package(tmp_path):
    path = tmp_path / "pkg.tar"
    write_bundle(path, manifest(), CONTENTS)
    return path


def refusal(path):
    with pytest.raises(ArtifactError) as raised:
        Bundle(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# --- good packages ---


def test_round_trip(package):
    with Bundle(package) as bundle:
        assert bundle.manifest == manifest()
        assert bundle.sha256 == hashlib.sha256(encode(manifest())).hexdigest()
        for name, data in CONTENTS.items():
            assert bundle.read(name) == data
        arrays = bundle.arrays("weights.npz")
        assert list(arrays) == list(ARRAYS)
        assert len(arrays) == 4
        for name, expected in ARRAYS.items():
            assert arrays[name].dtype == expected.dtype
            assert arrays[name].shape == expected.shape
            np.testing.assert_array_equal(arrays[name], expected)


def test_nothing_stays_open(package):
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - names only
    bundle = Bundle(package)
    with bundle:
        pass
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    package.write_bytes(package.read_bytes()[:-1])
    with pytest.raises(ArtifactError) as raised:  # whose traceback keeps the bundle alive
        Bundle(package)
    assert os.listdir("/proc/self/fd") == before, raised  # noqa: PTH208


def test_same_content_same_bytes(package, tmp_path):
    again = tmp_path / "elsewhere" / "other-name.tar"
    arrays = {name: value.copy() for name, value in ARRAYS.items()}
    write_bundle(again, manifest(), {**CONTENTS, "weights.npz": npz_bytes(arrays)})
    assert again.read_bytes() == package.read_bytes()


def test_any_tar_program_reads_it(package):
    with tarfile.open(package) as tar:
        assert tar.getnames() == [MANIFEST_MEMBER, DIGEST_MEMBER, *CONTENTS]
        data = tar.extractfile(MANIFEST_MEMBER).read()
        line = tar.extractfile(DIGEST_MEMBER).read().decode()
    assert json.loads(data)["classes"] == ["élan", "b"]
    assert line == f"{hashlib.sha256(data).hexdigest()}  manifest.json\n"  # for sha256sum -c


def test_arrays_by_name(package):
    with Bundle(package) as bundle:
        arrays = bundle.arrays("weights.npz")
        assert "conv.weight" in arrays
        assert "other" not in arrays
        with pytest.raises(ArtifactError) as raised:
            arrays["other"]
        assert str(raised.value) == (
            f"{package}: weights.npz: no array other; rebuild the package with lance-host"
        )
        with pytest.raises(ArtifactError) as raised:
            bundle.read("spectra.npz")
        assert str(raised.value) == f"{package}: no member spectra.npz; rebuild the package with lance-host"
        with pytest.raises(ArtifactError, match=r"graphs/forward.onnx: not a readable npz \(.*; rebuild"):
            bundle.arrays("graphs/forward.onnx")


def test_objects_in_an_array_are_never_unpickled(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, evil=np.array([{}], dtype=object))
    contents = {"weights.npz": buffer.getvalue()}
    write_bundle(tmp_path / "pkg.tar", manifest(contents), contents)
    with Bundle(tmp_path / "pkg.tar") as bundle:
        arrays = bundle.arrays("weights.npz")
        with pytest.raises(ArtifactError, match=r"array evil is unreadable \(Object arrays cannot be loaded"):
            arrays["evil"]


def test_arrays_are_not_compressed(tmp_path):
    """A megabyte of zeros is a kilobyte of zip: what a package unpacks to must show in its size."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, zeros=np.zeros(1 << 20, np.uint8))
    contents = {"weights.npz": buffer.getvalue()}
    write_bundle(tmp_path / "pkg.tar", manifest(contents), contents)
    with (
        Bundle(tmp_path / "pkg.tar") as bundle,
        pytest.raises(ArtifactError, match=r"weights.npz: not a readable npz \(it is compressed.*; rebuild"),
    ):
        bundle.arrays("weights.npz")


def test_a_mask_takes_one_bit_a_value():
    assert TensorSpec("mask", ("N", 5), "bool").nbytes(2) == 2  # 10 bits
    assert TensorSpec("mask", ("N", 4), "bool").nbytes(2) == 1


def test_variants_by_method_and_number_of_layers():
    fewer = dataclasses.replace(variant("lance"), layers=(layer_plan(),))
    made = manifest(variants=(fewer, variant("bp"), variant("lance")))
    assert made.methods == ("lance", "bp")
    assert made.layer_counts == (1, 2)
    assert made.variant() is made.variants[2], "the largest number of layers of the first method"
    assert made.variant("lance", 1) is fewer
    with pytest.raises(ArtifactError) as raised:
        made.variant("bp", 1)
    assert str(raised.value) == (
        "this package holds method bp with --layers 2, not 1; choose one of these, or calibrate again with"
        " --layers 1"
    )
    with pytest.raises(ArtifactError, match="holds method lance with --layers 1, 2, not 7"):
        made.with_layers(7)


def test_a_package_narrowed_to_one_number_of_layers():
    wide = variant("bp")
    none = dataclasses.replace(wide, layers=(), parameters=())
    narrow = manifest(variants=(wide, none)).with_layers(0)
    assert narrow.variants == (none,)
    assert (narrow.layers, narrow.parameters) == ((), ())
    assert manifest(variants=(wide, none)).with_layers(2) == manifest(variants=(wide,))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"energy": 0.0}, "energies above 0 and at most 1"),
        ({"energy": 1.5}, "energies above 0 and at most 1"),
        ({"graphs": {"forward": ()}}, "graphs of one member or more"),
        ({"layers": (layer_plan(layer="other"),)}, "ranks for all projections, layers for all variants"),
        ({"projections": ("conv/U4",)}, "ranks for all projections"),
        ({"parameters": ("unknown",)}, "parameters for all variants"),
        ({"schedule": "by layer"}, "an activation for each layer of a variant that goes by layer"),
        ({"method": "lance"}, "variants that differ in method or number of layers"),
    ],
)
def test_variants_that_mean_nothing_are_refused(tmp_path, changes, expected):
    broken = manifest(variants=(variant("lance"), dataclasses.replace(variant("bp"), **changes)))
    write_bundle(tmp_path / "pkg.tar", broken, CONTENTS)
    assert f"does not fit schema {SCHEMA_VERSION}: expected {expected}; rebuild" in refusal(
        tmp_path / "pkg.tar"
    )


def test_members_are_read_one_after_the_other(package):
    with Bundle(package) as bundle:
        first, second = list(CONTENTS)[:2]
        assert bundle.read(first, second) == CONTENTS[first] + CONTENTS[second]


def test_variants_and_bytes():
    made = manifest()
    assert made.variant(None).method == "lance"
    assert made.variant("bp").method == "bp"
    assert made.variant("bp").activation_bytes == 100 + 23
    factors = 100 + 23 - 2 * 4 * 2  # two layers, activation bytes without the cores of 2 values
    assert made.variant("bp").saved_bytes(6, 12) == 6 * 5 + 2 * 4 + 8 + factors
    two_passes = dataclasses.replace(made.variant("bp"), schedule="two passes")
    assert two_passes.saved_bytes(5, 12) == 12 * 5 + 2 * 4 + 8 + factors
    with pytest.raises(ArtifactError) as raised:
        made.variant("asi")
    assert str(raised.value) == (
        "this package holds the methods lance, bp, not asi; choose one of them, or calibrate again with"
        " --methods lance,bp,asi"
    )


def test_bytes_of_each_schedule():
    """Per sample 5 bytes and a mask of 3 bits; a core of 2 values in each of two layers."""
    saved = (*variant("lance").saved, TensorSpec("bits", ("N", 3), "bool"))
    one_pass = dataclasses.replace(variant("lance"), saved=saved)
    factors, statistics = 100 + 23 - 2 * 4 * 2, 2 * 4 + 8
    assert one_pass.factor_bytes == factors
    assert one_pass.saved_bytes(6, 16) == 6 * 5 + 3 + statistics + factors
    # Masks are packed micro-batch by micro-batch: 18 bits twice and 12 bits once.
    whole = 16 * 5 + 3 + 3 + 2
    two_passes = dataclasses.replace(one_pass, schedule="two passes")
    assert two_passes.saved_bytes(6, 16) == whole + statistics + factors
    by_layer = dataclasses.replace(one_pass, schedule="by layer")  # cores are no statistics there
    assert by_layer.saved_bytes(6, 16) == whole + statistics + one_pass.activation_bytes
    uncompressed = dataclasses.replace(one_pass, layers=(layer_plan(ranks=()),))
    assert uncompressed.factor_bytes == 0
    assert uncompressed.saved_bytes(6, 16) == 6 * 5 + 3 + statistics


def test_graphs_of_forward_are_in_the_order_in_which_they_run():
    assert variant("lance").forward_roles == ("forward",)
    graphs = {f"forward-{part}": ("a.onnx",) for part in (10, 2, 1, 9, 3, 4, 8, 7, 5, 6)}
    by_layer = dataclasses.replace(variant("lance"), schedule="by layer", graphs=graphs | {"backward": ("b",)})
    assert by_layer.forward_roles == tuple(f"forward-{part}" for part in range(1, 11))


# --- damage ---


def test_every_flipped_byte_is_found(package):
    data = package.read_bytes()
    flips = random.Random(0)
    for position in range(0, len(data), 11):  # odd: every field of some header
        damaged = bytearray(data)
        damaged[position] ^= 1 << flips.randrange(8)
        package.write_bytes(damaged)
        refusal(package)


def test_every_kind_of_cut_is_found(package):
    data = package.read_bytes()
    lengths = {*range(0, len(data), 509), *range(0, len(data), 512), 1, len(data) - 1}
    for length in sorted(lengths):
        package.write_bytes(data[:length])
        refusal(package)


@pytest.mark.parametrize("extra", [b"\0", b"x", bytes(512), bytes(10240), b"PK" * 256])
def test_nothing_hides_behind_the_end(package, extra):
    package.write_bytes(package.read_bytes() + extra)
    assert refusal(package).endswith(
        "the tar is cut off, was changed, or was packed by another program; expected the file as lance-host"
        " wrote it: copy it again"
    )


def test_a_changed_member(package):
    data = bytearray(package.read_bytes())
    data[data.index(b"not a real graph")] ^= 1
    package.write_bytes(data)
    found = hashlib.sha256(b"oot a real graph").hexdigest()[:12]
    expected = hashlib.sha256(CONTENTS["graphs/forward.onnx"]).hexdigest()[:12]
    assert refusal(package) == (
        f"{package}: graphs/forward.onnx is not what the manifest declares (expected 16 bytes,"
        f" sha256 {expected}; found 16 bytes, sha256 {found}); the package was changed or damaged:"
        " copy it again"
    )


def test_a_member_that_changes_while_the_package_is_open(tmp_path):
    """Written over in its place: the file is still the one that was checked."""
    name, content = "graphs/large.onnx", bytes(range(256)) * 1024  # larger than any buffer of a file
    contents = {**CONTENTS, name: content}
    package = tmp_path / "pkg.tar"
    write_bundle(package, manifest(contents), contents)
    with Bundle(package) as bundle:
        assert bundle.read(name) == content
        with package.open("r+b") as file:
            file.seek(package.read_bytes().index(content) + 100_000)
            file.write(b"other")
        with pytest.raises(
            ArtifactError, match=f"{name} was changed while the package is in use; copy it again"
        ):
            bundle.read(name)


def test_a_changed_manifest(package):
    data = package.read_bytes()
    package.write_bytes(data.replace(b'"energy": 0.7', b'"energy": 0.8', 1))
    assert refusal(package) == (
        f"{package}: manifest.json is not what manifest.sha256 declares; the package was changed or damaged:"
        " copy it again"
    )


def test_missing_file_and_folder(tmp_path):
    assert refusal(tmp_path / "none.tar") == (
        f"{tmp_path}/none.tar: cannot open the package (No such file or directory); make one with lance-host"
        " calibrate"
    )
    assert "cannot open the package (Is a directory)" in refusal(tmp_path)


@pytest.mark.parametrize("data", [b"", b"text", bytes(511), random.Random(0).randbytes(20_000)])
def test_not_a_tar(tmp_path, data):
    (tmp_path / "pkg.tar").write_bytes(data)
    message = refusal(tmp_path / "pkg.tar")
    assert ": not a readable package (" in message
    assert message.endswith("expected an uncompressed tar from lance-host; it may be cut off: copy it again")


def test_a_compressed_package(package):
    package.write_bytes(gzip.compress(package.read_bytes()))
    assert "expected an uncompressed tar from lance-host" in refusal(package)


def test_an_empty_tar(tmp_path):
    (tmp_path / "pkg.tar").write_bytes(bytes(10240))
    assert refusal(tmp_path / "pkg.tar").endswith("an empty tar; expected a package of lance-host")


# --- packages made by hand ---


def forge(path, members, encoded=None):
    """A tar of the manifest, its digest and any `(TarInfo or name, data)`, whatever they say."""
    encoded = encode(manifest()) if encoded is None else encoded
    digest = f"{hashlib.sha256(encoded).hexdigest()}  manifest.json\n".encode()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [(MANIFEST_MEMBER, encoded), (DIGEST_MEMBER, digest), *members]:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def entry(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_forgery_of_the_good_package_is_the_good_package(package, tmp_path):
    """The forgeries below are refused for what they change, not for how they are made."""
    assert forge(tmp_path / "other.tar", CONTENTS.items()).read_bytes() == package.read_bytes()


@pytest.mark.parametrize(
    "member",
    [
        "../evil",
        "graphs/../../evil",
        "/etc/evil",
        "graphs\\..\\evil",
        entry("weights.npz", tarfile.SYMTYPE, "/etc/passwd"),
        entry("weights.npz", tarfile.LNKTYPE, "manifest.json"),
        entry("graphs", tarfile.DIRTYPE),
        entry("pipe", tarfile.FIFOTYPE),
        entry("device", tarfile.CHRTYPE),
    ],
    ids=lambda member: str(member if isinstance(member, str) else member.name),
)
def test_members_that_escape(tmp_path, member):
    path = forge(tmp_path / "pkg.tar", [*CONTENTS.items(), (member, b"")])
    name = member if isinstance(member, str) else member.name
    assert refusal(path) == (
        f"{path}: member {name!r} is a link, a folder or a path that escapes; a package holds plain files only:"
        " do not use this file"
    )


@pytest.mark.parametrize("name", [*CONTENTS, MANIFEST_MEMBER, DIGEST_MEMBER])
def test_duplicate_members(tmp_path, name):
    path = forge(tmp_path / "pkg.tar", [*CONTENTS.items(), (name, b"second")])
    assert refusal(path) == f"{path}: a member stands twice; the package was changed: do not use this file"


def test_members_that_differ_from_the_manifest(tmp_path):
    path = tmp_path / "pkg.tar"
    end = "; the package was changed: copy it again from where it was made"
    forge(path, [*CONTENTS.items(), ("extra", b"")])
    assert refusal(path) == f"{path}: members differ from the manifest: ['extra']{end}"
    forge(path, list(CONTENTS.items())[1:])
    assert refusal(path) == f"{path}: members differ from the manifest: ['graphs/forward.onnx']{end}"
    forge(path, list(CONTENTS.items())[::-1])
    assert refusal(path) == f"{path}: members differ from the manifest: their order{end}"


@pytest.mark.parametrize("size", [15, 17, 100_000])
def test_a_member_of_another_size(tmp_path, size):
    contents = {**CONTENTS, "graphs/forward.onnx": bytes(size)}
    path = forge(tmp_path / "pkg.tar", contents.items())
    message = refusal(path)
    assert f"found {size} bytes, sha256 not read);" in message
    assert "graphs/forward.onnx is not what the manifest declares (expected 16 bytes" in message


def test_the_manifest_is_not_first(tmp_path):
    path = tmp_path / "pkg.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("weights.npz"))
    assert refusal(path) == (
        f"{path}: expected manifest.json as first member, found 'weights.npz' of 0 bytes; this is not a package"
        " of lance-host"
    )


@pytest.mark.parametrize(
    "change",
    [{"uname": "me"}, {"mode": 0o600}, {"mtime": 1}, {"pax_headers": {"comment": "hello"}}],
    ids=lambda change: next(iter(change)),
)
def test_packed_again_by_another_program(tmp_path, change):
    path = tmp_path / "pkg.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(MANIFEST_MEMBER)
        for name, value in change.items():
            setattr(info, name, value)
        info.size = len(encode(manifest()))
        tar.addfile(info, io.BytesIO(encode(manifest())))
    assert "was packed by another program" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schema_version": SCHEMA_VERSION + 2},
            f"schema {SCHEMA_VERSION + 2}, this runtime reads {SCHEMA_VERSION}; install a newer lance-edge"
            " here, or rebuild the package with the version installed here",
        ),
        (
            {"schema_version": 0},
            f"expected schema {SCHEMA_VERSION}, found 0; rebuild the package with lance-host",
        ),
        (
            {"schema_version": "1"},
            f"expected schema {SCHEMA_VERSION}, found '1'; rebuild the package with lance-host",
        ),
        (
            {"schema_version": None},
            f"expected schema {SCHEMA_VERSION}, found None; rebuild the package with lance-host",
        ),
        (
            {"batch_size": "4"},
            f"manifest.json does not fit schema {SCHEMA_VERSION}: $.batch_size: expected int, found str;"
            " rebuild the package",
        ),
        (
            {"batch_size": 0, "variants": []},
            f"manifest.json does not fit schema {SCHEMA_VERSION}: expected a batch size of 1 or more, one"
            " variant or more; rebuild the package",
        ),
        (
            {"preprocessing": to_json(Preprocessing(8, 9, (0.5,) * 2, (0.5,) * 2, "area"))},
            f"manifest.json does not fit schema {SCHEMA_VERSION}: expected a mean and a positive std of 1 or 3"
            " channels, an interpolation of bilinear, bicubic, lanczos, nearest; rebuild the package",
        ),
        (
            {"split": {"seed": 0, "test_fraction": 1e308, "validation_fraction": 0.1}},
            f"manifest.json does not fit schema {SCHEMA_VERSION}: expected fractions of the split from 0 to"
            " below 1; rebuild the package",
        ),
        (
            {"surprise": 1},
            f"manifest.json does not fit schema {SCHEMA_VERSION}: $: missing fields [],"
            " unknown fields ['surprise']; rebuild the package",
        ),
    ],
)
def test_manifests_of_other_schemas(tmp_path, changes, message):
    value = {**json.loads(encode(manifest())), **changes}
    path = forge(tmp_path / "pkg.tar", CONTENTS.items(), json.dumps(value).encode())
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": NaN}', b'{"a": -Infinity}']
)
def test_manifests_that_are_not_json(tmp_path, data):
    path = forge(tmp_path / "pkg.tar", CONTENTS.items(), data)
    message = refusal(path)
    assert message.startswith(f"{path}: manifest.json is not JSON (")
    assert message.endswith("); copy the package again")


@pytest.mark.parametrize("data", [b"[]", b"3", b"null", b'"text"', b"{}"])
def test_json_that_is_no_manifest(data):
    with pytest.raises(ArtifactError) as raised:
        decode(data, "pkg.tar")
    assert str(raised.value) == (
        f"pkg.tar: expected schema {SCHEMA_VERSION}, found None; rebuild the package with lance-host"
    )


def test_manifest_round_trip():
    assert decode(encode(manifest()), "here") == manifest()


# --- writing ---


def test_disk_full_leaves_the_old_package(package, monkeypatch):
    before = package.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError) as raised:
        write_bundle(package, manifest(energy=0.9), CONTENTS)
    assert str(raised.value) == (
        f"{package}: cannot write (No space left on device); free some space or choose another place"
    )
    assert package.read_bytes() == before
    assert [entry.name for entry in package.parent.iterdir()] == ["pkg.tar"]


def test_a_member_that_is_missing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        write_bundle(tmp_path / "pkg.tar", manifest(), {})
    assert list(tmp_path.iterdir()) == []


def test_packages_of_schema_1_have_no_tasks():
    value = json.loads(encode(manifest()))
    for name in ("task", "head", "tasks", "protected", "frozen"):
        del value[name]
    for plan in (plan for one in value["variants"] for plan in one["layers"]):
        del plan["factor_bytes"]
    found = decode(json.dumps(value | {"schema_version": 1}).encode(), "pkg.tar")
    assert found == dataclasses.replace(manifest(), task="", head=())
    assert (found.tasks, found.protected, found.frozen) == ((), (), ())


@pytest.mark.parametrize(
    "damage",
    [{"variants": 3}, {"variants": [3]}, {"variants": [{"layers": 3}]}, {"variants": [{"layers": [3]}]}],
)
def test_damaged_packages_of_schema_1_are_refused(damage):
    value = json.loads(encode(manifest())) | {"schema_version": 1} | damage
    with pytest.raises(ArtifactError, match=f"does not fit schema {SCHEMA_VERSION}"):
        decode(json.dumps(value).encode(), "pkg.tar")


EARLIER = Task("cats", ("tabby", "tiger"), (TensorSpec("head.weight", (2, 8), "float32"),))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "cats"}, "tasks with different names of letters, digits, dots and dashes"),
        ({"task": "a/b"}, "tasks with different names of letters, digits, dots and dashes"),
        ({"task": ""}, "tasks with different names of letters, digits, dots and dashes"),
        ({"task": ".."}, "tasks with different names of letters, digits, dots and dashes"),
        ({"tasks": (dataclasses.replace(EARLIER, classes=("tabby",)),)}, "two or more classes of every task"),
        ({"head": ("other.weight",)}, "a head of fixed shape of every task"),
        ({"tasks": (), "protected": ("conv",)}, "protected layers, or frozen ones, after an earlier task"),
        ({"frozen": (FrozenLayer("conv", "used up"),)}, "no layer both trained and frozen"),
    ],
)
def test_tasks_that_mean_nothing_are_refused(tmp_path, changes, expected):
    sound = {"task": "dogs", "tasks": (EARLIER,), "head": ("head.weight",), "protected": ("conv",)}
    write_bundle(tmp_path / "pkg.tar", manifest(**sound), CONTENTS)
    with Bundle(tmp_path / "pkg.tar") as bundle:
        assert bundle.manifest.tasks == (EARLIER,)
    write_bundle(tmp_path / "pkg.tar", manifest(**{**sound, **changes}), CONTENTS)
    assert f"does not fit schema {SCHEMA_VERSION}: expected {expected}; rebuild" in refusal(
        tmp_path / "pkg.tar"
    )
