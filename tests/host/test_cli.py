"""Every message that `lance-host` prints: one line that says what is wrong and what to do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lance_host
from lance_edge.sealed import write_sealed
from lance_host.cli_options import progress_bars, wrote


@pytest.fixture
def refused(lance_host):
    """Run a command that must fail with an exit code; gives its one line on stderr."""

    def run(exit_code, *words):
        result = lance_host(*words)
        assert result.exit_code == exit_code, (result.output, result.exception)
        assert "Traceback" not in result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def small(photos, start_weights, tmp_path):
    """A calibration that would work, with its output in an empty folder."""
    (tmp_path / "out").mkdir()
    return (
        "calibrate",
        *("--data", photos, "--weights", start_weights, "--model", "mcunet-10fps-vww"),
        *("-o", tmp_path / "out" / "pkg.tar"),
    )


def nothing_in(tmp_path):
    return not list((tmp_path / "out").iterdir())


# --- help ---


@pytest.mark.parametrize(
    "command", [[], ["calibrate"], ["layers"], ["inspect"], ["merge"], ["sample-data"], ["continual"]]
)
def test_help_teaches_with_an_example(command, lance_host):
    result = lance_host(*command, "--help")
    assert result.exit_code == 0
    assert f"lance-host {' '.join(command) or 'calibrate'} " in result.stdout


def test_version(lance_host):
    assert lance_host("--version").stdout.startswith("lance-host, version ")


# --- calibrate ---


REFUSED = {
    "model": (
        6,
        ["--model", "resnet"],
        "--model resnet: no such network; lance-host knows mcunet, ",
    ),
    "method": (
        2,
        ["--methods", "lance,sgd"],
        "--methods: expected all, or some of bp, lance, asi, hosvd, found sgd",
    ),
    "no method": (
        2,
        ["--methods", ","],
        "--methods: expected all, or some of bp, lance, asi, hosvd, found none",
    ),
    "energy too small": (2, ["--energy", "0"], "--energy: expected a share above 0 and at most 1, found 0.0"),
    "energy too large": (2, ["--energy", "70"], "found 70.0; the paper uses 0.7"),
    "layers in words": (
        6,
        ["--layers", "four"],
        "--layers four: expected a count such as 4, several such as 1-10 or 2,4, or pointwise:4",
    ),
    "layers below zero": (6, ["--layers", "-1"], "--layers -1: expected a count"),
    "layers of no kind": (6, ["--layers", "depthwise:2"], "--layers depthwise:2: expected a count"),
    "layers without count": (6, ["--layers", "pointwise:"], "--layers pointwise:: expected a count"),
    "too many layers": (6, ["--layers", "400"], "the network has only 42 such layers; ask for fewer"),
    "data": (5, ["--data", "no-such-folder"], "no-such-folder: no such folder; give a folder of class folders"),
    "batch too large": (5, ["--batch-size", "40"], "at most the 39 training images, found 40; ask for 16"),
    "batch too small": (5, ["--batch-size", "0"], "batch size: expected at least 1, found 0"),
    "no batch": (2, ["--batches", "0"], "--batches: expected 1 or more, found 0"),
    "seed": (2, ["--seed", "-1"], "--seed: expected 0 or more, found -1"),
    "threads": (2, ["--threads", "0"], "--threads: expected 1 or more, found 0"),
    "layers of another network": (
        6,
        ["--layers", "layer4.*"],
        "no layer is called 'layer4.*', or it takes no part: lance-host layers lists them",
    ),
    "resolution": (2, ["--resolution", "16"], "--input-size: expected 32 or more, found 16"),
    "input size": (2, ["--input-size", "16"], "--input-size: expected 32 or more, found 16"),
    "mean": (2, ["--mean", "0.1,0.2"], "--mean: expected one number or three, found 2"),
    "std": (2, ["--std", "0"], "--std: expected numbers above 0, found 0"),
    "interpolation": (2, ["--interpolation", "area"], "--interpolation: expected one of bilinear, bicubic,"),
    "head": (
        6,
        ["--head", "fc"],
        "--head fc: the network has no module of this name; it could be classifier.linear",
    ),
    "nothing to train": (6, ["--head", "none", "--layers", "0"], "--layers 0 --head none: nothing is left to"),
    "file": (
        6,
        ["--model", "no.py:make"],
        "--model no.py:make: no.py is no file; give the path of a Python file",
    ),
    "library": (
        9,
        ["--model", "timm:net"],
        "--model timm:net: timm is not installed; install it with: pip install",
    ),
    "onnx": (6, ["--model", "no.onnx"], "--model no.onnx: no such file; give the path of an ONNX model"),
    "validation": (2, ["--validation", "1"], "--validation: expected a share from 0 to below 1, found 1.0"),
    "budget of no size": (
        2,
        ["--memory-budget", "64k"],
        "--memory-budget: expected a size such as 512B, 256KiB or 1.5MiB, found '64k'",
    ),
    "budget of a method without ranks": (
        2,
        ["--memory-budget", "bp=64KiB"],
        "--memory-budget: expected a budget for lance, found 'bp=64KiB'; write it as 256KiB",
    ),
    "budget for bp alone": (
        2,
        ["--memory-budget", "64KiB", "--methods", "bp"],
        "--memory-budget: expected one of the methods lance, asi, whose ranks are fixed",
    ),
    "budget too small": (2, ["--memory-budget", "1KiB"], "--memory-budget of lance: expected at least"),
    "budget too large": (2, ["--memory-budget", "9MiB"], "inputs of the 4 layers fit as they are"),
    "weights": (6, ["--weights", "no.pth"], "--weights no.pth: cannot read (No such file or directory)"),
    "weights of another network": (6, ["--model", "mcunet"], "start.pth: does not fit mcunet;"),
}


@pytest.mark.parametrize(
    "case",
    [  # both take a whole export; test_budget.py has the rules
        pytest.param(case, marks=pytest.mark.slow) if case.startswith("budget too") else case
        for case in REFUSED
    ],
)
def test_calibrate_refuses_in_one_line(case, small, refused, tmp_path):
    exit_code, words, message = REFUSED[case]
    assert message in refused(exit_code, *small, *words)
    assert nothing_in(tmp_path)


def test_one_training_image_is_not_enough(refused, small, tmp_path, photos):
    for name in ("disc", "square"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "a.jpg").write_bytes((photos / name / f"{name}00.jpg").read_bytes())
    line = refused(5, *small, "--data", tmp_path / "few")
    assert "class 'disc' has 1 image; expected 2 or more" in line


def test_an_unreadable_image_is_named(refused, small, tmp_path, photos, monkeypatch):
    for name in ("disc", "square"):
        (tmp_path / "few" / name).mkdir(parents=True)
        data = (photos / name / f"{name}00.jpg").read_bytes()
        for number in range(4):
            (tmp_path / "few" / name / f"{number}.jpg").write_bytes(data[:500])  # cut off
    # Images are first read after the capture, which takes seconds and is not what is tested here.
    monkeypatch.setattr("lance_host.build.capture_selections", lambda *_: [SimpleNamespace(layers=())])
    monkeypatch.setattr("lance_host.build.compile_variants", lambda *_: ())
    monkeypatch.setattr("lance_host.build.check_trainable", lambda *_: None)
    line = refused(5, *small, "--data", tmp_path / "few", "--layers", 0)
    assert re.search(r"few/(disc|square)/\d.jpg: cannot read this image \(", line)
    assert "replace or remove it; no other image of its class can be read either" in line
    assert nothing_in(tmp_path)


def test_the_output_is_a_folder(small, refused, tmp_path):
    line = refused(2, *small, "-o", tmp_path / "out")
    assert f"{tmp_path / 'out'}: is a folder; name the package file, for instance pkg.tar" in line
    assert nothing_in(tmp_path)


def test_the_output_cannot_be_written(small, refused, tmp_path):
    (tmp_path / "out" / "file").touch()
    line = refused(8, *small, "-o", tmp_path / "out" / "file" / "pkg.tar")
    assert "pkg.tar: cannot write (" in line
    assert line.endswith("this file is no folder); choose another place")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        ["--mean", "a,b"],
        ["--std", ""],
        ["--energy", "much"],
        ["--batch-size", "1.5"],
        ["--nonsense"],
        ["--seed", ""],
    ],
    ids=str,
)
def test_words_that_click_does_not_understand_are_a_usage_error(words, small, lance_host, tmp_path):
    result = lance_host(*small, *words)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "Traceback" not in result.output
    assert nothing_in(tmp_path)


def test_messages_of_several_lines_become_one(lance_host, monkeypatch, small):
    from lance_edge.errors import ModelError

    def fail(*_):
        raise ModelError("first line\n  second line\n\nthird")

    monkeypatch.setattr("lance_host.build.calibrate", fail)
    result = lance_host(*small)
    assert result.stderr == "error: first line second line third\n"
    assert result.exit_code == 6


def test_ctrl_c_while_calibrating_leaves_nothing(small, spawn_host, tmp_path):
    process = spawn_host(*small)
    for line in process.stdout:
        if line.startswith("batch size"):  # the last word before the network is captured, which takes seconds
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "stopped; nothing was written"
    assert "Traceback" not in errors
    assert nothing_in(tmp_path)


# --- inspect ---


def test_inspect_shows_network_ranks_and_bytes(lance_host, photo_package):
    result = lance_host("inspect", photo_package)
    assert result.exit_code == 0
    for word in ("mcunet-10fps-vww", "disc, square, stripes", "blocks.13", "lance", "bp"):
        assert word in result.stdout


def test_inspect_of_a_missing_package(refused, tmp_path):
    assert "cannot open the package (No such file or directory)" in refused(3, "inspect", tmp_path / "no.tar")


def test_inspect_of_a_folder(refused, tmp_path):
    assert "cannot open the package (Is a directory)" in refused(3, "inspect", tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_package_that_is_cut_off_is_refused(share, refused, photo_package, tmp_path):
    data = photo_package.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(share * (len(data) - 10_240))])  # without the tar's padding
    assert f"{tmp_path / 'cut.tar'}: " in refused(3, "inspect", tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("place", "offset"),
    [
        (b'"energy": 0.7', 12),
        (b"graphs/lance-4/prefix.onnx\0", 3),
        (b"graphs/lance-4/prefix.onnx\0", 5_000),
        (b"weights.npz\0", 100_000),
        (b"projections.npz\0", 2),
    ],
)
def test_a_package_with_a_changed_byte_is_refused(place, offset, refused, photo_package, tmp_path):
    data, changed = photo_package.read_bytes(), tmp_path / "changed.tar"
    position = data.index(place) + offset
    changed.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
    assert f"{changed}: " in refused(3, "inspect", changed)


def test_inspect_of_one_count_names_those_there_are(refused, photo_package):
    line = refused(3, "inspect", photo_package, "--layers", 3)
    assert "this package holds method lance with --layers 4, not 3; choose one of these, or" in line


# --- merge ---


@pytest.fixture
def merge_words(photo_package, trained, tmp_path):
    """A merge that would work, with its output in an empty folder; options given later win."""
    (tmp_path / "out").mkdir()
    return (
        *("merge", "--artifact", photo_package, "--checkpoint", trained["lance"] / "last.npz"),
        *("-o", tmp_path / "out" / "finetuned.pth"),
    )


def test_merge_says_what_it_wrote(merge_words, lance_host, tmp_path):
    result = lance_host(*merge_words)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"wrote {tmp_path / 'out' / 'finetuned.pth'} (")


def test_merge_with_an_unknown_ending(merge_words, refused, tmp_path):
    line = refused(2, *merge_words, "-o", tmp_path / "out" / "finetuned.h5")
    assert "finetuned.h5: expected an ending of .pth, .safetensors, .onnx, found .h5" in line
    assert nothing_in(tmp_path)


def test_merge_without_the_checkpoint(merge_words, refused, tmp_path):
    line = refused(4, *merge_words, "--checkpoint", tmp_path / "no.npz")
    assert f"{tmp_path / 'no.npz'}: " in line
    assert "give the last.npz or best.npz of a run" in line
    assert nothing_in(tmp_path)


def test_merge_with_a_checkpoint_of_another_package(merge_words, refused, trained, tmp_path):
    with np.load(trained["lance"] / "last.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "sha256"}
    meta = json.loads(str(arrays.pop("meta"))) | {"artifact_sha256": "0" * 64}
    with (tmp_path / "other.npz").open("wb") as file:
        write_sealed(file, {**arrays, "meta": np.array(json.dumps(meta))})
    line = refused(4, *merge_words, "--checkpoint", tmp_path / "other.npz")
    assert "other.npz: belongs to another package: expected " in line
    assert "found 000000000000 (mcunet-10fps-vww" in line
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_merge_with_a_checkpoint_that_is_cut_off(share, merge_words, refused, trained, tmp_path):
    data = (trained["lance"] / "last.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: int(share * len(data))])
    line = refused(4, *merge_words, "--checkpoint", tmp_path / "cut.npz")
    assert "cut.npz: not a readable checkpoint (" in line
    assert nothing_in(tmp_path)


def test_merge_with_changed_weights(merge_words, refused, trained, tmp_path):
    data, changed = (trained["lance"] / "last.npz").read_bytes(), tmp_path / "changed.npz"
    for name in ("classifier.linear.weight", "blocks.13.mobile_inverted_conv.depth_conv.conv.weight"):
        position = data.index(f"{name}.npy".encode()) + 500  # past the headers of zip and npy
        changed.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert "changed.npz: not a readable checkpoint (Bad CRC-32" in refused(
            4, *merge_words, "--checkpoint", changed
        )
        assert nothing_in(tmp_path)


def test_merge_to_a_place_that_cannot_be_written(merge_words, refused, tmp_path):
    (tmp_path / "out" / "file").touch()
    line = refused(8, *merge_words, "-o", tmp_path / "out" / "file" / "finetuned.pth")
    assert "finetuned.pth: cannot write (" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


# --- without the host extra ---


def run_entry(code, *options):
    """The entry point in a Python that sees our packages, after `code`."""
    paths = [str(Path(folder).parent) for folder in lance_host.__path__]
    start = f"import sys; sys.path[:0] = {paths!r}\n{code}\nfrom lance_host.entry import main; main()"
    return subprocess.run(
        [sys.executable, "-I", *options, "-c", start, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": ""},
    )


def test_without_the_extra_one_line_says_what_to_install():
    done = run_entry("", "-S")  # -S: no installed packages at all, not even click
    assert done.returncode == 9
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: torch, onnx, onnx_ir, onnxscript, networkx, safetensors not installed; lance-host needs the"
        " host extra: pip install '.[host]' in a clone of the project"
    )


def test_with_a_part_of_the_extra_only_what_lacks_is_named():
    hide = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "safetensors" else real(name)
"""
    done = run_entry(hide)
    assert done.returncode == 9
    assert done.stderr.startswith("error: safetensors not installed; ")


def test_with_the_extra_the_command_line_starts():
    done = run_entry("")
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_progress_is_for_terminals(capsys, monkeypatch):
    with progress_bars() as progress:
        progress("calibrate", 1, 2)
        progress("calibrate", 2, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bars() as progress:
        progress("calibrate", 2, 2)
    assert "calibrate" in capsys.readouterr().err


def test_what_was_written_has_its_size(tmp_path):
    (tmp_path / "small.npz").write_bytes(bytes(24 << 10))
    assert wrote(tmp_path / "small.npz") == f"wrote {tmp_path / 'small.npz'} (24.00 KiB)"
