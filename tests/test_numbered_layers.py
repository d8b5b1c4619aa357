"""Task after task with a plain `nn.Sequential`: names that are numbers, batches whole, positions cut."""

from pathlib import Path

import numpy as np
import pytest
from continual_tasks import BATCH, task_arrays, write_tasks

from lance_edge import protected_spectra
from lance_edge.accuracy_matrix import read_matrix
from lance_edge.bundle import Bundle
from lance_edge.manifest import batch_multiple

CODE = """
import torch
from torch import nn

def make(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, classes))
"""
CONVS = ("0", "4", "8")


def whole_batch(layer, mode, batch_size, spectra, energy):
    """Ranks as of layers whose batch a basis would take more of than it saves, in place of `ranks_of`."""
    return (batch_size, *(one.rank(energy) for one in spectra[1:]))


@pytest.fixture(scope="module")
def story(made_once, lance_host, lance_device) -> Path:
    """`net.py`, the first package `one.tar`, and `tasks/`: three tasks that the board learned alone."""

    def make(folder: Path) -> None:
        write_tasks(folder)
        x, y = task_arrays(2, 5, 40)
        np.savez(folder / "three.npz", x=x, y=y)
        (folder / "net.py").write_text(CODE)
        model = ("--model", f"{folder}/net.py:make", "--data", folder / "one.npz", "--threads", 1)
        words = ("--layers", "all", "--batch-size", BATCH, "--mode", "patch", "--any-rank", "--energy", 0.7)
        words = (*words, "--methods", "lance,bp", "-o", folder / "one.tar")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protected_spectra, "ranks_of", whole_batch)
            result = lance_host("calibrate", *model, *words)
        assert result.exit_code == 0, (result.output, result.exception)
        root, common = folder / "tasks", ("--epochs", 2, "--threads", 1, "--quiet")
        first = ("--artifact", folder / "one.tar", "--data", folder / "one.npz", "--tasks", "--method", "bp")
        lance_device("train", *first, "--out", root, *common)
        for name in ("two.npz", "three.npz"):
            following = ("--next-data", folder / name, "--threads", 1)
            lance_device("next-task", "--run", root, *following, "--batches", 3, "--memory-batches", 3)
            lance_device("train", "--data", folder / name, "--out", root, *common)

    return made_once("numbered-layers", make)


def variant_of(package: Path):
    with Bundle(package) as bundle:
        return bundle.manifest.variant("lance")


def test_graphs_serve_other_ranks_of_the_positions(story):
    """With the batch whole and the positions cut, `r2*N` values of every filter cross to backward."""
    packages = [story / "tasks" / name / "pkg.tar" for name in ("1-one", "2-two", "3-three")]
    variants = [variant_of(package) for package in packages]
    ranks = [{plan.layer: plan.ranks for plan in variant.layers} for variant in variants]
    for name in CONVS:
        assert f"{name}/U0" not in variants[0].batch_projections
        assert f"{name}/U2" in variants[0].projections
    assert all(len({one[name][2] for one in ranks}) > 1 for name in CONVS)
    for variant, one in zip(variants, ranks, strict=True):
        multiples = {batch_multiple(str(spec.shape[-1])) for spec in variant.saved}
        assert multiples.issuperset(one[name][2] for name in CONVS)
    matrix = read_matrix(story / "tasks" / "accuracy_matrix.csv")
    assert [len(row.accuracies) for row in matrix.rows] == [1, 2, 3]


def test_the_next_task_trains_the_layers_of_the_one_before(story, lance_host, tmp_path, monkeypatch):
    """By default; as `--layers` their names would be counts."""
    monkeypatch.chdir(story)
    words = ("--checkpoint", story / "tasks/1-one/last.npz", "--data", story / "two.npz", "--batches", 2)
    result = lance_host("calibrate", *words, "--threads", 1, "--methods", "lance", "-o", tmp_path / "two.tar")
    assert result.exit_code == 0, (result.output, result.exception)
    assert tuple(plan.layer for plan in variant_of(tmp_path / "two.tar").layers) == (*CONVS, "13")
