"""Spoken words: features, data and network of an example that is not about photographs.

    python examples/spoken_words.py spoken/    # renders with espeak-ng: spoken/base.npz, spoken/new.npz

Each file holds `x` float32 `[N, 40, 1, 98]` (log-mel bands as channels, a height of 1, 98 frames of 10 ms) of
some voices, and `x_test` of voices that are not among them.  `Network` is one-dimensional in time.  How to
train it is in docs/arrays.md.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Float = NDArray[np.float32]

BASE_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off")
NEW_WORDS = ("lamp", "music", "window", "kitchen", "louder", "quiet")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029")
TRAIN_VARIANTS = ("m1", "m2", "m3", "m4", "f1", "f2", "f3")
TEST_VARIANTS = ("m7", "f4", "f5")
SPEEDS, PITCHES = (130, 165, 200), (35, 60)  # words a minute, espeak-ng's 0 to 99

RATE = 22_050  # Hz, espeak-ng's
SECONDS, HOP_MS, WINDOW_MS = 1.0, 10, 25
BANDS, LOWEST_HZ, HIGHEST_HZ = 40, 60.0, 8_000.0
FFT = 1024
NOISE = 0.005  # of full scale: no microphone is silent


# --- features -------------------------------------------------------------------------------------------


def log_mel(sound: Float, rate: int = RATE) -> Float:
    """Log energies of 40 mel bands in frames of 10 ms, of mean 0 and deviation 1: `[40, 1, 98]`.

    Args:
        sound: `[n]`, from -1 to 1; cut or padded with zeros to a second.
    """
    length, hop, window = (round(rate * t) for t in (SECONDS, HOP_MS / 1000, WINDOW_MS / 1000))
    padded = np.zeros(length, np.float64)
    padded[: min(length, len(sound))] = sound[:length]
    starts = np.arange(0, length - window + 1, hop)
    frames = padded[starts[:, None] + np.arange(window)] * np.hanning(window)  # [T, window]
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2  # [T, FFT / 2 + 1]
    bands = power @ mel_filters(rate).T  # [T, 40]
    energies = np.log(bands + max(1e-6 * bands.max(), 1e-20))  # nothing is felt below -60 dB of the loudest
    normed = (energies - energies.mean()) / (energies.std() + 1e-9)
    return normed.T[:, None, :].astype(np.float32)


def mel_filters(rate: int) -> NDArray[np.float64]:
    """Triangular filters, evenly spaced on the mel scale `2595 log10(1 + f / 700)`: `[40, FFT / 2 + 1]`."""
    low, high = (2595 * np.log10(1 + f / 700) for f in (LOWEST_HZ, min(HIGHEST_HZ, rate / 2)))
    corners = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)  # Hz
    frequencies = np.fft.rfftfreq(FFT, 1 / rate)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(0.0, np.minimum(rising, falling))


# --- words ----------------------------------------------------------------------------------------------


def speak(word: str, voice: str, speed: int, pitch: int) -> Float:
    """A word as espeak-ng says it, without the silence before it: `[n]` at 22,050 Hz."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "word.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), word]
        subprocess.run(command, check=True, capture_output=True)
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (RATE, 2, 1)
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    loud = np.flatnonzero(np.abs(sound) > 0.02)
    return sound[loud[0] :].astype(np.float32) if len(loud) else sound.astype(np.float32)


def render(words: tuple[str, ...], variants: tuple[str, ...], seed: int) -> tuple[Float, NDArray[np.int64]]:
    """Every word in every voice, speed and pitch, begun at some moment of the first 150 ms, with some noise.

    Returns:
        features `[N, 40, 1, 98]` and labels `[N]`.
    """
    random = np.random.default_rng(seed)
    features, labels = [], []
    for label, word in enumerate(words):
        for accent, variant, speed, pitch in itertools.product(ACCENTS, variants, SPEEDS, PITCHES):
            sound = speak(word, f"{accent}+{variant}", speed, pitch)
            shifted = np.concatenate([np.zeros(random.integers(0, round(0.15 * RATE)), np.float32), sound])
            whole = np.zeros(round(SECONDS * RATE), np.float32)
            whole[: len(shifted)] = shifted[: len(whole)]
            noise = NOISE * random.standard_normal(len(whole), np.float32)
            features.append(log_mel(whole + noise))
            labels.append(label)
    return np.stack(features), np.array(labels, np.int64)


def write_words(path: Path, words: tuple[str, ...], seed: int) -> None:
    """An `.npz` with some voices to train on and others to test on."""
    x, y = render(words, TRAIN_VARIANTS, seed)
    x_test, y_test = render(words, TEST_VARIANTS, seed + 1)
    np.savez(path, x=x, y=y, x_test=x_test, y_test=y_test, classes=np.array(words))
    print(
        f"{path}: {len(x)} words of {len(TRAIN_VARIANTS)} voices, {len(x_test)} of {len(TEST_VARIANTS)} others"
    )


# --- network --------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Temporal convolutions with residuals, after TC-ResNet (Choi et al., Interspeech 2019).

    Features float32 `[N, 40, 1, T]` to logits `[N, num_classes]`.  Convolutions are written as
    two-dimensional ones of height 1.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(BANDS, 32, (1, 3), padding=(0, 1), bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(32, 48), Block(48, 64), Block(64, 96))
        self.classifier = nn.Linear(96, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, 40, 1, T]` to `[N, num_classes]`."""
        logits: torch.Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class Block(nn.Module):
    """Two convolutions over nine frames, the first of stride 2, and a strided 1x1 beside them.

    `[N, channels, 1, T]` to `[N, out, 1, ceil(T / 2)]`.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, (1, 9), stride=(1, 2), padding=(0, 4), bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, (1, 9), padding=(0, 4), bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride=(1, 2), bias=False)
        self.shortcut_norm = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, channels, 1, T]` to `[N, out, 1, ceil(T / 2)]`."""
        y = torch.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return torch.relu(y + self.shortcut_norm(self.shortcut(x)))


def main() -> None:
    """Render both sets of words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_words(folder / "base.npz", BASE_WORDS, seed=0)
        write_words(folder / "new.npz", NEW_WORDS, seed=2)
    except FileNotFoundError:
        sys.exit("espeak-ng is not installed; on Debian: apt install espeak-ng")


if __name__ == "__main__":
    main()
