"""Second moments of a layer's input in every mode, streamed over full batches.

The input of a layer is one tensor `[B, g, D, S]`: B samples, g groups, the D values that one filter reads, and
S places where it reads them.  In patch mode D = C/g k_h k_w and the places are output positions; in channel
mode D = C and they are input positions, with height and width as modes of their own; of a linear layer D are
its features and the places are tokens.  Patches are views: only a few samples, or a few rows of positions, are
ever copied.

The moment of the protected mode (inputs, channels, features) is of the input as it is.  Those of the other
modes are of what a memory leaves of it, `X - M M^T X`: the next task's projections keep nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from lance_edge.errors import ArtifactError, LanceError, NumericalError
from lance_edge.manifest import Layer, Mode
from lance_edge.memory import LayerMemory, Memory

# Positions beyond this number stay whole: their moment alone would take 32 MiB, their basis as much.
MOST_POSITIONS = 2048
CHUNK_VALUES = 1 << 20  # float64 values of patches that exist at a time (8 MiB)

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
        for index, size in enumerate(self._sizes):
            is_wanted = index != self._protected and not protected_only
            if is_wanted and (index == 0 or size <= MOST_POSITIONS):
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
        for chunk in _chunks(view, axis=0):
            self._add_samples(chunk)
        for chunk in _chunks(view, axis=5) if 0 in self._sums else ():
            self._add_batch_mode(chunk)
        self.batches += 1

    def moments(self) -> Moments:
        """The means over the batches so far, by mode.

        Raises:
            ValueError: before the first batch.
        """
        if not self.batches:
            raise ValueError("moments: no batch was added; add at least one before reading them")
        means = {mode: total / self.batches for mode, total in self._sums.items()}
        return {mode: (mean + np.swapaxes(mean, -1, -2)) / 2 for mode, mean in means.items()}  # to the last bit

    def _add_samples(self, chunk: Double) -> None:
        """The protected mode and the places, of a few samples in full: `[n, g, C/g, k_h, k_w, H', W']`."""
        rows, columns = chunk.shape[-2:]
        values = _columns(chunk)  # [g, D, n S]
        self._sums[self._protected] += values @ values.transpose(0, 2, 1)
        space = {mode: axes for mode, axes in self._space(rows, columns).items() if mode in self._sums}
        if not space:
            return
        left = self._outside(values).reshape(-1, rows, columns)  # [g D n, H', W']
        for mode, axes in space.items():
            unfolded = left.reshape(-1, *axes)
            self._sums[mode] += np.einsum("aib,ajb->ij", unfolded, unfolded, optimize=True)

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
        left = self._outside(_columns(chunk))  # [g, D, B s]
        unfolded = left.reshape(*left.shape[:2], samples, -1).transpose(2, 0, 1, 3).reshape(samples, -1)
        self._sums[0] += unfolded @ unfolded.T

    def _outside(self, values: Double) -> Double:
        """`X - M M^T X` of every group, `[g, D, .]`."""
        if self._memory is None or not max(self._memory.ranks):
            return values
        bases = self._memory.bases.astype(np.float64)  # [g, D, m]
        return values - bases @ (bases.transpose(0, 2, 1) @ values)


def _columns(chunk: Double) -> Double:
    """`[n, g, C/g, k_h, k_w, H', W'] -> [g, D, n S]`."""
    samples, groups, channels, height, width, rows, columns = chunk.shape
    moved = chunk.transpose(1, 2, 3, 4, 0, 5, 6)
    return moved.reshape(groups, channels * height * width, samples * rows * columns)


def _chunks(view: Float, axis: int) -> Iterator[Double]:
    step = max(1, CHUNK_VALUES * view.shape[axis] // view.size)
    for start in range(0, view.shape[axis], step):
        rows = [slice(None)] * axis + [slice(start, start + step)]
        yield view[tuple(rows)].astype(np.float64)


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
