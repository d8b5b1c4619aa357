"""Whether a run fits into the memory that it may use, found out before it begins.

How much a network takes depends on its graphs, on the runtime's version and on the processor, so it is
measured: with micro-batches of one image and of four, forward, backward and evaluation, in a fork of this
process, which may fail and leaves nothing behind.  What an image adds is taken from the difference; what only
a whole run holds (momentum, a copy of the best state, what two passes keep of a batch, the cache's table) is
added from the manifest.
"""

import resource
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lance_device.address_space import BLAS_THREAD_BYTES
from lance_device.features import Batch, ComputedFeatures
from lance_device.fork import FAILED, RESIDENT, in_a_fork, lack
from lance_device.graphs import Network, load_graph, load_prefix, starting_parameters
from lance_device.guard import free_bytes, group_limit_bytes, status_bytes
from lance_device.image_memory import LargestImage, Limit, bytes_beyond, largest_image
from lance_device.measure import PhaseMeter
from lance_device.options import TrainOptions
from lance_device.probe import MemoryProbe
from lance_device.step import training_step
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset
from lance_edge.errors import PlatformError
from lance_edge.units import size

MANY = 4  # images of the second measurement
LARGEST_STACK = 8 << 20  # of a thread, where `ulimit -s` sets no limit
LEAST_BESIDE_STACKS = 16 << 20  # the graphs themselves, before an allocation may fail
MARGIN_BYTES = 4 << 20  # Python's own growth, the rows of a long run
MARGIN_SHARE = 0.02  # of everything: how well the measurement repeats itself


@dataclass(frozen=True)
class MemoryPlan:
    """What fits, for the user and for `run.json`; `needed_bytes` is of the tightest limit.

    Attributes:
        cache: what was asked for, or `off` where the run fits only without one.
    """

    limit_bytes: int
    limit: str
    needed_bytes: int
    micro_batch: int
    threads: int
    cache: str

    def __str__(self) -> str:
        return (
            f"memory: {self.limit} {size(self.limit_bytes)}, needs {size(self.needed_bytes)} with --micro-batch"
            f" {self.micro_batch} --threads {self.threads} --cache {self.cache}"
        )


def find_limits(wanted_bytes: int | None) -> tuple[Limit, ...]:
    """All limits that hold for this process.

    Args:
        wanted_bytes: of `--memory-limit`.
    """
    found = []
    if wanted_bytes is not None:
        found.append(Limit(wanted_bytes, "--memory-limit", "VmHWM", is_enforced=False))
    group = group_limit_bytes()
    if group is not None:
        found.append(Limit(group, "the control group's limit", "VmHWM"))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        found.append(Limit(address_space, "ulimit -v", "VmPeak"))
    return tuple(found)


def plan_memory(
    limits: Collection[Limit], options: TrainOptions, given: Collection[str], bundle: Bundle, dataset: Dataset
) -> tuple[TrainOptions, MemoryPlan | None]:
    """Options with a micro-batch, threads and a cache that fit; what was given by name stays as it is.

    The largest micro-batch with all threads and a cache is best; with fewer images at a time a step is hardly
    slower, with one thread it is, and without a cache every step is.

    Args:
        options: resolved; their micro-batch is the largest that is considered.
        given: names of options that the user decided.

    Raises:
        PlatformError: if the run does not fit, with the memory that it needs.
    """
    if not limits:
        return options, None
    largest_of_all = largest_image(dataset)
    counts = {options.threads} if "threads" in given else {options.threads, 1}
    trials = [_Trial(replace(options, threads=count), bundle, dataset, largest_of_all) for count in counts]
    trials.sort(key=lambda trial: -trial.threads)
    largest = options.micro_batch
    choices = [largest] if "micro_batch" in given else range(largest, 0, -1)
    for cache in dict.fromkeys((options.cache, "off" if options.cache == "auto" else options.cache)):
        for trial in trials:
            for micro_batch in choices if trial.fits_at_all else ():
                if trial.fits(limits, micro_batch, cache):
                    plan = _plan(limits, trial, micro_batch, cache)
                    return replace(options, micro_batch=micro_batch, threads=trial.threads, cache=cache), plan
    raise _too_little(limits, trials[-1], choices[-1], cache)


def _plan(limits: Collection[Limit], trial: "_Trial", micro_batch: int, cache: str) -> MemoryPlan:
    tightest = max(limits, key=lambda limit: trial.needed(limit.kind, micro_batch, cache) / limit.nbytes)
    needed = trial.needed(tightest.kind, micro_batch, cache)
    return MemoryPlan(tightest.nbytes, tightest.what, needed, micro_batch, trial.threads, cache)


def _too_little(limits: Collection[Limit], trial: "_Trial", micro_batch: int, cache: str) -> PlatformError:
    """What to say; `micro_batch` is the smallest that was considered."""
    flags = f"--micro-batch {micro_batch} --threads {trial.threads}"
    smaller = "calibrate a smaller package (fewer --layers, a smaller --resolution or --model)"
    remedy = f"allow it more, or {smaller}"
    enforced = [limit for limit in limits if limit.is_enforced]
    has_failed = trial.has_failed(micro_batch)
    if has_failed and not enforced:
        return PlatformError(
            f"this run needs at least {size(trial.needed(RESIDENT, micro_batch, cache))} with {flags}, but only"
            f" {size(free_bytes())} of memory are free; close other programs, or {smaller}"
        )
    worst = max(
        enforced if has_failed else limits,
        key=lambda limit: trial.needed(limit.kind, micro_batch, cache) - limit.nbytes,
    )
    needed = trial.needed(worst.kind, micro_batch, cache)
    needs = size(needed)
    if has_failed:  # by what was reached: there it ended, short of all that it would take
        needs = f"at least {needs}" if needed > worst.nbytes else f"more than {size(worst.nbytes)}"
    is_one_known = micro_batch > 1 and not trial.has_failed(1)
    with_one = size(trial.needed(worst.kind, 1, cache)) if is_one_known else ""
    hint = f"; with --micro-batch 1 it would need {with_one}" if with_one else ""
    return PlatformError(
        f"this run needs {needs} with {flags}, but {worst.what} is {size(worst.nbytes)}{hint}"
        f"{trial.about_images}; {remedy}"
    )


class _Trial:
    """Micro-batches of one image and of four, measured; the rest by calculation."""

    def __init__(self, options: TrainOptions, bundle: Bundle, dataset: Dataset, largest: LargestImage) -> None:
        self._largest = largest
        self._options, self._bundle, self._dataset = options, bundle, dataset
        self._variant = bundle.manifest.variant(options.method, options.layers)
        self._one: dict[str, int] = {}
        self._many: dict[str, int] = {}
        self._before = status_bytes("VmRSS") or 0

    @property
    def threads(self) -> int:
        """With which it was measured."""
        return self._options.threads

    def has_failed(self, micro_batch: int) -> bool:
        """Memory did not suffice to measure it: what is `needed` is the least then, not all."""
        return FAILED in self._one or (micro_batch > 1 and FAILED in self._many)

    def fits(self, limits: Collection[Limit], micro_batch: int, cache: str) -> bool:
        """Whether a run with this micro-batch keeps within all limits."""
        within = all(self.needed(limit.kind, micro_batch, cache) <= limit.nbytes for limit in limits)
        return within and not self.has_failed(micro_batch)

    @property
    def about_images(self) -> str:
        """What a user must know of the largest image, if it is larger than those that were measured."""
        beyond = self._beyond_bytes
        return f" (its largest image, {self._largest.path}, takes {size(beyond)} of it)" if beyond else ""

    @cached_property
    def fits_at_all(self) -> bool:
        """Run the two; whether memory sufficed for the first.

        Raises:
            LanceError: of the kind that fits, for anything but a lack of memory.
        """
        self._one = in_a_fork(lambda: self._peak(1)) if self._has_room_for_threads() else lack(self._stacks())
        if FAILED not in self._one:
            self._many = in_a_fork(lambda: self._peak(MANY))
        return FAILED not in self._one

    def _has_room_for_threads(self) -> bool:
        """Whether all threads can start: onnxruntime 1.31, and OpenBLAS, wait for ever for one that cannot."""
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return limit == resource.RLIM_INFINITY or (status_bytes("VmSize") or 0) + self._stacks() < limit

    def _stacks(self) -> int:
        """Address space of the threads of every graph, and of numpy's BLAS where codecs compute with it."""
        more = self._options.threads - 1
        blas = BLAS_THREAD_BYTES + _stack_bytes() if self._variant.schedule == "by layer" else 0
        return more * (len(self._variant.graphs) * _stack_bytes() + blas) + LEAST_BESIDE_STACKS

    @cached_property
    def _beyond_bytes(self) -> int:
        """Of the largest image, beyond those that were measured; they are decoded one at a time."""
        return bytes_beyond(self._largest, self._dataset, 2)

    def needed(self, kind: str, micro_batch: int, cache: str) -> int:
        """Bytes that a whole run takes with this micro-batch; at least, if it `has_failed`."""
        more = max(0, self._many.get(kind, 0) - self._one[kind])  # for the images beyond the first
        if self.has_failed(micro_batch):
            measured: float = self._one[kind] + more
        else:
            measured = self._one[kind] + more / (MANY - 1) * (micro_batch - 1)
        whole_run = self._state_bytes() + self._kept_bytes(micro_batch) + self._beyond_bytes
        whole_run += self._cache_bytes(micro_batch) if cache != "off" else 0
        if kind == "VmPeak":
            whole_run += _stack_bytes()  # of the thread that hears of signals (stop.py)
        return int((measured + whole_run) * (1 + MARGIN_SHARE)) + MARGIN_BYTES

    def _state_bytes(self) -> int:
        """Momentum, and the copy of the best state (weights and momentum) that waits to be written."""
        specs = {spec.name: spec for spec in self._bundle.manifest.parameters}
        return 3 * sum(specs[name].nbytes(1) for name in self._variant.parameters)

    def _kept_bytes(self, micro_batch: int) -> int:
        """In two passes the saved tensors of all micro-batches live at a time; two of them were measured."""
        if self._variant.schedule != "two passes":
            return 0
        batch = self._bundle.manifest.batch_size
        return sum(spec.nbytes(max(0, batch - 2 * micro_batch)) for spec in self._variant.saved)

    def _cache_bytes(self, micro_batch: int) -> int:
        """Records of a micro-batch, and the table: 8 bytes for each of two views of an image, twice."""
        images = sum(map(len, (self._dataset.train, self._dataset.validation, self._dataset.test)))
        record = sum(spec.nbytes(1) for spec in self._variant.boundary)  # float32: halves, widened
        return 2 * record * micro_batch + 2 * 2 * 8 * images

    def _peak(self, micro_batch: int) -> dict[str, int]:
        """Peaks, by kind of limit, of two micro-batches forward and back, and one evaluated."""
        manifest, options = self._bundle.manifest, self._options
        unseen = max(
            0, self._before - (status_bytes("VmRSS") or 0)
        )  # a fork maps libraries only as it uses them
        parameters = starting_parameters(self._bundle, self._variant)
        prefix = load_prefix(self._bundle, self._variant, options.threads, micro_batch)
        features = ComputedFeatures(prefix)
        step = training_step(self._bundle, self._variant, parameters, options.threads, features)
        predict = load_graph(self._bundle, self._variant, "predict", options.threads)
        is_whole = self._variant.schedule == "by layer"  # its activations are those of the whole batch
        samples = np.arange(manifest.batch_size if is_whole else min(2 * micro_batch, manifest.batch_size))
        flips = np.zeros(len(samples), np.bool_)
        batch = Batch(self._dataset.train, samples, flips, manifest.preprocessing)
        meter = PhaseMeter(MemoryProbe())
        step.run(batch, micro_batch, meter, lambda: None)
        with meter.phase("update"):
            Network(prefix, predict, parameters)(batch.images(slice(0, micro_batch)))
        resident_kib = meter.take_step()["step"].peak_rss_kib or 0
        return {"VmHWM": 1024 * resident_kib + unseen, "VmPeak": status_bytes("VmPeak") or 0}


def _stack_bytes() -> int:
    """Address space of a thread's stack."""
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return LARGEST_STACK if stack == resource.RLIM_INFINITY else stack
