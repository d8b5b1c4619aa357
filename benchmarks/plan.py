"""Which measurements are made, and in which order."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.job import Job, Tuning
from benchmarks.material import Material
from lance_edge.manifest import Manifest

WEIGHT_MICRO_BATCHES = (8, 32)
COMMAND_LAYERS = 4  # of whole commands, where they are among those asked for: the targets' own


@dataclass(frozen=True)
class Options:
    """What somebody asks for.

    Attributes:
        layers: numbers of trained layers.
        micro_batch: of our methods and of ONNX Runtime; PyTorch has its own.
        quick: one round, fewer settings of PyTorch are tried.
    """

    layers: tuple[int, ...]
    micro_batch: int
    threads: int
    rounds: int
    quick: bool


def plan_round(
    options: Options, manifest: Manifest, material: Material, tunings: dict[bool, Tuning], number: int
) -> tuple[Job, ...]:
    """Every setting once, settings that are compared next to each other.

    Each round begins at another place: a machine that becomes hot or busy in the meantime treats all alike.

    Args:
        tunings: PyTorch's best setting, for uncached and cached features.
        number: of the round, from 1.

    Raises:
        ArtifactError: if the package has not these layers for LANCE and BP.
    """
    jobs = [job for job in _jobs(options, manifest, material, tunings, number) if _exists(manifest, job)]
    begin = (number - 1) * len(jobs) // max(1, options.rounds)
    return tuple(jobs[begin:] + jobs[:begin])


def tuning_job(options: Options, material: Material, cached: bool) -> Job:
    """The measurement of a candidate: with the most layers, once."""
    return _job(options, material, "torch-tuned", max(options.layers), 0, 1, cached=cached)


def _jobs(
    options: Options, manifest: Manifest, material: Material, tunings: dict[bool, Tuning], number: int
) -> Iterator[Job]:
    whole, size = manifest.batch_size, min(options.micro_batch, manifest.batch_size)

    def job(name: str, layers: int, micro_batch: int, cached: bool = False) -> Job:
        tuning = tunings[cached] if name == "torch-tuned" else None
        return _job(options, material, name, layers, micro_batch, number, cached, tuning)

    yield job("help", 0, 0)
    usual = COMMAND_LAYERS if COMMAND_LAYERS in options.layers else max(options.layers)
    yield job("ready", usual, size)
    yield job("train", usual, size)
    yield job("onnxruntime", 0, size)
    for layers in options.layers:
        for method in ("lance", "bp"):
            manifest.variant(method, layers)
        for cached in (False, True):
            for name in OURS:
                yield job(name, layers, size, cached)
            yield job("torch-tuned", layers, tunings[cached].micro_batch, cached)
        yield job("torch-bp", layers, whole)
        yield job("torch-lance", layers, whole)
        for micro_batch in sorted({min(one, whole) for one in WEIGHT_MICRO_BATCHES}):
            yield job("weights-lance", layers, micro_batch)
            yield job("weights-bp", layers, micro_batch)


def _job(
    options: Options,
    material: Material,
    name: str,
    layers: int,
    micro_batch: int,
    number: int,
    cached: bool = False,
    tuning: Tuning | None = None,
) -> Job:
    return Job(
        contender=name,
        package=str(material.package),
        data=str(material.photos),
        model=str(material.model),
        layers=layers,
        micro_batch=micro_batch,
        threads=options.threads,
        steps=CONTENDERS[name].steps[cached],
        cached=cached,
        round=number,
        tuning=tuning,
    )


def _exists(manifest: Manifest, job: Job) -> bool:
    """ASI and HOSVD are measured where the package has them."""
    method = CONTENDERS[job.contender].method
    return not method or any((v.method, len(v.layers)) == (method, job.layers) for v in manifest.variants)
