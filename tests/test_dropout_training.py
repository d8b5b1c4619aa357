"""`--dropout` from calibrate to merge: masks follow from the run's seed, whatever the micro-batch."""

import numpy as np
import onnxruntime
import pytest
import torch

CODE = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(6 * 16, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3))
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "dropping.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def package(code, photos, lance_host, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "pkg.tar"
    result = lance_host(
        *("calibrate", "--model", f"{code}:make", "--input-size", 48, "--data", photos, "--threads", 1),
        *("--layers", 2, "--dropout", "--methods", "all", "-o", path),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    return path


def weights_after(lance_device, package, photos, out, *options):
    lance_device(
        *("train", "--artifact", package, "--data", photos, "--out", out, "--steps", 3, "--augment", "none"),
        *options,
    )
    with np.load(out / "last.npz") as arrays:
        return {
            name: arrays[name] for name in arrays.files if name.endswith(("weight", "bias")) and "/" not in name
        }


@pytest.mark.parametrize("method", ["bp", "lance", "asi", "hosvd"])
def test_masks_follow_from_the_seed_and_not_from_the_micro_batch(
    package, photos, lance_device, tmp_path, method
):
    runs = {
        name: weights_after(lance_device, package, photos, tmp_path / name, "--method", method, *options)
        for name, options in {
            "first": ("--seed", 1, "--no-shuffle", "--micro-batch", 8),
            "other micro-batch": ("--seed", 1, "--no-shuffle", "--micro-batch", 3),
            "other seed": ("--seed", 2, "--no-shuffle", "--micro-batch", 8),
        }.items()
    }
    largest = {
        name: max(np.abs(run[key] - runs["first"][key]).max() for key in run) for name, run in runs.items()
    }
    # Sums in another order: some 1e-7 of weights of size 0.1.
    # Without shuffling, only masks depend on the seed.
    assert largest["other micro-batch"] < 1e-5
    assert largest["other seed"] > 1e-3


def test_the_merged_network_drops_nothing(package, code, photos, lance_host, lance_device, tmp_path):
    weights_after(lance_device, package, photos, tmp_path / "run")
    for ending in ("onnx", "pth"):
        words = ("--artifact", package, "--checkpoint", tmp_path / "run" / "last.npz")
        assert lance_host("merge", *words, "-o", tmp_path / f"merged.{ending}").exit_code == 0
    scope = {}
    exec(code.read_text(), scope)
    network = scope["make"]().eval()
    network.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True))
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)
    (found,) = session.run(None, {"images": images})
    expected = network(torch.from_numpy(images)).detach().numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()  # two float32 runtimes


def test_a_network_that_has_nothing_to_drop_is_refused(code, photos, lance_host, tmp_path):
    words = ("--model", "mcunet-10fps-vww", "--weights", "random", "--data", photos, "--layers", 1, "--dropout")
    result = lance_host("calibrate", *words, "-o", tmp_path / "pkg.tar")
    assert result.exit_code != 0
    assert (
        "--dropout: no nn.Dropout (nor 1d, 2d, 3d) stands behind the first trained layer; leave it out"
        in result.output
    )


def test_the_training_api_of_onnx_runtime_cannot_be_fed_seeds(package, lance_host, tmp_path):
    result = lance_host("export-ort", "--artifact", package, "--method", "bp", "-o", tmp_path / "ort")
    assert result.exit_code != 0
    assert (
        "was made with --dropout, which onnxruntime-training cannot be fed; calibrate without it"
        in result.output
    )
    assert not (tmp_path / "ort").exists()
