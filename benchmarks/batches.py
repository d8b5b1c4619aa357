"""What all contenders have in common: package, batch, learning rate, meter."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.job import Job
from lance_device.bench_job import Job as DeviceJob
from lance_device.bench_job import open_batch
from lance_device.features import Batch
from lance_device.measure import PhaseMeter
from lance_device.probe import MemoryProbe
from lance_edge.bundle import Bundle
from lance_edge.manifest import Manifest
from lance_edge.names import WEIGHTS_MEMBER

# So large that one step moves the loss by more than rounding: a contender with a wrong gradient shows.
LEARNING_RATE = 0.05


def device_job(job: Job) -> DeviceJob:
    """The same measurement as `lance-device bench` describes it."""
    return DeviceJob(
        run_id="peers",
        artifact=job.package,
        data=job.data,
        method=job.contender,
        layers=job.layers,
        micro_batch=job.micro_batch,
        threads=job.threads,
        trial=job.round,
        warmups=job.warmups,
        steps=job.steps,
        cached=job.cached,
        learning_rate=LEARNING_RATE,
    )


def same_batch(job: Job, manifest: Manifest) -> Batch:
    """The images of every step, for everybody."""
    return open_batch(device_job(job), manifest)


def package_of(job: Job) -> tuple[Manifest, dict[str, NDArray[np.generic]]]:
    """The plan, and the weights that everybody starts from, by state-dict name."""
    with Bundle(Path(job.package)) as bundle:
        arrays = bundle.arrays(WEIGHTS_MEMBER)
        return bundle.manifest, {name: arrays[name] for name in arrays}


def new_meter() -> PhaseMeter:
    """The clock and the memory probe of our own benchmark, for everybody."""
    return PhaseMeter(MemoryProbe())
