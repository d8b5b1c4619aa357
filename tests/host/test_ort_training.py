"""The graphs of `export-ort`, without onnxruntime-training: their form, what they compute, what is refused.

`tests/ort_training` trains with them.
"""

import errno
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lance_device.features import Batch, Unmetered
from lance_device.graphs import load_network, starting_parameters
from lance_device.step import training_step
from lance_edge.bundle import Bundle
from lance_edge.datasets import open_dataset
from lance_edge.errors import ArtifactError, DataError, LanceError, ModelError, PlatformError, StorageError
from lance_host.ort_training import export
from lance_host.ort_training.export import Request, export_artifacts
from lance_host.ort_training.join import join
from lance_host.ort_training.models import _checked, evaluation_model, optimizer_model, training_model

METHODS = ("lance", "bp")


@pytest.fixture(scope="module")
def bundle(photo_package):
    with Bundle(photo_package) as opened:
        yield opened


@pytest.fixture(scope="module")
def batch(bundle, photos):
    manifest = bundle.manifest
    part = open_dataset(photos, manifest.split, manifest.classes).train
    size = manifest.batch_size
    return Batch(part, np.arange(size), np.zeros(size, bool), manifest.preprocessing)


def names(values):
    return [value.name for value in values]


def dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# --- form ---


@pytest.mark.parametrize("method", METHODS)
def test_the_training_model_has_the_signature_of_the_api(method, bundle):
    variant = bundle.manifest.variant(method)
    model = training_model(bundle, variant)
    onnx.checker.check_model(model, full_check=True)
    graph, trained = model.graph, list(variant.parameters)
    buffers = [f"{name}_grad.accumulation.buffer" for name in trained]
    assert names(graph.input) == ["images", "labels", *trained, *buffers, "lazy_reset_grad"]
    done = [f"{name}_grad.accumulation.out" for name in trained]
    assert names(graph.output) == ["loss", "logits", *done]
    assert not set(names(graph.initializer)) & set(names(graph.input)), "parameters are inputs alone"
    by_name = {value.name: value for value in graph.input}
    for name, buffer in zip(trained, buffers, strict=True):
        assert dims(by_name[name]) == dims(by_name[buffer])
    reset = by_name["lazy_reset_grad"].type.tensor_type
    assert (reset.elem_type, dims(by_name["lazy_reset_grad"])) == (TensorProto.BOOL, [1])
    accumulators = [node for node in graph.node if node.domain]
    assert [(node.domain, node.op_type, *node.input, *node.output) for node in accumulators] == [
        ("com.microsoft", "InPlaceAccumulatorV2", buffer, f"{name}_grad", "lazy_reset_grad", out)
        for name, buffer, out in zip(trained, buffers, done, strict=True)
    ]


def test_lance_is_for_its_batch_size_and_bp_for_any(bundle):
    size = bundle.manifest.batch_size
    for method, samples in (("lance", size), ("bp", "N")):
        variant = bundle.manifest.variant(method)
        graph = training_model(bundle, variant).graph
        assert dims(graph.input[0]) == [samples, 3, 96, 96]
        assert dims(graph.input[1]) == [samples]
        held = set(names(graph.initializer))
        assert set(variant.projection_ranks) <= held
        assert bool(variant.projection_ranks) == (method == "lance")


def test_the_evaluation_model_has_the_same_parameters_in_the_same_order(bundle):
    variant = bundle.manifest.variant("lance")
    graph = evaluation_model(bundle, variant).graph
    assert names(graph.input) == ["images", "labels", *variant.parameters]
    assert names(graph.output) == ["loss", "logits"]
    assert dims(graph.input[0])[0] == "N"


@pytest.mark.parametrize("make", [training_model, evaluation_model])
def test_graphs_are_of_versions_that_the_library_reads(make, bundle):
    """onnxruntime-training 1.19.2 reads IR versions up to 10 and opsets up to 21."""
    model = make(bundle, bundle.manifest.variant("lance"))
    assert model.ir_version == 8
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    assert opsets[""] == 18
    assert set(opsets) <= {"", "com.microsoft"}
    assert {entry.key for entry in model.metadata_props} == {"classes", "preprocessing"}


@pytest.mark.parametrize(
    ("optimizer", "clip", "nodes", "moments"),
    [
        ("sgd", 0, ["SGDOptimizerV2"], 1),
        ("sgd", 2.0, ["InplaceClipGradNorm", "SGDOptimizerV2"], 1),
        ("adamw", 0, ["AdamWOptimizer"], 2),
        ("adamw", 1.0, ["InplaceClipGradNorm", "AdamWOptimizer"], 2),
    ],
)
def test_the_optimizer_model_has_the_signature_of_the_api(optimizer, clip, nodes, moments):
    model = optimizer_model(optimizer, clip)
    onnx.checker.check_model(model)
    graph = model.graph
    sequences = ["params", "gradients", "first_order_moments", "second_order_moments"][: 2 + moments]
    assert names(graph.input) == ["learning_rate", "step", *sequences]
    assert [dims(value) for value in graph.input[:2]] == [[1], [1]]
    kinds = [value.type.tensor_type.elem_type for value in graph.input[:2]]
    assert kinds == [TensorProto.FLOAT, TensorProto.INT64]
    for value in graph.input[2:]:
        assert value.type.sequence_type.elem_type.tensor_type.elem_type == TensorProto.FLOAT
    assert [node.op_type for node in graph.node] == nodes
    assert {node.domain for node in graph.node} == {"com.microsoft"}
    (flag,) = graph.output
    assert flag.type.tensor_type.elem_type == TensorProto.BOOL
    assert graph.node[-1].output == [flag.name]
    if clip:
        assert graph.node[0].attribute[0].f == pytest.approx(clip)
        assert graph.node[0].output[0] in graph.node[1].input
        assert "gradients" not in graph.node[1].input


# --- what they compute ---


def run_plain(model, feeds):
    """All outputs in the ordinary runtime, which has no accumulators: gradients take their place."""
    plain, graph = onnx.ModelProto(), model.graph
    plain.CopyFrom(model)
    gradients = {node.input[1]: node for node in graph.node if node.op_type == "InPlaceAccumulatorV2"}
    del plain.graph.node[:], plain.graph.output[:], plain.graph.input[:]
    plain.graph.node.extend(node for node in graph.node if node.op_type != "InPlaceAccumulatorV2")
    plain.graph.input.extend(value for value in graph.input if "_grad" not in value.name)
    plain.graph.output.extend(value for value in graph.output if "accumulation" not in value.name)
    plain.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in gradients
    )
    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, feeds), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_computes_what_the_graphs_of_the_package_compute_in_turn(method, bundle, batch):
    """The device's loop, which is checked against PyTorch, in micro-batches of 5."""
    variant = bundle.manifest.variant(method)
    weights = starting_parameters(bundle, variant)
    every = slice(None)
    fed = {"images": batch.images(every), "labels": batch.labels(every), **weights}
    found = run_plain(training_model(bundle, variant), fed)
    expected = training_step(bundle, variant, weights, 1).run(batch, 5, Unmetered(), lambda: None)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 1e-4
        # float32 sums in another order: about 1e-6 of the largest entry.
        np.testing.assert_allclose(found[f"{name}_grad"], gradient, atol=1e-5 * scale, err_msg=name)


def test_gradients_are_those_of_the_mean_over_however_many_images(bundle, batch):
    variant = bundle.manifest.variant("bp")
    model, weights = training_model(bundle, variant), starting_parameters(bundle, variant)
    parts = [
        run_plain(model, {"images": batch.images(rows), "labels": batch.labels(rows), **weights})
        for rows in (slice(0, 3), slice(3, 10), slice(0, 10))
    ]
    name = "classifier.linear.weight_grad"
    mean = (3 * parts[0][name] + 7 * parts[1][name]) / 10
    np.testing.assert_allclose(parts[2][name], mean, atol=1e-5 * np.abs(mean).max())


def test_the_evaluation_model_gives_pytorchs_loss_of_the_networks_logits(bundle, batch):
    variant = bundle.manifest.variant("bp")
    weights, rows = starting_parameters(bundle, variant), slice(0, 7)
    images, labels = batch.images(rows), batch.labels(rows)
    found = run_plain(evaluation_model(bundle, variant), {"images": images, "labels": labels, **weights})
    logits = load_network(bundle, variant, weights, 1)(images)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)


# --- joining ---


def branching(constant, produce):
    """`y = x + constant` where x > 0, else `x`, in branches that read x and the constant from around them."""
    less, scalar = helper.make_node("Greater", ["x", "zero"], ["positive"]), [1]
    info = helper.make_tensor_value_info
    yes = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["yes"])], "yes", [], [info("yes", TensorProto.FLOAT, scalar)]
    )
    no = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["no"])], "no", [], [info("no", TensorProto.FLOAT, scalar)]
    )
    nodes = [
        less,
        helper.make_node("If", ["positive"], ["chosen"], then_branch=yes, else_branch=no),
        helper.make_node("Identity", ["chosen"], [produce]),
    ]
    constants = [
        numpy_helper.from_array(np.array([value], np.float32), name)
        for name, value in (("c", constant), ("zero", 0))
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [info("x", TensorProto.FLOAT, scalar)],
            [info(produce, TensorProto.FLOAT, scalar)],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def test_parts_with_equal_names_inside_stay_apart_also_in_branches():
    graph = join({"first": branching(10, "y"), "second": branching(100, "z")}, {"z": "result"})
    graph.name = "joined"
    for name in ("y", "result"):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x, expected in ((5, [15, 105]), (-5, [-5, -5])):
        found = session.run(None, {"x": np.array([x], np.float32)})
        assert [float(value[0]) for value in found] == expected


# --- what is refused ---


def test_a_joined_graph_that_is_not_valid_is_not_exported(bundle):
    graph = helper.make_graph([helper.make_node("Relu", ["nobody"], ["y"])], "g", [], [])
    with pytest.raises(ModelError, match=r"the joined training graph is not valid ONNX: .*nobody") as raised:
        _checked(graph, "training", bundle.manifest, {})
    assert "please report this package" in str(raised.value)


def refusal(kind, **request):
    with pytest.raises(kind) as raised:
        export_artifacts(Request(**request))
    return str(raised.value)


@pytest.fixture
def wanted(photo_package, tmp_path):
    return {"artifact": photo_package, "method": "lance", "output": tmp_path / "out"}


def interpreter(folder, script):
    """Something to name with `--ort-python`."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_this_environment_cannot_write_the_checkpoint_and_says_how_to_get_one_that_can(wanted):
    message = refusal(PlatformError, **wanted)
    assert sys.executable in message
    assert "onnxruntime.training" in message  # what is missing
    for advice in (
        "an environment of its own",
        "x86-64",
        "python3.11 -m venv .venv-ort",
        "pip install onnxruntime-training==1.19.2 onnx==1.17.0 torch==2.13.0",
        "--ort-python .venv-ort/bin/python",
    ):
        assert advice in message
    assert not wanted["output"].exists()


def test_an_interpreter_that_is_none_is_named(wanted, tmp_path):
    message = refusal(PlatformError, **wanted, python=str(tmp_path / "no-python"))
    assert f"--ort-python {tmp_path}/no-python: cannot run" in message
    assert "give the python of an environment with onnxruntime-training" in message
    assert not wanted["output"].exists()


def test_one_that_does_not_end_is_ended(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LIMIT_S", 0.2)
    message = refusal(PlatformError, **wanted, python=interpreter(tmp_path, "exec sleep 60"))
    assert "cannot run" in message
    assert "timed out" in message


def test_what_the_library_says_against_the_artifacts_is_passed_on(wanted, tmp_path):
    python = interpreter(
        tmp_path, "echo 'Unsupported model IR version: 12, max supported IR version: 10' >&2; exit 1"
    )
    message = refusal(ModelError, **wanted, python=python)
    assert "refused the artifacts (Unsupported model IR version: 12" in message
    assert "expected the versions of pip install onnxruntime-training==1.19.2" in message
    assert not wanted["output"].exists()


def test_a_method_with_a_codec_is_refused(bundle):
    variant = replace(bundle.manifest.variant("lance"), method="asi", schedule="by layer")
    with pytest.raises(LanceError) as raised:
        training_model(bundle, variant)
    message = str(raised.value)
    assert "--method asi: expected a method whose step is graphs alone (lance, bp)" in message


def test_a_method_that_the_package_has_not_is_refused(wanted):
    message = refusal(ArtifactError, **(wanted | {"method": "hosvd"}))
    assert "this package holds the methods lance, bp, not hosvd" in message
    assert not wanted["output"].exists()


def test_an_unknown_optimizer_and_a_bad_norm_are_refused(wanted):
    assert "--optimizer: expected sgd or adamw, found adam" in refusal(LanceError, **wanted, optimizer="adam")
    for clip in (-1.0, float("nan"), float("inf")):
        assert "--clip: expected a norm, or 0 for none, found" in refusal(LanceError, **wanted, clip=clip)


def test_a_folder_with_files_in_it_and_a_file_are_refused(wanted):
    wanted["output"].mkdir()
    (wanted["output"] / "thesis.txt").touch()
    assert "expected a new or empty folder, found files in it" in refusal(DataError, **wanted)
    occupied = wanted | {"output": wanted["output"] / "thesis.txt"}
    assert "expected a folder to write to, found a file" in refusal(StorageError, **occupied)


def test_another_number_of_layers_is_refused(wanted):
    assert "--layers 4, not 3" in refusal(ArtifactError, **wanted, layers=3)


def test_a_stand_in_for_the_library_gets_what_it_needs(wanted, tmp_path):
    """The graphs, and every trained tensor as the package has it; four files come out."""
    script = f"""cp -r "$2" {tmp_path}/seen; echo written > "$2/checkpoint" """
    export_artifacts(Request(**wanted, python=interpreter(tmp_path, script)))
    assert sorted(path.name for path in wanted["output"].iterdir()) == sorted(export.ARTIFACTS)
    assert (wanted["output"] / "checkpoint").read_text() == "written\n"
    with Bundle(wanted["artifact"]) as opened:
        start = starting_parameters(opened, opened.manifest.variant("lance"))
    tensors = [onnx.TensorProto.FromString(p.read_bytes()) for p in sorted(tmp_path.glob("seen/parameters/*"))]
    assert names(tensors) == list(start)
    for tensor in tensors:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), start[tensor.name])


@pytest.mark.parametrize("is_there", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(wanted, tmp_path, monkeypatch, is_there):
    if is_there:
        wanted["output"].mkdir()
    python, copyfile = interpreter(tmp_path, 'echo written > "$2/checkpoint"'), shutil.copyfile

    def fill_up(source, target):
        if target.name == export.ARTIFACTS[2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copyfile(source, target)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(export.shutil, "copyfile", fill_up)
    message = refusal(StorageError, **wanted, python=python)
    assert f"{wanted['output']}: cannot write (No space left on device); free space there" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(wanted, tmp_path):
    wanted["output"].mkdir()
    export_artifacts(Request(**wanted, python=interpreter(tmp_path, 'echo written > "$2/checkpoint"')))
    assert sorted(path.name for path in wanted["output"].iterdir()) == sorted(export.ARTIFACTS)


def test_the_command_says_where_it_goes_wrong_on_one_line(wanted, lance_host):
    words = ("export-ort", "--artifact", wanted["artifact"], "-o", wanted["output"])
    result = lance_host(*words, "--ort-python", "/nonexistent/python")
    assert result.exit_code == 9
    assert "error: --ort-python /nonexistent/python: cannot run" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_says_that_it_is_deprecated_and_needs_its_own_environment(lance_host):
    text = " ".join(lance_host("export-ort", "--help").output.split())
    for said in ("environment of its own", "deprecated", "1.19.2", "none for ARM", "no momentum"):
        assert said in text


def test_the_writer_is_a_script_that_needs_nothing_of_ours(tmp_path):
    """It runs in the other environment, where lance-edge is not installed."""
    script = export.write_checkpoint.__file__
    end = subprocess.run([sys.executable, "-I", script, tmp_path], capture_output=True, text=True, check=False)
    assert end.returncode == export.write_checkpoint.NOT_INSTALLED
    assert "onnxruntime.training" in end.stderr
