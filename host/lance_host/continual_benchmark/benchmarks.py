"""The benchmarks: which data sets, in which order, cut into which tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lance_edge.errors import LanceError

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: of its folder below `--data`.
        classes: how many it must have.
        mean, std: of pixels from 0 to 1, per channel; of grey images with their padding.
        elsewhere: where a system package puts it.
    """

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    elsewhere: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """Data sets one after the other, each cut into tasks of `classes_per_task` classes in label order."""

    name: str
    sources: tuple[Source, ...]
    classes_per_task: int
    network: str

    @property
    def is_one_set(self) -> bool:
        """Whether all tasks come from one data set."""
        return len(self.sources) == 1


# Means and deviations as in the data loaders published with GPM, which are those of HAT (Serra et al., ICML
# 2018); grey images are padded with zeros from 28 to 32 pixels and given three equal channels.
CIFAR10 = Source("cifar10", 10, CIFAR_MEAN, CIFAR_STD)
CIFAR100 = Source("cifar100", 100, CIFAR_MEAN, CIFAR_STD)
MNIST = Source("mnist", 10, (0.1,) * 3, (0.2752,) * 3)
SVHN = Source("svhn", 10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197))
FASHION = Source("fashion-mnist", 10, (0.2190,) * 3, (0.3318,) * 3, DEBIAN_FASHION)
NOTMNIST = Source("notmnist", 10, (0.4254,) * 3, (0.4501,) * 3)

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark("split-cifar100", (CIFAR100,), 10, "alexnet"),
            Benchmark("split-cifar10", (CIFAR10,), 2, "alexnet"),
            Benchmark("split-fashion", (FASHION,), 2, "alexnet"),
            Benchmark("five-datasets", (CIFAR10, MNIST, SVHN, FASHION, NOTMNIST), 10, "resnet18-reduced"),
        )
    }
)


def choose_benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        LanceError: if there is none of this name.
    """
    if name not in BENCHMARKS:
        raise LanceError(f"--benchmark: expected one of {', '.join(BENCHMARKS)}, found {name!r}")
    return BENCHMARKS[name]
