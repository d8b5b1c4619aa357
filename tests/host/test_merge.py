"""What `merge` writes, against the state dict put together by hand and run in PyTorch."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch

from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError, CheckpointError, LanceError, StorageError
from lance_edge.sealed import write_sealed
from lance_host.graph_file import read_graph
from lance_host.merge import merge
from lance_host.zoo import ZOO


@pytest.fixture(scope="module")
def merged(photo_package, trained, tmp_path_factory):
    """Ending -> merged file, of the run with LANCE."""
    folder = tmp_path_factory.mktemp("merged")
    files = {ending: folder / f"finetuned{ending}" for ending in (".pth", ".safetensors", ".onnx")}
    for path in files.values():
        merge(photo_package, trained["lance"] / "last.npz", path)
    return files


@pytest.fixture(scope="module")
def expected(photo_package, trained):
    """The whole state dict: what was trained from the checkpoint, everything else from the package."""
    with Bundle(photo_package) as bundle:
        state = dict(bundle.arrays("weights.npz"))
    with np.load(trained["lance"] / "last.npz") as checkpoint:
        own = ("meta", "sha256")
        names = [name for name in checkpoint.files if name not in own and not name.startswith("optimizer/")]
        assert len(names) == 6
        for name in names:
            assert np.any(checkpoint[name] != state[name]), f"{name} was not trained"
            state[name] = checkpoint[name]
    return state


def test_the_state_dict_is_the_packages_with_the_trained_tensors_in_it(merged, expected):
    pth = {name: value.numpy() for name, value in torch.load(merged[".pth"], weights_only=True).items()}
    for state in (pth, safetensors.numpy.load_file(merged[".safetensors"])):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value)
            assert state[name].dtype == value.dtype
            assert state[name].shape == value.shape


def pytorch_logits(merged, images):
    network = ZOO["mcunet-10fps-vww"].build(3)
    network.load_state_dict(torch.load(merged[".pth"], weights_only=True), strict=True)
    with torch.no_grad():
        return network.eval()(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("count", [1, 5])
def test_the_onnx_model_gives_the_logits_of_pytorch_for_any_number_of_images(merged, count):
    images = np.random.default_rng(0).uniform(-1, 1, (count, 3, 96, 96)).astype(np.float32)
    session = onnxruntime.InferenceSession(merged[".onnx"], providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images})
    # Batch-norm is folded and sums run in another order: 1e-4 of logits of about 1.
    np.testing.assert_allclose(found, pytorch_logits(merged, images), rtol=1e-4, atol=1e-4)


def test_the_onnx_model_is_plain_and_says_how_to_use_it(merged, photo_package):
    model = onnx.load(merged[".onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits"]
    operators = {node.op_type for node in model.graph.node}
    assert "Conv" in operators
    # Weights are constants again: nothing is left of their scaling and of training.
    assert operators <= {"Conv", "Clip", "Relu", "Add", "ReduceMean", "Gemm", "MatMul", "Identity", "Reshape"}
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    with Bundle(photo_package) as bundle:
        steps = bundle.manifest.preprocessing
    assert metadata["classes"] == ["disc", "square", "stripes"]
    assert metadata["preprocessing"] == {
        "resolution": 96,
        "resize": 109,  # int(96 * 256 / 224)
        "mean": list(steps.mean),
        "std": list(steps.std),
        "interpolation": "bilinear",
    }


def test_the_same_files_give_the_same_bytes(merged, photo_package, trained, tmp_path):
    for ending, path in merged.items():
        again = tmp_path / f"again{ending}"
        merge(photo_package, trained["lance"] / "last.npz", again)
        assert again.read_bytes() == path.read_bytes(), ending


@pytest.mark.parametrize("name", ["finetuned.h5", "finetuned", "finetuned.npz"])
def test_an_unknown_ending_lists_those_there_are(name, photo_package, trained, tmp_path):
    with pytest.raises(LanceError) as raised:
        merge(photo_package, trained["lance"] / "last.npz", tmp_path / name)
    message = str(raised.value)
    assert f"{name}: expected an ending of .pth, .safetensors, .onnx, found " in message
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_package_is_refused(photo_package, trained, tmp_path):
    checkpoint = tmp_path / "other.npz"
    with np.load(trained["bp"] / "last.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "sha256"}
    meta = json.loads(str(arrays.pop("meta")))
    meta["artifact_sha256"] = "0" * 64
    with checkpoint.open("wb") as file:
        write_sealed(file, {**arrays, "meta": np.array(json.dumps(meta))})
    with pytest.raises(CheckpointError, match="belongs to another package"):
        merge(photo_package, checkpoint, tmp_path / "finetuned.pth")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_missing_package_is_refused(trained, tmp_path):
    with pytest.raises(ArtifactError, match="cannot open the package"):
        merge(tmp_path / "no.tar", trained["bp"] / "last.npz", tmp_path / "finetuned.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".onnx"])
def test_an_output_that_cannot_be_written_leaves_nothing_behind(ending, photo_package, trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        merge(photo_package, trained["bp"] / "last.npz", tmp_path / "file" / f"finetuned{ending}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Package:
    """The one graph of a package that `merge` reads."""

    path = "pkg.tar"

    def __init__(self, data):
        self.data = data

    def read(self, *names):
        return self.data


def test_a_graph_with_constants_in_other_files_is_refused():
    """They could be any file of this machine."""
    constant = onnx.TensorProto(name="w", data_location=onnx.TensorProto.EXTERNAL)
    graph = onnx.helper.make_graph([], "g", [], [], initializer=[constant])
    with pytest.raises(ArtifactError, match=r"tail\.onnx: refers to files outside the package"):
        read_graph(Package(onnx.helper.make_model(graph).SerializeToString()), ["tail.onnx"])


def test_a_graph_that_is_none_is_refused():
    with pytest.raises(ArtifactError, match="not an ONNX graph"):
        read_graph(Package(b"\xff" * 40), ["tail.onnx"])
