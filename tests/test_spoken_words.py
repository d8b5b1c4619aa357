"""The example of spoken words: its features against a formula, its network, and a few words really said."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parent.parent / "examples" / "spoken_words.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("spoken_words", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tone(example, hertz, seconds=1.0):
    times = np.arange(round(seconds * example.RATE)) / example.RATE
    return (0.5 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def test_features_have_the_shape_that_the_network_takes(example):
    for seconds in (0.1, 1.0, 1.7):
        features = example.log_mel(tone(example, 440, seconds))
        assert features.shape == (40, 1, 98)
        assert features.dtype == np.float32
        assert features.mean() == pytest.approx(0, abs=1e-5)
        assert features.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("hertz", [200, 700, 1500, 4000])
def test_a_tone_is_loudest_in_the_band_of_its_pitch(example, hertz):
    """Band centres are evenly spaced in 2595 log10(1 + f / 700)."""
    low, high, own = (2595 * np.log10(1 + f / 700) for f in (60.0, 8000.0, hertz))
    centre = (own - low) / (high - low) * 41 - 1
    loudest = example.log_mel(tone(example, hertz))[:, 0].mean(axis=1).argmax()
    assert abs(loudest - centre) <= 1


def test_loudness_does_not_matter(example):
    quiet, loud = (example.log_mel(factor * tone(example, 440)) for factor in (0.5, 1.0))
    np.testing.assert_allclose(quiet, loud, atol=1e-5)  # float32


def test_silence_is_finite(example):
    assert np.isfinite(example.log_mel(np.zeros(10, np.float32))).all()


def test_the_network_takes_features_of_any_length(example):
    network = example.Network(6).eval()
    assert network(torch.zeros(2, 40, 1, 98)).shape == (2, 6)
    assert network(torch.zeros(2, 40, 1, 53)).shape == (2, 6)


@pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is absent; on Debian: apt install espeak-ng"
)
def test_words_are_said_and_differ(example, tmp_path, monkeypatch):
    for name, value in (("ACCENTS", ("en-us",)), ("SPEEDS", (165,)), ("PITCHES", (50,))):
        monkeypatch.setattr(example, name, value)
    example.write_words(tmp_path / "words.npz", ("yes", "window"), seed=0)
    with np.load(tmp_path / "words.npz") as archive:
        assert archive["x"].shape == (2 * len(example.TRAIN_VARIANTS), 40, 1, 98)
        assert archive["x_test"].shape == (2 * len(example.TEST_VARIANTS), 40, 1, 98)
        assert archive["classes"].tolist() == ["yes", "window"]
        means = [archive["x"][archive["y"] == label].mean(axis=0) for label in (0, 1)]
    assert np.abs(means[0] - means[1]).max() > 0.5
    assert 0.15 < len(example.speak("yes", "en-us+f2", 165, 50)) / example.RATE < 1.0


def test_the_network_goes_from_calibrate_to_predict(example, lance_host, lance_device, tmp_path):
    """Two tones for words: what is shown is the path, with the example's own network and features."""
    random = np.random.default_rng(0)
    x = np.stack(
        [example.log_mel(tone(example, hertz + random.uniform(-20, 20))) for hertz in [300, 2000] * 12]
    )
    np.savez(tmp_path / "tones.npz", x=x, y=np.arange(24) % 2, classes=np.array(["low", "high"]))
    package, run = tmp_path / "pkg.tar", tmp_path / "run"
    result = lance_host(
        *("calibrate", "--model", f"{PATH}:Network", "--weights", "random", "--data", tmp_path / "tones.npz"),
        *("--layers", 3, "--methods", "lance,bp", "--threads", 1, "-o", package),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    lance_device("train", "--artifact", package, "--data", tmp_path / "tones.npz", "--out", run, "--epochs", 20)
    words = ("--artifact", package, "--checkpoint", run / "last.npz", "--json", tmp_path / "tones.npz")
    found = json.loads(lance_device("predict", *words).stdout)
    assert [entry["predictions"][0]["class"] for entry in found] == ["low", "high"] * 12
