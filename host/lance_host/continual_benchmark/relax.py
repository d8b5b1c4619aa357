"""`--relax`: give back to a new task what earlier tasks need little and it needs much.

A strict memory protects every direction of M alike, whatever it is worth: where tasks are related, the new
one may not even use what they have in common.  Here, for the time of one task, the memory is M' within M:

1. In the coordinates of M, `A = M^T C_old M` is what earlier tasks have there and `B = M^T C_new M` what the
   new one has, each moment of trace 1 a task (`C_old` is the mean over the tasks).
2. Directions v of M are taken by their overlap, `v^T B v / v^T A v`, the largest first (the generalised
   eigenvectors of B and A), while the new task has more there than earlier ones have.
3. They are released as long as all of them together hold no more than the share `relax` of the energy of
   earlier tasks.  M' is what is left of M.

So `relax` bounds the energy of earlier tasks that is open to change, beside what the threshold of the memory
never covered; 0 is strict.  After the task the whole of M is extended: what was released is protected again,
with what the task made of it.

The idea that related tasks may share protected directions is that of TRGP (Lin et al., ICLR 2022, arXiv
2202.02931: trust regions) and CODE-CL (Apolinario et al., arXiv 2411.15235: conceptors and their overlap);
that directions differ in importance, of scaled GPM (Saha and Roy, AAAI 2023, arXiv 2302.01386).  They scale
gradients; here a direction is protected or released, so that LANCE's activations follow without any new
operator on the board.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lance_edge.memory import LayerMemory, Memory, pack
from lance_edge.subspace import complement, orthonormal
from lance_host.continual_benchmark.job import Job
from lance_host.continual_benchmark.protected import Kept, moments_of, unit_trace

Double = NDArray[np.float64]
FLOOR = 1e-9  # of the mean energy of a direction: earlier tasks have at least so much everywhere


def relaxed(job: Job, kept: Kept) -> Memory:
    """The memory that protects while the task is learnt."""
    assert job.before is not None
    new = {name: unit_trace(moment) for name, moment in moments_of(job, job.before).items()}
    tasks = len(kept.memory.tasks)
    layers = {
        name: release(layer, kept.moments[name] / tasks, new[name], job.relax) if name in new else layer
        for name, layer in kept.memory.layers.items()
    }
    ranks = {name: layer.ranks for name, layer in layers.items()}
    last = replace(kept.memory.tasks[-1], ranks=ranks)
    return replace(kept.memory, layers=layers, tasks=(*kept.memory.tasks[:-1], last))


def release(layer: LayerMemory, old: NDArray[np.floating], new: Double, share: float) -> LayerMemory:
    """What is left of a layer's memory.

    Args:
        old, new: second moments `[groups, D, D]` of earlier tasks and of the new one, each of trace 1.
        share: of the earlier tasks' energy that may be released, of every group.
    """
    return pack([release_basis(layer.basis(g), old[g], new[g], share) for g in range(layer.groups)])


def release_basis(
    basis: NDArray[np.floating], old: NDArray[np.floating], new: NDArray[np.floating], share: float
) -> Double:
    """M' `[D, m']` within M `[D, m]`; see the head of the module."""
    wide = basis.astype(np.float64)
    before, now = (wide.T @ moment.astype(np.float64) @ wide for moment in (old, new))  # [m, m]
    overlap, vectors = generalised_eigenvectors(now, before)
    wanted = vectors[:, overlap > 1]
    if not wanted.shape[1]:
        return wide
    apart = orthonormal(wanted)  # [m, k], in the same order
    energy = np.einsum("ij,ik,kj->j", apart, before, apart)
    count = int(np.searchsorted(np.cumsum(energy), share * float(np.trace(old)), side="right"))
    return wide @ complement(apart[:, :count]) if count else wide


def generalised_eigenvectors(now: Double, before: Double) -> tuple[Double, Double]:
    """`now v = overlap before v`, overlaps descending; `before` is kept away from singular."""
    size = len(before)
    floor = FLOOR * max(float(np.trace(before)), np.finfo(np.float64).tiny) / max(size, 1)
    values, vectors = np.linalg.eigh(before + floor * np.eye(size))
    root = vectors / np.sqrt(np.maximum(values, floor))  # [m, m], root^T before root = I
    overlap, turned = np.linalg.eigh(root.T @ now @ root)
    return overlap[::-1], (root @ turned)[:, ::-1]
