"""Our own runtime, unchanged, on the `onnxruntime` that onnxruntime-training brings.

`make test-ort-training` runs the device's own tests of sessions, steps and training there as well.
"""

import json

import numpy as np
import pytest

COMMAND = "from lance_device.cli import main; main()"


@pytest.fixture(scope="module")
def runs(photo_package, photos, run_there, lance_device, tmp_path_factory):
    """The same twelve steps in both environments, evaluated in each."""
    folder = tmp_path_factory.mktemp("runs")

    def there(*words):
        return run_there("-c", COMMAND, *words)

    def here(*words):
        return lance_device(*words).output

    said = {}
    for place, device in (("there", there), ("here", here)):
        for method in ("lance", "bp"):
            run = folder / f"{place}-{method}"
            words = ("--artifact", photo_package, "--data", photos)
            device("train", *words, "--out", run, "--method", method, "--steps", 12, "--threads", 1)
            said[place, method] = device("eval", *words, "--checkpoint", run / "last.npz")
    return folder, said


@pytest.mark.parametrize("method", ["lance", "bp"])
def test_training_there_gives_the_weights_of_training_here(method, runs):
    folder, said = runs
    with np.load(folder / f"there-{method}/last.npz") as a, np.load(folder / f"here-{method}/last.npz") as b:
        names = [name for name in b.files if b[name].dtype == np.float32]  # others are texts about the run
        assert a.files == b.files
        assert len(names) == 12  # four convolutions, weight and bias of the head, and their momentum
        for name in names:
            # Two versions of the runtime add up in other orders: 1e-6 a step, of values that all are below 10.
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert said["there", method] == said["here", method]


def test_the_run_says_which_runtime_it_was(runs):
    folder, _ = runs
    versions = json.loads((folder / "there-lance/run.json").read_text())["versions"]
    assert versions["onnxruntime"] == "1.19.2"
    assert versions != json.loads((folder / "here-lance/run.json").read_text())["versions"]


def test_prediction_there_is_prediction_here(runs, photo_package, photos, run_there, lance_device):
    folder, _ = runs
    image = next(photos.glob("disc/*.jpg"))
    words = ("predict", "--artifact", photo_package, "--checkpoint", folder / "there-bp/last.npz", image)
    assert run_there("-c", COMMAND, *words) == lance_device(*words).output
