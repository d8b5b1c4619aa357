"""Training that leaves earlier tasks' subspaces alone: gradient projection (GPM), and what protection forbids.

Of each protected layer the gradient G, with a row for each filter, becomes `G - G M M^T`, of every group by
its own M.  This comes first of all: clipping only scales, and momentum only sums, what is orthogonal to M
already, so every update is orthogonal to M.  Weight decay would pull along the weights themselves, and biases
and norms have no input that M knows: both are refused.

Source: GPM, arXiv 2103.09762, eq. 6 and 7.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lance_device.options import TrainOptions
from lance_device.run_folder import RunFolder
from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError, CheckpointError, LanceError
from lance_edge.manifest import Manifest, Mode, Variant
from lance_edge.memory import Memory, memory_digest, packed_memory, read_memory, write_memory
from lance_edge.moments import expect_fitting

Float = NDArray[np.float32]
PACKAGE = "package"  # in place of a file: the memory that the package holds
KAHAN = 0.1  # a group that keeps less of its length when it is projected has to be projected again


def _open_memory(source: str, bundle: Bundle) -> Memory:
    """The memory of a file, or of the package itself (`PACKAGE`).

    Raises:
        ArtifactError: if there is none, or it is damaged.
    """
    if source != PACKAGE:
        return read_memory(Path(source))
    memory = packed_memory(bundle)
    if memory is None:
        raise ArtifactError(
            f"{bundle.path}: holds no memory of earlier tasks; give --protect the memory.npz"
            " of lance-host memory"
        )
    return memory


@dataclass(frozen=True)
class Protection:
    """The protected subspaces of what trains.

    Attributes:
        bases: of each protected weight `[groups, D, m]`, float32, orthonormal columns, then zeros.
        mode: of the memory; in channel mode D are the channels of a convolution.
        digest: identifies the memory.
    """

    bases: Mapping[str, Float]
    mode: Mode
    digest: str

    def project(self, gradients: dict[str, Float]) -> None:
        """`G <- G - G M M^T` of every protected weight, in place."""
        for name, bases in self.bases.items():
            gradient = gradients[name]
            channels_last = (
                self.mode == "channel" and gradient.ndim > 2
            )  # [O, C, k, k], and M is of the channels
            apart = gradient.swapaxes(1, -1) if channels_last else gradient
            left = _outside(apart.reshape(len(bases), -1, bases.shape[1]), bases).reshape(apart.shape)
            gradient[...] = left.swapaxes(1, -1) if channels_last else left


def protection(memory: Memory, manifest: Manifest, variant: Variant) -> Protection:
    """What a memory protects of a variant.

    Raises:
        ArtifactError: if the variant trains what the memory does not protect, or the two do not fit.
    """
    layers = {layer.name: layer for layer in manifest.layers}
    own = [layers[plan.layer] for plan in variant.layers]
    _expect_protected((layer.name for layer in own), memory)
    expect_fitting(memory, own, "memory")
    expect_no_extras(manifest, variant)
    bases = {layer.weight: memory.layers[layer.name].bases for layer in own}
    return Protection(bases, memory.mode, memory_digest(memory))


def protect(
    source: str | None, weight_decay: float, bundle: Bundle, variant: Variant, folder: RunFolder
) -> Protection | None:
    """The protection of a new run; its memory is kept in the folder, where `--resume` finds it.

    Args:
        source: a file, or `PACKAGE`.

    Raises:
        LanceError: if there is no such memory, it does not fit, or there is weight decay.
    """
    if source is None:
        return None
    memory = _open_memory(source, bundle)
    found = protection(memory, bundle.manifest, variant)
    expect_no_decay(weight_decay, found.bases)
    write_memory(folder.protected, memory)
    return found


def protect_again(
    source: str | None, options: TrainOptions, bundle: Bundle, folder: RunFolder
) -> Protection | None:
    """The protection of a run that is taken up: with what it began with.

    Raises:
        CheckpointError: if another memory is asked for, or the run's own is gone.
    """
    if source is not None and memory_digest(_open_memory(source, bundle)) != options.protect:
        began = "another memory" if options.protect else "no --protect"
        raise CheckpointError(
            f"{folder.path}: this run was started with {began}; a resumed run keeps its options, so that it"
            " ends as it would have without the break: leave --protect out, or start a new run"
            " with another --out"
        )
    if not options.protect:
        return None
    memory = read_memory(folder.protected)
    if memory_digest(memory) != options.protect:
        raise CheckpointError(
            f"{folder.protected}: not the memory that the run was started with; bring back the file, or start"
            " a new run with another --out"
        )
    return protection(memory, bundle.manifest, bundle.manifest.variant(options.method, options.layers))


def warning_of(manifest: Manifest, variant: Variant, protected: Protection | None) -> str | None:
    """What to say of a run that will change what earlier tasks need."""
    if protected is not None or variant.method != "bp" or not manifest.protected:
        return None
    earlier = ", ".join(task.name for task in manifest.tasks)
    return f"warning: plain bp forgets {earlier}; --protect package leaves alone what is needed of it"


def expect_no_decay(weight_decay: float, protected: Collection[str]) -> None:
    """Refuse weight decay where layers are protected.

    Raises:
        LanceError: naming one of them.
    """
    if weight_decay and protected:
        raise LanceError(
            f"--weight-decay {weight_decay:g}: it would change {next(iter(protected))} and other layers that"
            " earlier tasks need; leave it out after the first task"
        )


def expect_no_extras(manifest: Manifest, variant: Variant) -> None:
    """Refuse biases and norms among what trains after the first task.

    Raises:
        ArtifactError: naming the first.
    """
    weights = {layer.weight for layer in manifest.layers}
    extras = [name for name in variant.parameters if name not in weights and name not in manifest.head]
    if extras:
        raise ArtifactError(
            f"{variant.method}: the package trains {extras[0]}, which no memory protects; calibrate without"
            " --train-bias and --train-norm, so that nothing but layers and the head trains"
        )


def _expect_protected(trained: Iterable[str], memory: Memory) -> None:
    unknown = [name for name in trained if name not in memory.layers]
    if unknown:
        raise ArtifactError(
            f"memory: the package trains {', '.join(unknown)}, which the memory does not protect; it knows"
            f" {', '.join(memory.layers)}: train fewer --layers, or build the memory from these layers"
        )


def _outside(rows: Float, bases: Float) -> Float:
    """`G - G M M^T` of every group: `[groups, n, D]` and `[groups, D, m] -> [groups, n, D]`."""
    transposed = bases.transpose(0, 2, 1)
    left: Float = np.subtract(rows, (rows @ bases) @ transposed, dtype=np.float32)
    again = _norms(left) < KAHAN * _norms(rows)  # [groups]
    left[again] -= (left[again] @ bases[again]) @ transposed[again]
    return left


def _norms(rows: Float) -> Float:
    """Of each group `[groups, n, D]`, all filters together."""
    norms: Float = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    return norms
