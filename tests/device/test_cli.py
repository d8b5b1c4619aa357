import json
import math
import os
import resource
import subprocess
import sys

import numpy as np
import onnx
import pytest
from device_harness import lance_device, refused, spawn, started, train, train_words
from onnx import helper, numpy_helper
from PIL import Image
from tiny_package import CLASSES, PREPROCESSING, SPLIT, write_images, write_tiny_package

from lance_edge.datasets import open_dataset
from lance_edge.images import load_batch
from lance_edge.records import to_json


@pytest.fixture(scope="module")
def run(package, images, tmp_path_factory):
    """A trained run that classifies well."""
    out = tmp_path_factory.mktemp("cli") / "run"
    started(train(package, images, out, "--epochs", 60, "--lr", 1.0, "--method", "bp", "--quiet"))
    return out


@pytest.fixture
def tested(package, run):
    return ("--artifact", package.path, "--checkpoint", run / "last.npz", "--threads", 1)


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["predict"]])
def test_help_teaches_with_an_example(command):
    output = started(lance_device(*command, "--help")).stdout
    assert "lance-device " in output
    assert "--artifact pkg.tar" in output


def test_help_is_quick():
    command = [sys.executable, "-c", "from lance_device.cli import main; main()", "--help"]
    times_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times_s) < 0.3  # processor time: the machine may be busy with other things


def test_version():
    assert "lance-device, version" in started(lance_device("--version")).stdout


def test_eval_prints_accuracy_and_loss(tested, images):
    output = started(lance_device("eval", *tested, "--data", images)).stdout
    head, *lines = output.splitlines()
    assert head.startswith("test: accuracy ")
    assert "of 15 images, loss " in head
    assert [line.split()[0] for line in lines] == list(CLASSES)
    assert all(line.endswith("of 5") for line in lines)


@pytest.mark.parametrize(("part", "count"), [("test", 15), ("validation", 9), ("train", 36)])
def test_eval_as_json(tested, images, part, count):
    result = started(lance_device("eval", *tested, "--data", images, "--part", part, "--json"))
    value = json.loads(result.stdout)
    assert value["part"] == part
    assert value["images"] == count
    correct = sum(entry["correct"] for entry in value["classes"].values())
    assert value["accuracy"] == pytest.approx(correct / count)
    assert value["loss"] > 0


def test_eval_agrees_with_the_history_of_the_run(tested, images, run):
    value = json.loads(started(lance_device("eval", *tested, "--data", images, "--json")).stdout)
    record = json.loads((run / "run.json").read_text())
    assert value["accuracy"] == pytest.approx(record["result"]["test_accuracy"])


def test_eval_of_an_empty_part(images, tmp_path):
    package = write_tiny_package(tmp_path / "pkg.tar", split=type(SPLIT)(0, 0.25, 0.0))
    started(train(package, images, tmp_path / "run", "--steps", 1, "--quiet"))
    flags = ("--artifact", package.path, "--checkpoint", tmp_path / "run/last.npz", "--part", "validation")
    assert "the validation part has no images" in refused(lance_device("eval", *flags, "--data", images), 5)


def test_predict_files_and_folders(tested, images, tmp_path):
    single = tmp_path / "grey picture.png"
    Image.new("L", (40, 30), 90).save(single)
    output = started(lance_device("predict", *tested, images / "red", single, "--top", 2)).stdout
    lines = output.splitlines()
    assert len(lines) == 21
    assert all(line.count("%") == 2 for line in lines)
    shares = [float(word) for word in lines[0].split() if word.replace(".", "").isdigit()]
    assert shares == sorted(shares, reverse=True)


def test_predict_as_json_finds_the_classes(tested, images):
    entries = json.loads(started(lance_device("predict", *tested, images, "--json")).stdout)
    assert len(entries) == 60
    right = [entry["predictions"][0]["class"] in entry["file"] for entry in entries]
    assert np.mean(right) > 0.6
    assert sum(choice["probability"] for choice in entries[0]["predictions"]) == pytest.approx(1)


@pytest.fixture(scope="module")
def merged(package, run, tmp_path_factory):
    """What `lance-host merge -o model.onnx` writes: prefix and tail with the trained weights inside."""
    with np.load(run / "last.npz") as archive:
        weights = {name: archive[name] for name in ("conv.weight", "head.weight", "head.bias")}
    weights |= {"stem": package.weights["stem.weight"], "axes": np.array([2, 3])}
    nodes = [
        helper.make_node("Conv", ["images", "stem"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "conv.weight"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("ReduceMean", ["d", "axes"], ["e"], keepdims=0),
        helper.make_node("Gemm", ["e", "head.weight", "head.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "merged",
        [helper.make_tensor_value_info("images", 1, ["N", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", 1, ["N", 3])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    values = {"classes": json.dumps(CLASSES), "preprocessing": json.dumps(to_json(PREPROCESSING))}
    helper.set_model_props(model, values)
    path = tmp_path_factory.mktemp("merged") / "model.onnx"
    onnx.save(model, path)
    return path


def test_predict_with_a_plain_model_says_the_same(tested, images, merged):
    a = json.loads(started(lance_device("predict", *tested, images, "--json")).stdout)
    b = json.loads(started(lance_device("predict", "--model", merged, images, "--json")).stdout)
    for one, other in zip(a, b, strict=True):
        assert one["file"] == other["file"]
        for x, y in zip(one["predictions"], other["predictions"], strict=True):
            assert x["class"] == y["class"]
            assert x["probability"] == pytest.approx(y["probability"], abs=1e-5)


def test_predictions_agree_with_numpy(merged, images):
    import onnxruntime

    part = open_dataset(images, SPLIT).test
    session = onnxruntime.InferenceSession(str(merged), providers=["CPUExecutionProvider"])
    batch = load_batch(part, range(len(part)), PREPROCESSING)
    logits = session.run(None, {"images": batch})[0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    files = [images / name for name in part.names]
    entries = json.loads(started(lance_device("predict", "--model", merged, *files, "--json")).stdout)
    found = {entry["file"]: entry["predictions"][0]["probability"] for entry in entries}
    for file, row in zip(files, expected, strict=True):
        assert found[str(file)] == pytest.approx(row.max(), abs=1e-5)


def test_models_that_cannot_be_used(merged, images, tmp_path):
    plain = tmp_path / "plain.onnx"
    model = onnx.load(merged)
    del model.metadata_props[:]
    onnx.save(model, plain)
    line = refused(lance_device("predict", "--model", plain, images), 6)
    assert "its metadata must hold classes and preprocessing as JSON (no classes)" in line
    assert "cannot open the model" in refused(
        lance_device("predict", "--model", tmp_path / "no.onnx", images), 6
    )
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert "not a graph that lance-edge runs" in refused(
        lance_device("predict", "--model", tmp_path / "junk.onnx", images), 3
    )
    broken = json.dumps(to_json(PREPROCESSING) | {"resolution": -1, "resize": 10**9, "std": [math.nan] * 3})
    helper.set_model_props(model, {"classes": '["a"]', "preprocessing": broken})
    onnx.save(model, plain)
    assert (
        "as JSON (expected a resolution of 1 or more, a resolution of at most 16384, a mean and a positive"
        " std of 1 or 3 channels)" in refused(lance_device("predict", "--model", plain, images), 6)
    )
    helper.set_model_props(model, {"classes": '["a"]', "preprocessing": json.dumps(to_json(PREPROCESSING))})
    onnx.save(model, plain)
    line = refused(lance_device("predict", "--model", plain, images), 6)
    assert "gives 3 logits but names 1 classes" in line


def test_predict_of_what_is_no_image(tested, tmp_path):
    assert "no such file or folder" in refused(lance_device("predict", *tested, tmp_path / "none.jpg"), 5)
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    assert "cannot read this image" in refused(lance_device("predict", *tested, tmp_path / "torn.jpg"), 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "a.jpg"], "give --artifact and --checkpoint, or --model alone"),
        (["predict", "--artifact", "p.tar", "a.jpg"], "give --artifact and --checkpoint, or --model alone"),
        (["predict", "--model", "m.onnx", "--checkpoint", "c.npz", "a.jpg"], "or --model alone"),
        (["predict", "--model", "m.onnx"], "FILES_OR_FOLDERS"),
        (["train", "--lr", "nan"], "expected a finite number, found 'nan'"),
        (["train", "--lr", "0"], "0 is not in the range"),
        (["train", "--threads", "0"], "expected auto or a whole number from 1, found '0'"),
        (["train", "--micro-batch", "few"], "expected auto or a whole number from 1, found 'few'"),
        (
            ["train", "--checkpoint-every", "5h"],
            "expected minutes such as 5m, or steps such as 200, found '5h'",
        ),
        (["train", "--checkpoint-every", "0"], "expected minutes such as 5m, or steps such as 200, found '0'"),
        (["train", "--epochs", "0"], "0 is not in the range"),
        (["train"], "Missing option '--data'"),
        (["eval", "--part", "some"], "'some' is not one of 'test', 'validation', 'train'"),
    ],
)
def test_usage_errors(arguments, words):
    result = lance_device(*arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
@pytest.mark.parametrize(
    ("prelude", "words"),
    [
        (
            "import sys, platform; sys.maxsize = 2**31 - 1; platform.machine = lambda: 'armv7l'",
            "this is a 32-bit Python on armv7l: there is no onnxruntime wheel for 32-bit ARM;",
        ),
        (
            "import importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'onnxruntime' else find(name, *a)",
            "onnxruntime is not installed in",
        ),
    ],
)
def test_a_machine_without_onnxruntime(package, images, tmp_path, run, command, prelude, words):
    checkpoint = ("--artifact", package.path, "--checkpoint", run / "last.npz")
    words_of = {
        "train": train_words(package, images, tmp_path / "run"),
        "eval": ("eval", *checkpoint, "--data", images),
        "predict": ("predict", *checkpoint, images),
    }
    process = spawn(*words_of[command], prelude=prelude)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 9
    assert errors.startswith("error: ")
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_other_class_folders(package, images, tmp_path):
    other = write_images(tmp_path / "images")
    (other / "red").rename(other / "rot")
    line = refused(train(package, other, tmp_path / "run"), 5)
    assert "'red'" in line
    assert "'rot'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(package, images, tmp_path):
    tmp_path.chmod(0o500)
    line = refused(train(package, images, tmp_path / "run"), 8)
    tmp_path.chmod(0o700)
    assert "cannot make this folder" in line


def test_a_run_folder_that_is_a_file(package, images, tmp_path):
    (tmp_path / "run").write_text("")
    assert "cannot make this folder" in refused(train(package, images, tmp_path / "run"), 8)


def test_a_closed_terminal_does_not_stop_a_run(package, images, tmp_path):
    process = spawn(*train_words(package, images, tmp_path / "run"), "--steps", 5)
    process.stderr.close()
    process.stdout.read()
    process.wait(timeout=60)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
