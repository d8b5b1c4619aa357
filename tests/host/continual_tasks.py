"""Two small tasks and a network with every kind of layer: what the tests of continual learning share.

The tasks' arrays are mixtures of smooth maps, different ones in each task, and a little noise: as natural data
do, they leave directions that another task needs more than they do.
"""

from pathlib import Path

import numpy as np

CODE = '''
from torch import nn

class Chain(nn.Module):
    """Convolutions strided, depthwise, grouped and pointwise, with and without norm and bias; linear layers."""

    def __init__(self, classes, groups):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12 if groups else 1), nn.ReLU(),
            nn.Conv2d(12, 16, (3, 2), padding=(1, 0), groups=2 if groups else 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 1), nn.ReLU(),
        )
        self.hidden = nn.Linear(24, 32)
        self.head = nn.Linear(32, classes)
        for module in self.modules():  # without training of the norms, so that signals keep their strength
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x):
        return self.head(self.hidden(self.body(x).mean((2, 3))).relu())

def grouped(classes=10):
    return Chain(classes, True)

def plain(classes=10):
    return Chain(classes, False)
'''
LAYERS = ("body.0", "body.3", "body.5", "body.8", "hidden")
SIDE = 12
PER_CLASS = 40
BATCH = 16


def write_tasks(folder: Path) -> tuple[Path, Path]:
    """`one.npz` of three classes and `two.npz` of four."""
    paths = folder / "one.npz", folder / "two.npz"
    for seed, (path, classes) in enumerate(zip(paths, (3, 4), strict=True)):
        x, y = task_arrays(seed, classes, PER_CLASS)
        x_test, y_test = task_arrays(seed, classes, 25, fresh=True)
        np.savez(path, x=x, y=y, x_test=x_test, y_test=y_test)
    return paths


def task_arrays(seed: int, classes: int, per_class: int, fresh: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`[N, 3, SIDE, SIDE]` float32 and labels: a map for each class, of random strength, on two common ones."""
    rng = np.random.default_rng(100 + seed)
    maps = smooth_maps(rng, classes + 2)
    rng = np.random.default_rng(1000 * fresh + seed)
    labels = np.repeat(np.arange(classes), per_class)
    own = rng.uniform(0.6, 1.4, (len(labels), 1, 1, 1)) * maps[labels]
    common = np.einsum("nk,kchw->nchw", rng.standard_normal((len(labels), 2)) * 0.5, maps[classes:])
    noise = 0.03 * rng.standard_normal(own.shape)
    return (own + common + noise).astype(np.float32), labels.astype(np.int64)


def smooth_maps(rng: np.random.Generator, number: int) -> np.ndarray:
    """`[number, 3, SIDE, SIDE]`: a plane wave for each channel."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    shape = (number, 3, 1, 1)
    waves = rng.uniform(-2, 2, shape) * rows + rng.uniform(-2, 2, shape) * columns + rng.uniform(0, 1, shape)
    return 1.5 * np.cos(2 * np.pi * waves)
