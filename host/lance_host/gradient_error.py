"""How far a compressed weight gradient is from the exact one, for all ranks of a grid at once.

The weight gradient is linear in the layer's input A.  With A written in an orthonormal basis V_i of every
mode, `T = A x_0 V_0^T x_1 V_1^T x_2 V_2^T x_3 V_3^T`, each entry of T adds its own term, and ranks
(r0, r1, r2, r3) keep the terms of the box `T[:r0, :r1, :r2, :r3]`.  So all gradients of a grid of ranks are
running sums over its cells, and together cost little more than one.

A term needs the gradient at each tap of a basis image `v_h (x) v_w`, which is separable: the output
gradient, in the basis of the batch mode, is contracted with shifted columns of V_2, then of V_3.
Without groups the channel mode needs no grid: in its basis the terms of channels are orthogonal,
so that their squared errors add up.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from lance_edge.manifest import Layer
from lance_host.taps import weight_gradient

Grids = tuple[tuple[int, ...], ...]

WORKING_VALUES = 1 << 24  # float32 values of an intermediate tensor (64 MiB)


def gradient_errors(
    layer: Layer, x: torch.Tensor, dy: torch.Tensor, bases: Sequence[torch.Tensor], grids: Grids
) -> tuple[torch.Tensor, float]:
    """Frobenius distances to the exact weight gradient `[R0, R1, ...]`, and the norm of that gradient.

    Args:
        x: the layer's input `[B, *input_shape]`.
        dy: the gradient of its output `[B, *output_shape]`.
        bases: orthonormal `[n_i, n_i]` for each mode, the most important vectors first.
        grids: for each mode the ranks to look at, ascending, from 1 to n_i.
    """
    if layer.is_linear:
        return _of_linear(layer, x, dy, bases, grids)
    exact = weight_gradient(layer, x, dy)
    core = _in_bases(x, bases)
    rotated = torch.tensordot(bases[0].T, dy, dims=1)  # [B, O, H', W']
    squares = torch.zeros([len(grid) for grid in grids], dtype=torch.float64)
    for outputs in _output_slices(layer, grids):
        channels = _channels(layer, bases[1], grids[1], exact[outputs])
        sums = channels.zeros(len(grids[2]), len(grids[3]))  # [R2, R3, groups, R1 C / groups, O / groups taps]
        for step, (start, stop) in enumerate(_intervals(grids[0])):
            for rows in _pieces(start, stop, layer, channels.copies):
                taps = _tap_gradients(layer, rotated[rows, outputs], bases, grids)
                _add_cells(sums, channels.spread(core[rows]), taps, grids)
            squares[step] += channels.squared_distances(_running_sums(_running_sums(sums, 0), 1))
    return squares.sqrt(), float(torch.linalg.vector_norm(exact))


def _of_linear(
    layer: Layer, x: torch.Tensor, dy: torch.Tensor, bases: Sequence[torch.Tensor], grids: Grids
) -> tuple[torch.Tensor, float]:
    """As the 1x1 convolution of a map of one column, with features for channels and tokens for height."""
    (out, features), tokens = layer.weight_shape, math.prod(layer.input_shape[:-1])
    same = replace(
        layer,
        weight_shape=(out, features, 1, 1),
        input_shape=(features, tokens, 1),
        output_shape=(out, tokens, 1),
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
    )
    maps = [value.reshape(len(value), tokens, -1).transpose(1, 2)[..., None] for value in (x, dy)]
    one = torch.ones(1, 1)
    has_tokens = len(bases) == 3
    map_bases = [bases[0], bases[-1], bases[1] if has_tokens else one, one]
    map_grids = (grids[0], grids[-1], grids[1] if has_tokens else (1,), (1,))
    distances, norm = gradient_errors(
        same, maps[0], maps[1], map_bases, map_grids
    )  # [R0, R_features, R_tokens, 1]
    return distances[..., 0].transpose(1, 2) if has_tokens else distances[..., 0, 0], norm


def _output_slices(layer: Layer, grids: Grids) -> Iterator[slice]:
    """Output channels whose running sums stay within `WORKING_VALUES`; groups are small and stay together."""
    out, channels, *kernel = layer.weight_shape
    values = len(grids[2]) * len(grids[3]) * channels * math.prod(kernel)
    step = max(1, WORKING_VALUES // values) if layer.groups == 1 else out
    for first in range(0, out, step):
        yield slice(first, min(first + step, out))


def _in_bases(x: torch.Tensor, bases: Sequence[torch.Tensor]) -> torch.Tensor:
    """`x` with every mode in its basis."""
    core = x
    for basis in bases:
        core = torch.tensordot(core, basis, dims=([0], [0]))  # moves each mode to the end: four make a round
    return core


def _intervals(grid: Sequence[int]) -> Iterator[tuple[int, int]]:
    """`(0, grid[0]), (grid[0], grid[1]), ...`: what each rank adds to the one before."""
    return pairwise((0, *grid))


def _pieces(start: int, stop: int, layer: Layer, copies: int) -> Iterator[slice]:
    """Rows of the batch mode whose intermediate tensors stay within `WORKING_VALUES`."""
    channels, height, width = layer.input_shape
    taps = layer.weight_shape[0] * math.prod(layer.weight_shape[2:])
    step = max(1, WORKING_VALUES // (height * width * max(taps, channels * copies)))
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _add_cells(sums: torch.Tensor, rows: torch.Tensor, taps: torch.Tensor, grids: Grids) -> None:
    """Add the terms of these rows to each spatial cell.

    Args:
        sums: `[R2, R3, groups, channels, O / groups taps]`.
        rows: `[groups, channels, n, H, W]`.
        taps: `[groups, n, H, W, O / groups taps]`.
    """
    for i, (top, bottom) in enumerate(_intervals(grids[2])):
        for j, (left, right) in enumerate(_intervals(grids[3])):
            cell = rows[..., top:bottom, left:right].flatten(2)
            sums[i, j] += cell @ taps[:, :, top:bottom, left:right].flatten(1, 3)


def _running_sums(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`tensor.cumsum(dim)`, several times faster for a short dimension that is not the last."""
    sums = tensor.clone()
    for index in range(1, tensor.shape[dim]):
        sums.select(dim, index).add_(sums.select(dim, index - 1))
    return sums


def _tap_gradients(
    layer: Layer, rotated: torch.Tensor, bases: Sequence[torch.Tensor], grids: Grids
) -> torch.Tensor:
    """The gradient of each output channel's taps for every basis image and row, groups first.

    Returns:
        `[groups, n, r2, r3, O / groups taps]` for output gradients `[n, O, H', W']`.
    """
    rows, columns = (_shifted(layer, bases[2 + axis][:, : grids[2 + axis][-1]], axis) for axis in (0, 1))
    by_columns = torch.tensordot(rotated, columns, dims=([3], [2]))  # [n, O, H', r3, k]
    both = torch.tensordot(by_columns, rows, dims=([2], [2]))  # [n, O, r3, k, r2, k]
    grouped: torch.Tensor = both.reshape(len(both), layer.groups, -1, *both.shape[2:])
    return grouped.permute(1, 0, 5, 3, 2, 6, 4).flatten(4)  # from [n, groups, O / groups, r3, k, r2, k]


def _shifted(layer: Layer, basis: torch.Tensor, axis: int) -> torch.Tensor:
    """`[r, k, n']`: the value of basis vector r that tap k reads for each output position; padding is 0."""
    taps = torch.arange(layer.weight_shape[2 + axis])[:, None] * layer.dilation[axis]
    outputs = torch.arange(layer.output_shape[1 + axis])[None, :] * layer.stride[axis]
    positions = taps + outputs - layer.padding[axis]  # [k, n']
    inside = (positions >= 0) & (positions < len(basis))
    return torch.where(inside, basis.T[:, positions.clamp(0, len(basis) - 1)], 0.0)


def _squared_norms(tensor: torch.Tensor) -> torch.Tensor:
    """Of the last dimension, float64; without an array of squares."""
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=-1)
    return norms.double().square()


# --- the channel mode -----------------------------------------------------------------------------------


class _ChannelsApart:
    """One group: in the basis of the channel mode, each channel's error is its own."""

    copies = 1

    def __init__(self, basis: torch.Tensor, ranks: Sequence[int], exact: torch.Tensor) -> None:
        self._last = torch.tensor(ranks) - 1
        self._exact: torch.Tensor = torch.tensordot(basis.T, exact, dims=([1], [1])).flatten(1)  # [C, O taps]

    def zeros(self, heights: int, widths: int) -> torch.Tensor:
        return torch.zeros(heights, widths, 1, *self._exact.shape)

    def spread(self, core: torch.Tensor) -> torch.Tensor:
        """`[n, C, H, W] -> [1, C, n, H, W]`."""
        return core.transpose(0, 1)[None]

    def squared_distances(self, sums: torch.Tensor) -> torch.Tensor:  # takes `sums` for its own use
        """`[R1, R2, R3]`: channels up to the rank with their own error, the others with all they have."""
        kept = _squared_norms(sums[:, :, 0].sub_(self._exact)).cumsum(-1)  # [R2, R3, C]
        lost = _squared_norms(self._exact).flip(0).cumsum(0).flip(0)  # [C], from each channel on
        beyond = torch.cat([lost[1:], lost.new_zeros(1)])
        return (kept + beyond)[..., self._last].permute(2, 0, 1)


class _ChannelsMixed:
    """Groups: each kernel sees the rebuilt channels, so every rank of the grid is rebuilt."""

    def __init__(self, groups: int, basis: torch.Tensor, ranks: Sequence[int], exact: torch.Tensor) -> None:
        self.copies = len(ranks)
        self._ranks = ranks
        self._basis = basis
        grouped = exact.reshape(groups, -1, *exact.shape[1:])  # [groups, O / groups, C / groups, k, k]
        self._exact = grouped.transpose(1, 2).flatten(2)[:, None]  # [groups, 1, C / groups, O / groups taps]

    def zeros(self, heights: int, widths: int) -> torch.Tensor:
        groups, _, channels, taps = self._exact.shape
        return torch.zeros(heights, widths, groups, self.copies * channels, taps)

    def spread(self, core: torch.Tensor) -> torch.Tensor:
        """`[n, C, H, W] -> [groups, R1 C / groups, n, H, W]`: what each step of the grid adds."""
        added = [
            torch.tensordot(self._basis[:, start:stop], core[:, start:stop], dims=([1], [1]))  # [C, n, H, W]
            for start, stop in _intervals(self._ranks)
        ]
        by_group = [step.reshape(len(self._exact), -1, *step.shape[1:]) for step in added]
        return torch.cat(by_group, dim=1)

    def squared_distances(self, sums: torch.Tensor) -> torch.Tensor:
        """`[R1, R2, R3]`."""
        steps = sums.reshape(*sums.shape[:3], self.copies, -1, sums.shape[-1])
        difference = _running_sums(steps, 3).sub_(
            self._exact
        )  # [R2, R3, groups, R1, C / groups, O / groups taps]
        return _squared_norms(difference).sum((2, 4)).permute(2, 0, 1)


def _channels(
    layer: Layer, basis: torch.Tensor, ranks: Sequence[int], exact: torch.Tensor
) -> _ChannelsApart | _ChannelsMixed:
    if layer.groups == 1:
        return _ChannelsApart(basis, ranks, exact)
    return _ChannelsMixed(layer.groups, basis, ranks, exact)
