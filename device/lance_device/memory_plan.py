"""Whether a run fits into the memory that it may use, found out before it begins.

How much a network takes depends on its graphs, on the runtime's version and on the processor, so it is
measured: with micro-batches of one image and of four, forward, backward and evaluation, in a fork of this
process, which may fail and leaves nothing behind.  What an image adds is taken from the difference; what only
a whole run holds (momentum, a copy of the best state, what two passes keep of a batch, the cache's table) is
added from the manifest.
"""

import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from lance_device.features import Batch, ComputedFeatures
from lance_device.graphs import Network, load_graph, load_prefix, starting_parameters
from lance_device.guard import group_limit_bytes, status_bytes
from lance_device.measure import PhaseMeter
from lance_device.options import TrainOptions
from lance_device.probe import MemoryProbe
from lance_device.session import is_lack_of_memory
from lance_device.step import training_step
from lance_device.units import size
from lance_edge import errors
from lance_edge.bundle import Bundle
from lance_edge.datasets import Dataset
from lance_edge.errors import LanceError, PlatformError

FAILED = "failed"
MANY = 4  # images of the second measurement
TRIAL_TIMEOUT_S = 900.0  # two images on a slow board take seconds
LARGEST_STACK = 8 << 20  # of a thread, where `ulimit -s` sets no limit
LEAST_BESIDE_STACKS = 16 << 20  # the graphs themselves, before an allocation may fail
MARGIN_BYTES = 4 << 20  # Python's own growth, larger images to come, the rows of a long run
MARGIN_SHARE = 0.02  # of everything: how well the measurement repeats itself


@dataclass(frozen=True)
class Limit:
    """Memory that this process may use.

    Attributes:
        what: who says so, for messages.
        kind: `VmHWM` (resident memory) or `VmPeak` (address space), as in proc(5).
    """

    nbytes: int
    what: str
    kind: str


@dataclass(frozen=True)
class MemoryPlan:
    """What fits, for the user and for `run.json`; `needed_bytes` is of the tightest limit."""

    limit_bytes: int
    limit: str
    needed_bytes: int
    micro_batch: int
    threads: int

    def __str__(self) -> str:
        return (
            f"memory: {self.limit} {size(self.limit_bytes)}, needs {size(self.needed_bytes)} with --micro-batch"
            f" {self.micro_batch} --threads {self.threads}"
        )


def find_limits(wanted_bytes: int | None) -> tuple[Limit, ...]:
    """All limits that hold for this process.

    Args:
        wanted_bytes: of `--memory-limit`.
    """
    found = []
    if wanted_bytes is not None:
        found.append(Limit(wanted_bytes, "--memory-limit", "VmHWM"))
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
    """Options with a micro-batch, and threads, that fit; what was given by name stays as it is.

    Args:
        options: resolved; their micro-batch is the largest that is considered.
        given: names of options that the user decided.

    Raises:
        PlatformError: if the run does not fit, with the memory that it needs.
    """
    if not limits:
        return options, None
    threads = {options.threads} if "threads" in given else {options.threads, 1}
    for count in sorted(threads, reverse=True):
        trial = _Trial(replace(options, threads=count), bundle, dataset)
        is_measured = trial.measure()
        largest = options.micro_batch
        choices = [largest] if "micro_batch" in given else range(largest if is_measured else 0, 0, -1)
        for micro_batch in choices:
            if is_measured and all(trial.needed(limit.kind, micro_batch) <= limit.nbytes for limit in limits):
                plan = _plan(limits, trial, micro_batch, count)
                return replace(options, micro_batch=micro_batch, threads=count), plan
    raise _too_little(limits, trial, largest if "micro_batch" in given else 1)


def _plan(limits: Collection[Limit], trial: "_Trial", micro_batch: int, threads: int) -> MemoryPlan:
    tightest = max(limits, key=lambda limit: trial.needed(limit.kind, micro_batch) / limit.nbytes)
    needed = trial.needed(tightest.kind, micro_batch)
    return MemoryPlan(tightest.nbytes, tightest.what, needed, micro_batch, threads)


def _too_little(limits: Collection[Limit], trial: "_Trial", micro_batch: int) -> PlatformError:
    """What to say; `micro_batch` is the smallest that was considered."""
    flags = f"--micro-batch {micro_batch} --threads {trial.threads}"
    remedy = "allow it more, or calibrate a smaller package (fewer --layers, a smaller --resolution or --model)"
    if trial.failed_at_bytes is not None:
        names = " and ".join(f"{limit.what} ({size(limit.nbytes)})" for limit in limits)
        where = f": an allocation failed at {size(trial.failed_at_bytes)}" if trial.failed_at_bytes else ""
        return PlatformError(f"this run needs more memory than {names} permits with {flags}{where}; {remedy}")
    worst = max(limits, key=lambda limit: trial.needed(limit.kind, micro_batch) - limit.nbytes)
    hint = (
        f"; with --micro-batch 1 it would need {size(trial.needed(worst.kind, 1))}" if micro_batch > 1 else ""
    )
    return PlatformError(
        f"this run needs {size(trial.needed(worst.kind, micro_batch))} with {flags}, but {worst.what} is"
        f" {size(worst.nbytes)}{hint}; {remedy}"
    )


def in_a_fork(measure: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What `measure` gives in a copy of this process; `{"failed": address space}` if memory did not suffice.

    Raises:
        LanceError: what `measure` raised, but for a lack of memory.
        RuntimeError: with the traceback, if it raised anything else.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(measure, readable, writable)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        is_ready, _, _ = select.select([pipe], [], [], TRIAL_TIMEOUT_S)
        if not is_ready:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:  # killed, or ended by a library: it took more memory than there was
        return {FAILED: status_bytes("VmPeak") or 0}
    found = json.loads(answer)
    if isinstance(found, str):
        kind, text = found.split(":", 1)
        raise getattr(errors, kind, RuntimeError)(text)
    return dict(found)


def _answer(measure: Callable[[], dict[str, int]], readable: int, writable: int) -> NoReturn:
    """In the fork: answer as JSON, and end without a trace of this process's own ending."""
    found: Any = None
    try:
        os.close(readable)
        found = measure()
    except (MemoryError, PlatformError):
        found = {FAILED: status_bytes("VmPeak") or 0}
    except LanceError as error:
        found = f"{type(error).__name__}:{error}"
    except Exception as error:
        is_lack = is_lack_of_memory(error)
        found = {FAILED: status_bytes("VmPeak") or 0} if is_lack else f"RuntimeError:{traceback.format_exc()}"
    finally:
        os.write(writable, json.dumps(found).encode() if found is not None else b"")
        os._exit(0)


class _Trial:
    """Micro-batches of one image and of four, measured; the rest by calculation."""

    def __init__(self, options: TrainOptions, bundle: Bundle, dataset: Dataset) -> None:
        self._options, self._bundle, self._dataset = options, bundle, dataset
        self._variant = bundle.manifest.variant(options.method, options.layers)
        self._one: dict[str, int] = {}
        self._many: dict[str, int] = {}
        self._before = status_bytes("VmRSS") or 0

    @property
    def threads(self) -> int:
        """With which it was measured."""
        return self._options.threads

    @property
    def failed_at_bytes(self) -> int | None:
        """Address space when memory did not even suffice for one image."""
        return self._one.get(FAILED)

    def measure(self) -> bool:
        """Run the two; whether memory sufficed for the first.

        Raises:
            LanceError: of the kind that fits, for anything but a lack of memory.
        """
        self._one = in_a_fork(lambda: self._peak(1)) if self._has_room_for_threads() else {FAILED: 0}
        if FAILED not in self._one:
            self._many = in_a_fork(lambda: self._peak(MANY))
        return FAILED not in self._one

    def _has_room_for_threads(self) -> bool:
        """Whether every graph can have its threads: onnxruntime 1.31 waits for ever if one cannot start."""
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit == resource.RLIM_INFINITY:
            return True
        threads = len(self._variant.graphs) * (self._options.threads - 1)
        return (status_bytes("VmSize") or 0) + threads * _stack_bytes() + LEAST_BESIDE_STACKS < limit

    def needed(self, kind: str, micro_batch: int) -> int:
        """Bytes that a whole run takes with this micro-batch."""
        if FAILED in self._many and micro_batch > 1:
            return sys.maxsize
        an_image = max(0, self._many.get(kind, 0) - self._one[kind]) / (MANY - 1)
        measured = self._one[kind] + an_image * (micro_batch - 1)
        whole_run = self._state_bytes() + self._kept_bytes(micro_batch) + self._cache_bytes(micro_batch)
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
        if self._options.cache == "off":
            return 0
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
