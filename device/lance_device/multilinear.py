"""Products of a tensor with itself and with thin matrices, without a copy of the tensor.

`A_(i)` is the mode-i unfolding of a tensor `[n_0, n_1, ...]`: `[n_i, product of the other sizes]`.  It passes
in blocks of columns; in float32 within a block, in float64 from block to block.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lance_edge.errors import NumericalError

Float = NDArray[np.float32]
Double = NDArray[np.float64]

BLOCK_VALUES = 1 << 16  # of a tensor at a time, 256 KiB: fits into a board's L2 cache
JOINT_SIZES = 128  # up to so many positions, one Gram matrix over both last modes is cheaper than two
SMALL_MODE = 48  # up to this size a Gram matrix is faster than two products with any number of columns
CALL_MACS = 4000  # multiply-adds that fit into the time of one more call of the matrix product


def power_step(tensor: Float, factors: Mapping[int, Float]) -> dict[int, Double]:
    """`A_(i) (A_(i)^T U_i)` `[n_i, r_i]` of the modes that have a factor, each in its cheaper order.

    For every column of the unfolding the Gram matrix costs `n_i² / 2` multiply-adds (it is symmetric),
    the two products `2 n_i r_i`.  Where the last two modes share one Gram matrix it is all but free.

    Args:
        factors: `U_i [n_i, r_i]` by mode.

    Raises:
        NumericalError: if a result is not finite.
    """
    by_gram = [mode for mode, factor in factors.items() if _gram_is_cheaper(tensor, mode, factor.shape[1])]
    found = grams(tensor, by_gram)  # one at a time
    return {
        mode: next(found) @ factor if mode in by_gram else _two_products(tensor, mode, factor)
        for mode, factor in factors.items()
    }


def _gram_is_cheaper(tensor: Float, mode: int, rank: int) -> bool:
    return _is_joint(tensor, mode) or tensor.shape[mode] < max(4 * rank, SMALL_MODE)


def grams(tensor: Float, modes: Sequence[int]) -> Iterator[Double]:
    """`A_(i) A_(i)^T` `[n_i, n_i]` of these modes, in order.

    Raises:
        NumericalError: if one is not finite.
    """
    joint = None  # [H, W, H, W], of both last modes
    for mode in modes:
        if _is_joint(tensor, mode):
            joint = _joint_gram(tensor) if joint is None else joint
            is_last = mode == tensor.ndim - 1
            gram: Double = np.einsum("hwhv->wv" if is_last else "hwgw->hg", joint)
        else:
            gram = _gram(tensor, mode)
        _require_finite(gram)
        yield gram


def _is_joint(tensor: Float, mode: int) -> bool:
    """Whether the mode is one of the last two, and these are small enough to be taken as one."""
    *_, height, width = tensor.shape
    return tensor.ndim > 2 and mode >= tensor.ndim - 2 and height * width <= JOINT_SIZES


@np.errstate(over="ignore", invalid="ignore")  # what overflows is found below and ends in one clear line
def _two_products(tensor: Float, mode: int, factor: Float) -> Double:
    total = np.zeros(factor.shape, np.float64)
    for block in _blocks(tensor, mode):  # [n, part]
        total += block @ (block.T @ factor)
    _require_finite(total)
    return total


@np.errstate(over="ignore", invalid="ignore")  # the caller looks for it
def _gram(tensor: Float, mode: int) -> Double:
    size = tensor.shape[mode]
    total = np.zeros((size, size), np.float64)
    for block in _blocks(tensor, mode):  # [n, part]
        total += block @ block.T  # float32 in a block, float64 over the blocks
    return total


def _joint_gram(tensor: Float) -> Double:
    """`[H, W, H, W]`: products of all pairs of positions, summed over batch and channels."""
    *_, height, width = tensor.shape
    merged = tensor.reshape(-1, height * width)
    return _gram(merged, 1).reshape(height, width, height, width)


def _blocks(tensor: Float, mode: int) -> Iterator[Float]:
    """The unfolding `[n, rest]` in blocks of columns; only those of middle modes are copies."""
    before, size, after = _sizes(tensor.shape, mode)
    columns = max(size, BLOCK_VALUES // size)  # at least square, or adding up Gram matrices costs most
    if before == 1:
        wide = tensor.reshape(size, after)
        yield from (wide[:, start : start + columns] for start in range(0, after, columns))
        return
    stacked = tensor.reshape(before, size, after)
    step = max(1, columns // after)
    for start in range(0, before, step):
        yield stacked[start : start + step].transpose(1, 0, 2).reshape(size, -1)


def _sizes(shape: Sequence[int], mode: int) -> tuple[int, int, int]:
    """`before, n_mode, after`: the tensor is `[before, n_mode, after]` without a copy."""
    return math.prod(shape[:mode]), shape[mode], math.prod(shape[mode + 1 :])


def _require_finite(array: Double) -> None:
    if not np.isfinite(array).all():
        raise NumericalError("an activation is not finite, or too large to be squared")


# --- products with the factors ------------------------------------------------------------------------


def project(tensor: Float, factors: Mapping[int, Float]) -> Float:
    """`A x_0 U_0^T x_1 U_1^T ...`, in the cheaper of two orders that both need little memory.

    Args:
        factors: `U_i [n_i, r_i]` by mode; the batch mode may be missing, which leaves it as it is.
    """
    batch = factors.get(0)
    others = [factors[mode] for mode in range(1, tensor.ndim)]
    ranks = (len(tensor) if batch is None else batch.shape[1], *(other.shape[1] for other in others))
    if batch is not None and _batch_first(tensor.shape, ranks):
        return products(product(tensor, batch, 0), others)
    core = np.zeros(ranks, np.float32)
    step = max(1, BLOCK_VALUES // math.prod(tensor.shape[1:]))
    for start in range(0, len(tensor), step):
        rows = slice(start, start + step)
        images = products(tensor[rows], others)  # [N, r_1, ...]
        if batch is None:
            core[rows] = images
        else:
            core += product(images, batch[rows], 0)
    return core


@functools.lru_cache
def _batch_first(shape: tuple[int, ...], ranks: tuple[int, ...]) -> bool:
    """Whether to contract the batch mode of the whole tensor first.

    The result, `r_0 / B` of the tensor, must be small beside it.
    """
    first = math.prod(shape) * ranks[0] + _cheapest_order((ranks[0], *shape[1:]), ranks[1:])[1]
    last = _cheapest_order(shape, ranks[1:])[1] + shape[0] * math.prod(ranks)
    return 4 * ranks[0] <= shape[0] and first < last


def products(tensor: Float, matrices: Sequence[Float]) -> Float:
    """Contract modes 1, 2, ... of `[N, n_1, ...]` with matrices `[n_i, r_i]`, in the cheapest order."""
    order, _ = _cheapest_order(tensor.shape, tuple(matrix.shape[1] for matrix in matrices))
    for mode in order:
        tensor = product(tensor, matrices[mode - 1], mode)
    return tensor


def product(tensor: Float, matrix: Float, mode: int) -> Float:
    """`tensor x_mode matrix^T`: the mode of size n becomes r, for a matrix `[n, r]`."""
    before, size, after = _sizes(tensor.shape, mode)
    shape = (*tensor.shape[:mode], matrix.shape[1], *tensor.shape[mode + 1 :])
    if after == 1:
        return (tensor.reshape(before, size) @ matrix).reshape(shape)
    return (matrix.T @ tensor.reshape(before, size, after)).reshape(shape)


@functools.lru_cache
def _cheapest_order(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The order of the modes 1, 2, ... and its cost, in multiply-adds.

    A mode before the last one takes a call of the matrix product for each index before it.
    """

    def cost(order: tuple[int, ...]) -> int:
        sizes, total = list(shape), 0
        for mode in order:
            before, _, after = _sizes(sizes, mode)
            calls = before if after > 1 else 1
            total += math.prod(sizes) * ranks[mode - 1] + calls * CALL_MACS
            sizes[mode] = ranks[mode - 1]
        return total

    best = min(itertools.permutations(range(1, len(shape))), key=cost)
    return best, cost(best)
