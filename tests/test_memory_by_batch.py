"""Streaming: with r0 fixed, what a step needs does not depend on the batch size.

Real processes, real peaks (VmHWM) of MCUNet at 160 px.  What the batch size may add are `U0 [B, r0]` and the
statistics of the batch mode, of which one pass keeps sums; no activation of the batch is ever kept.
"""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lance_host.ranks import Ranks, ranks_by_energy

R0, MICRO_BATCH, STEPS = 8, 8, 2
BATCHES = (16, 128, 512)

pytestmark = pytest.mark.slow  # half a minute for each batch size


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """1,100 noisy images of two colours."""
    random = np.random.default_rng(0)
    labels = np.arange(1100) % 2
    x = random.integers(0, 128, (len(labels), 40, 40, 3)) + 100 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("photographs") / "two.npz"
    np.savez(path, x=x.astype(np.uint8), y=labels, classes=np.array(["dark", "light"]))
    return path


def peak_rss_kib(package: Path, data: Path, out: Path) -> int:
    """Of a process of its own that makes some steps without a cache."""
    command = [
        sys.executable,
        "-m",
        "lance_device.cli",
        "train",
        "--quiet",
        "--artifact",
        package,
        "--data",
        data,
    ]
    options = ["--steps", STEPS, "--micro-batch", MICRO_BATCH, "--cache", "off", "--threads", 1, "--out", out]
    subprocess.run([str(word) for word in (*command, *options)], check=True)
    with (out / "steps.csv").open(newline="") as file:
        return max(int(row["peak_rss_kib"]) for row in csv.DictReader(file) if row["peak_rss_kib"])


def with_fixed_batch_rank(spectra, energy: float) -> Ranks:
    return {name: (R0, *ranks[1:]) for name, ranks in ranks_by_energy(spectra, energy).items()}


def test_peak_memory_is_flat_in_the_batch_size(photographs, lance_host, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr("lance_host.rank_choice.ranks_by_energy", with_fixed_batch_rank)
    peaks = {}
    for batch in BATCHES:
        package = tmp_path / f"{batch}.tar"
        result = lance_host(
            *("calibrate", "--model", "mcunet", "--weights", "random", "--data", photographs, "--layers", 4),
            *("--batch-size", batch, "--batches", 1, "--methods", "lance", "-o", package),
        )
        assert result.exit_code == 0, (result.output, result.exception)
        peaks[batch] = peak_rss_kib(package, photographs, tmp_path / f"run{batch}")
    record_property("peak_rss_kib", peaks)
    assert max(peaks.values()) <= 1.05 * min(peaks.values()), peaks
