"""Beginning a run: a new one, or one that is taken up again where its last checkpoint stands."""

import datetime
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lance_device.cache_plan import CachePlan, choose, plan_cache
from lance_device.checkpoint import Checkpoint, Meta, Progress
from lance_device.class_weights import training_targets
from lance_device.graphs import starting_parameters
from lance_device.memory_plan import MemoryPlan, find_limits, plan_memory
from lance_device.options import TrainOptions, keep_stored, resolve
from lance_device.pace import PaceOptions
from lance_device.protect import Protection, expect_no_decay, protect, protect_again
from lance_device.recover import recover
from lance_device.run_folder import RunFolder, data_identity
from lance_edge.bundle import Bundle
from lance_edge.checkpoints import SCHEMA_VERSION
from lance_edge.datasets import Dataset
from lance_edge.errors import CheckpointError, DataError
from lance_edge.input_spec import ArrayInput, InputSpec
from lance_edge.manifest import Variant
from lance_edge.stream import SampleStream
from lance_edge.targets import Targets

Float = NDArray[np.float32]


@dataclass(frozen=True)
class CheckpointEvery:
    """How often `last.npz` is written: after so many steps, or so many seconds.

    `kept_epochs`: and after so many epochs a copy that stays; 0: none.
    """

    steps: int | None = None
    seconds: float | None = None
    kept_epochs: int = 0


@dataclass(frozen=True)
class TrainRequest:
    """What somebody asks for.

    Attributes:
        values: of every field of `TrainOptions`; `None` is "auto".
        given: the fields that were asked for by name: a resumed run must agree with these.
        arguments: the command line as it was, for `run.json`.
        resume_or_start: take up the run where there is one, else begin one: what a service does.
        memory_limit: bytes that the process may use.
        strict: refuse images that cannot be read, instead of leaving them out.
        pace: pauses against heat, and for other programs.
        signed_sha256: that the package must have by its signature; `None` asks for no signature.
        protect: the file of a memory whose subspaces gradients are projected off, or "package".
    """

    artifact: Path
    data: Path
    out: Path
    values: Mapping[str, Any]
    given: frozenset[str]
    checkpoint_every: CheckpointEvery
    resume: bool
    arguments: tuple[str, ...] = ()
    resume_or_start: bool = False
    memory_limit: int | None = None
    strict: bool = False
    pace: PaceOptions = field(default_factory=PaceOptions)
    signed_sha256: str | None = None
    protect: str | None = None

    @property
    def takes_up(self) -> bool:
        """Whether a run that is there is gone on with."""
        return self.resume or (self.resume_or_start and RunFolder(self.out).has_state)

    def resume_command(self) -> str:
        """What takes the run up again."""
        words = ("train", "--artifact", self.artifact, "--data", self.data, "--out", self.out, "--resume")
        return shlex.join(["lance-device", *map(str, words)])


@dataclass
class Run:
    """A run that is ready to train: what is fixed, and its state (weights, momentum, progress).

    Attributes:
        memory: how the run fits into what it may use, where there is a limit.
        protection: the subspaces that gradients are projected off, where there are any.
        notes: what was damaged on disk when the run was taken up, and what became of it.
    """

    folder: RunFolder
    run_id: str
    options: TrainOptions
    variant: Variant
    stream: SampleStream
    total_steps: int
    data_sha256: str
    parameters: dict[str, Float]
    velocity: dict[str, Float]
    codec_state: dict[str, Float]
    progress: Progress
    targets: Targets
    cache: CachePlan
    cache_reason: str
    memory: MemoryPlan | None = None
    protection: Protection | None = None
    is_resumed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether no step is left: all are made, or the schedule has ended the run."""
        return self.progress.step >= self.total_steps or self.progress.plateau.is_over


def open_run(request: TrainRequest, bundle: Bundle, dataset: Dataset) -> Run:
    """A new run in an empty folder, or the one in it with `resume`.

    Raises:
        ArtifactError: if the package lacks the method.
        CheckpointError: if there is nothing to resume, or it does not belong to this request.
        DataError: if there are too few images for a batch, or others than before.
        StorageError: if the folder holds a run already, or cannot be made.
    """
    _expect_full_batch(request.data, len(dataset.train), bundle.manifest.batch_size)
    new_or_not = _resume_run if request.takes_up else _new_run
    return new_or_not(request, bundle, dataset)


def check_request(request: TrainRequest, bundle: Bundle) -> None:
    """What can be said at once, before all images are looked at.

    Raises:
        ArtifactError: if the package lacks the method.
        CheckpointError: if there is nothing to resume.
        StorageError: if the folder holds a run already.
    """
    options = resolve(request.values, bundle.manifest)
    expect_no_decay(options.weight_decay, bundle.manifest.protected)
    folder = RunFolder(request.out)
    if request.takes_up:
        folder.expect_run()
    else:
        folder.claim()


def make_checkpoint(run: Run, bundle: Bundle) -> Checkpoint:
    """The state of a run; shares its arrays."""
    best, manifest = run.progress.best, bundle.manifest
    meta = Meta(
        schema_version=SCHEMA_VERSION,
        run_id=run.run_id,
        artifact_sha256=bundle.sha256,
        data_sha256=run.data_sha256,
        model=manifest.model,
        classes=manifest.classes,
        method=run.variant.method,
        layers=len(run.variant.layers),
        step=run.progress.step,
        epoch=run.progress.epoch,
        best_accuracy=best.validation_accuracy if best is not None else None,
        options=run.options,
        progress=run.progress,
    )
    return Checkpoint(meta, run.parameters, run.velocity, run.codec_state)


def _new_run(request: TrainRequest, bundle: Bundle, dataset: Dataset) -> Run:
    options = resolve(request.values, bundle.manifest)
    folder = RunFolder(request.out)
    limits = find_limits(request.memory_limit)
    wanted = options.cache
    options, memory = plan_memory(limits, options, request.given, bundle, dataset)
    variant = bundle.manifest.variant(options.method, options.layers)
    _expect_possible_augment(options.augment, bundle.manifest.preprocessing)
    parameters = starting_parameters(bundle, variant)
    protected = protect(request.protect, options.weight_decay, bundle, variant, folder)
    plan = _plan(options, bundle, dataset, folder)
    cache, reason = choose(plan["cache"], options.cache)
    if options.cache != wanted:
        reason = "with a cache the run would not fit into its memory"
    return Run(
        folder=folder,
        run_id=f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        options=replace(options, cache=cache, protect=protected.digest if protected else ""),
        variant=variant,
        **plan,
        parameters=parameters,
        velocity={},
        codec_state={},
        progress=Progress(),
        cache_reason=reason,
        memory=memory and replace(memory, cache=cache),
        protection=protected,
    )


def _resume_run(request: TrainRequest, bundle: Bundle, dataset: Dataset) -> Run:
    folder = RunFolder(request.out)
    recovered = recover(folder, bundle)
    checkpoint = recovered.checkpoint
    meta = checkpoint.meta
    wanted = resolve(request.values, bundle.manifest)
    options = keep_stored(meta.options, wanted, request.given, str(folder.path))
    limits = find_limits(request.memory_limit)
    options, memory = plan_memory(limits, options, ("micro_batch", "threads"), bundle, dataset)
    run = Run(
        folder=folder,
        run_id=meta.run_id,
        options=options,
        variant=bundle.manifest.variant(options.method, options.layers),
        **_plan(options, bundle, dataset, folder),
        parameters=checkpoint.parameters,
        velocity=checkpoint.velocity,
        codec_state=checkpoint.codec_state,
        progress=meta.progress,
        is_resumed=True,
        notes=list(recovered.notes),
        cache_reason="as the run began",
        memory=memory,
        protection=protect_again(request.protect, options, bundle, folder),
    )
    if run.data_sha256 != meta.data_sha256:
        raise CheckpointError(
            f"{request.data}: the training images are not those that {folder.last} was trained on;"
            " give the same --data, unchanged, or start a new run with another --out"
        )
    return run


def _plan(options: TrainOptions, bundle: Bundle, dataset: Dataset, folder: RunFolder) -> dict[str, Any]:
    manifest = bundle.manifest
    stream = SampleStream(
        count=len(dataset.train),
        batch_size=manifest.batch_size,
        seed=options.seed,
        shuffle=options.shuffle,
        flip=options.augment == "flip",
    )
    total_steps = options.steps if options.steps is not None else stream.total_steps(options.epochs)
    variant = manifest.variant(options.method, options.layers)
    return {
        "stream": stream,
        "total_steps": total_steps,
        "data_sha256": data_identity(dataset.train),
        "targets": training_targets(
            options.class_weights, options.label_smoothing, dataset.train.labels, manifest.classes
        ),
        "cache": plan_cache(options, total_steps, bundle, variant, dataset, folder.path),
    }


def _expect_possible_augment(augment: str, preprocessing: InputSpec) -> None:
    if isinstance(preprocessing, ArrayInput) and augment != "none":
        raise DataError(
            f"--augment {augment}: the package takes arrays, which go to the network unchanged; leave it out"
        )


def _expect_full_batch(data: Path, images: int, batch_size: int) -> None:
    if images < batch_size:
        largest = 1 << (images.bit_length() - 1)
        raise DataError(
            f"{data}: {images} training images, but the package was calibrated for batches of {batch_size};"
            f" add images, or calibrate again with --batch-size {largest}"
        )
