"""Second moments of a layer's input in every mode, streamed over full batches.

The input of a layer is one tensor `[B, g, D, S]`: B samples, g groups, the D values that one filter reads, and
S places where it reads them.  In patch mode D = C/g k_h k_w and the places are output positions; in channel
mode D = C and they are input positions, with height and width as modes of their own; of a linear layer D are
its features and the places are tokens.  Patches are views: only parts of `CHUNK_VALUES` values are ever
copied (of a few samples, groups or positions), or one sample of one group where all its places are needed.

The moment of the protected mode (inputs, channels, features) is of the input as it is.  Those of the other
modes are of what a memory leaves of it, `X - M M^T X`: the next task's projections keep nothing else.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from lance_edge.errors import ArtifactError, LanceError, NumericalError
from lance_edge.manifest import Layer, Mode
from lance_edge.memory import LayerMemory, Memory

# Positions beyond this number stay whole: their moment alone would take 32 MiB, their basis as much.
MOST_POSITIONS = 2048
CHUNK_VALUES = 1 << 20  # float64 values of patches that are copied at a time (8 MiB)
CHUNK_COPIES = 5  # at most, at a time: patches as they are, by columns, unfolded; what is taken off; a product

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Moments = dict[int, Double]  # by mode; the protected one `[groups, D, D]`, the others `[n, n]`


def protected_mode(layer: Layer) -> int:
    """The mode that a memory protects: inputs, channels or features."""
    return len(layer.input_shape) if layer.is_linear else 1


def protected_shape(layer: Layer, mode: Mode) -> tuple[int, int]:
    """Groups and D of a layer's memory.

    Raises:
        LanceError: for a grouped convolution in channel mode, where one basis has to serve all groups.
    """
    if layer.is_linear:
        return 1, layer.weight_shape[1]
    if mode == "patch":
        return layer.groups, int(np.prod(layer.weight_shape[1:]))
    if layer.groups > 1:
        raise LanceError(
            f"{layer.name}: a grouped convolution has no protected subspace in channel mode; use --mode patch"
        )
    return 1, layer.input_shape[0]


def expect_fitting(memory: Memory, layers: Iterable[Layer], where: str) -> None:
    """See that a memory has the dimensions of a network's layers; of a layer that it lacks nothing is said.

    Raises:
        ArtifactError: naming the first layer of which it is not.
    """
    for layer in layers:
        found = memory.layers.get(layer.name)
        expected = protected_shape(layer, memory.mode)
        if found is not None and (found.groups, found.dimension) != expected:
            raise ArtifactError(
                f"{where}: {layer.name} has {found.groups} groups of {found.dimension} dimensions, in the"
                f" package {expected[0]} of {expected[1]} ({memory.mode} mode); give the memory of this network"
            )


def mode_sizes(layer: Layer, mode: Mode, batch_size: int) -> tuple[int, ...]:
    """The size of every mode, in the order of `Layer.modes_in`."""
    if layer.is_linear:
        return (batch_size, *layer.input_shape)
    if mode == "channel":
        return (batch_size, *layer.input_shape)
    _, rows, columns = layer.output_shape
    return (batch_size, protected_shape(layer, mode)[1], rows * columns)


def other_modes(layer: Layer, mode: Mode, batch_size: int, protected_only: bool) -> dict[int, int]:
    """The modes beside the protected one of which there are moments, with their sizes."""
    sizes, protected = mode_sizes(layer, mode, batch_size), protected_mode(layer)
    return {
        index: size
        for index, size in enumerate(sizes)
        if index != protected and not protected_only and (index == 0 or size <= MOST_POSITIONS)
    }


def kept_bytes(layer: Layer, mode: Mode, batch_size: int, protected_only: bool) -> int:
    """What `LayerMoments` keeps: the moments, float64."""
    groups, dimension = protected_shape(layer, mode)
    others = other_modes(layer, mode, batch_size, protected_only).values()
    return 8 * (groups * dimension**2 + sum(size**2 for size in others))


def work_bytes(layer: Layer, mode: Mode, batch_size: int, protected_only: bool) -> int:
    """What `LayerMoments.add` takes beside batch and moments: the batch with its padding, and chunks."""
    groups, dimension = protected_shape(layer, mode)
    others, most = other_modes(layer, mode, batch_size, protected_only), CHUNK_VALUES
    if 0 in others:
        most = max(most, batch_size * groups * dimension)  # all samples at one place
    if len(others) > 1:
        sizes = mode_sizes(layer, mode, batch_size)
        most = max(most, math.prod(sizes[1:]))  # all places of one sample and group
    shape = [*layer.input_shape]
    if mode == "patch" and not layer.is_linear:
        top, left, bottom, right = layer.padding
        shape[1:] = [shape[1] + top + bottom, shape[2] + left + right]
    return 4 * batch_size * math.prod(shape) + 8 * CHUNK_COPIES * most


class LayerMoments:
    """The running second moments of one layer's input."""

    def __init__(
        self,
        layer: Layer,
        mode: Mode,
        batch_size: int,
        memory: LayerMemory | None = None,
        protected_only: bool = False,
    ) -> None:
        """Start at zero.

        Args:
            memory: what the modes beside the protected one are without; by default nothing.
            protected_only: leave the other modes out: a memory is made of the protected one alone.

        Raises:
            LanceError: for a grouped convolution in channel mode.
        """
        self._layer, self._mode, self._memory = layer, mode, memory
        self._places = _places_of(layer, mode)
        self._sizes = mode_sizes(layer, mode, batch_size)
        self._protected = protected_mode(layer)
        groups, dimension = protected_shape(layer, mode)
        self.batches = 0
        self._sums: Moments = {self._protected: np.zeros((groups, dimension, dimension))}
        for index, size in other_modes(layer, mode, batch_size, protected_only).items():
            self._sums[index] = np.zeros((size, size))

    def add(self, activation: Float) -> None:
        """Add one full batch, `[B, *layer.input_shape]`.

        Raises:
            ValueError: for any other shape; nothing is added.
            NumericalError: if it is not finite.
        """
        expected = (self._sizes[0], *self._layer.input_shape)
        if activation.shape != expected:
            raise ValueError(f"moments: expected an activation of shape {expected}, found {activation.shape}")
        if not np.isfinite(activation).all():
            raise NumericalError(
                f"input of {self._layer.name}: expected finite values, found NaN or infinity; check the weights"
                " and the preprocessing"
            )
        view = self._places(self._layer, activation)  # [B, g, C/g, k_h, k_w, H', W']
        for chunk in _chunks(view, (0, 5, 6)):
            self._add_protected(chunk)
        for groups in _group_slices(view) if self._sums.keys() & self._space(1, 1).keys() else ():
            for chunk in _chunks(view[:, groups], (0,)):
                self._add_places(chunk, groups)
        for chunk in _chunks(view, (5, 6)) if 0 in self._sums else ():
            self._add_batch_mode(chunk)
        self.batches += 1

    def moments(self) -> Moments:
        """The means over the batches, by mode.  The sums become them, so this is the end of a measurement.

        Raises:
            ValueError: before the first batch, or a second time.
        """
        if not self.batches:
            raise ValueError("moments: no batch was added; add at least one before reading them")
        for moment in self._sums.values():
            moment /= self.batches
            for one in moment.reshape(-1, *moment.shape[-2:]):
                _make_symmetric(one)
        found, self._sums, self.batches = self._sums, {}, 0
        return found

    def _add_protected(self, chunk: Double) -> None:
        """The protected mode, of a few samples and positions: `[n, g, C/g, k_h, k_w, h, w]`."""
        values = _columns(chunk)  # [g, D, n S]
        for total, one in zip(self._sums[self._protected], values, strict=True):
            for rows in _row_slices(total):
                total[rows] += one[rows] @ one.T

    def _add_places(self, chunk: Double, groups: slice) -> None:
        """The modes of space, of all places of a few samples and groups: `[n, g, C/g, k_h, k_w, H', W']`."""
        rows, columns = chunk.shape[-2:]
        left = self._outside(_columns(chunk), groups).reshape(-1, rows, columns)  # [g D n, H', W']
        for mode, axes in self._space(rows, columns).items():
            if mode in self._sums:
                _add_unfolded(self._sums[mode], left.reshape(-1, *axes))

    def _space(self, rows: int, columns: int) -> dict[int, tuple[int, int]]:
        """The modes of space, and the last two axes of `[., n_mode, .]` that bring each into the middle."""
        if self._layer.is_linear:
            return {1: (rows, 1)} if len(self._layer.input_shape) == 2 else {}
        if self._mode == "patch":
            return {2: (rows * columns, 1)}
        return {2: (rows, columns), 3: (columns, 1)}

    def _add_batch_mode(self, chunk: Double) -> None:
        """The batch mode, of all samples at a few places."""
        samples = len(chunk)
        left = self._outside(_columns(chunk), slice(None))  # [g, D, B s]
        unfolded = left.reshape(*left.shape[:2], samples, -1).transpose(2, 0, 1, 3).reshape(samples, -1)
        self._sums[0] += unfolded @ unfolded.T

    def _outside(self, values: Double, groups: slice) -> Double:
        """`X - M M^T X` of some groups, `[g, D, .]`, in the place of X."""
        if self._memory is not None:
            for one, bases in zip(values, self._memory.bases[groups], strict=True):
                for columns in _row_slices(bases.T):
                    some = bases[:, columns].astype(np.float64)
                    one -= some @ (some.T @ one)
        return values


def _columns(chunk: Double) -> Double:
    """`[n, g, C/g, k_h, k_w, H', W'] -> [g, D, n S]`."""
    samples, groups, channels, height, width, rows, columns = chunk.shape
    moved = chunk.transpose(1, 2, 3, 4, 0, 5, 6)
    return moved.reshape(groups, channels * height * width, samples * rows * columns)


def _chunks(view: Float, axes: Sequence[int]) -> Iterator[Double]:
    """At most `CHUNK_VALUES` values at a time, cut along the first axis; where a step is too much, the next."""
    axis, *further = axes
    step = max(1, CHUNK_VALUES * view.shape[axis] // view.size)
    for start in range(0, view.shape[axis], step):
        part = view[(*[slice(None)] * axis, slice(start, start + step))]
        if further and part.size > CHUNK_VALUES:
            yield from _chunks(part, further)
        else:
            yield part.astype(np.float64)


def _group_slices(view: Float) -> Iterator[slice]:
    """As many groups as have `CHUNK_VALUES` values in one sample, or one."""
    samples, groups = view.shape[:2]
    step = max(1, CHUNK_VALUES * samples * groups // view.size)
    return (slice(start, start + step) for start in range(0, groups, step))


def _row_slices(matrix: NDArray[np.floating]) -> Iterator[slice]:
    """Rows of a matrix, at most `CHUNK_VALUES` values of them, or one."""
    step = max(1, CHUNK_VALUES // max(1, matrix.shape[1]))
    return (slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step))


def _add_unfolded(total: Double, unfolded: Double) -> None:
    """Add `sum_a X_a X_a^T` of `[a, n, b]`, a few rows of `[n, n]` at a time."""
    matrix = unfolded.transpose(1, 0, 2).reshape(len(total), -1)  # [n, a b]
    for rows in _row_slices(total):
        total[rows] += matrix[rows] @ matrix.T


def _make_symmetric(matrix: Double) -> None:
    """`(C + C^T) / 2` to the last bit, in place, a few rows at a time."""
    for rows in _row_slices(matrix):
        upper = matrix[rows, rows.start :]
        upper += matrix[rows.start :, rows].T
        upper /= 2
        matrix[rows.start :, rows] = upper.T


# --- views --------------------------------------------------------------------------------------------


def _places_of(layer: Layer, mode: Mode) -> Callable[[Layer, Float], Float]:
    if layer.is_linear:
        return _tokens
    return patches if mode == "patch" else _positions


def _tokens(layer: Layer, activation: Float) -> Float:
    """`[B, T, F]` or `[B, F]` as `[B, 1, F, 1, 1, T, 1]`."""
    features = layer.weight_shape[1]
    apart = activation.reshape(len(activation), -1, features).transpose(0, 2, 1)  # [B, F, T]
    return apart[:, None, :, None, None, :, None]


def _positions(layer: Layer, activation: Float) -> Float:
    """`[B, C, H, W]` as `[B, 1, C, 1, 1, H, W]`."""
    return activation[:, None, :, None, None]


def patches(layer: Layer, activation: Float) -> Float:
    """What each filter reads at each output position, a view: `[B, g, C/g, k_h, k_w, H', W']`."""
    top, left, bottom, right = layer.padding
    padded = np.pad(activation, ((0, 0), (0, 0), (top, bottom), (left, right)))
    samples, channels, height, width = padded.strides
    shape = (len(padded), layer.groups, padded.shape[1] // layer.groups)
    steps = (samples, channels * shape[2], channels)
    taps = (height * layer.dilation[0], width * layer.dilation[1])
    places = (height * layer.stride[0], width * layer.stride[1])
    return _strided(
        padded, (*shape, *layer.weight_shape[2:], *layer.output_shape[1:]), (*steps, *taps, *places)
    )


def _strided(array: Float, shape: Sequence[int], strides: Sequence[int]) -> Float:
    return as_strided(array, shape, strides, writeable=False)
