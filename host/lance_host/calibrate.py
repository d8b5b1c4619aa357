"""Phase I, the runs: which images to calibrate on, and the spectra of the trainable layers' inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lance_edge.calibration_order import calibration_batches as calibration_batches
from lance_edge.errors import DataError, ModelError, NumericalError
from lance_edge.manifest import Layer, Mode
from lance_edge.memory import LayerMemory
from lance_edge.moments import LayerMoments, Moments
from lance_edge.names import IMAGES
from lance_host.hosvd import ModeCovariances, Spectrum
from lance_host.runtime import open_session

DEFAULT_BATCH_SIZE = 128  # the published recipe's
CHUNK_IMAGES = 32  # images per run of the network: bounds the memory of its intermediate tensors


def choose_batch_size(train_images: int, requested: int | None) -> int:
    """The training batch size B: `requested`, else 128, else what a small data set can fill twice.

    Without a request B is the largest power of two, at most 128, that gives at least two full batches.

    Raises:
        DataError: for fewer than two training images, or a request that they cannot fill once.
    """
    if train_images < 2:
        raise DataError(f"training images: expected at least 2, found {train_images}; add images to the data")
    if requested is None:
        return int(min(DEFAULT_BATCH_SIZE, 1 << ((train_images // 2).bit_length() - 1)))
    if requested < 1:
        raise DataError(f"batch size: expected at least 1, found {requested}; ask for {DEFAULT_BATCH_SIZE}")
    if requested > train_images:
        raise DataError(
            f"batch size: expected at most the {train_images} training images, found {requested};"
            f" ask for {choose_batch_size(train_images, None)} or add images"
        )
    return requested


def layer_spectra(
    model: bytes,
    taps: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    batches: Iterable[NDArray[np.float32]],
    batch_size: int,
    threads: int,
    progress: Callable[[int], None],
) -> dict[str, tuple[Spectrum, ...]]:
    """The spectra of every trainable layer's input, all modes, batch first.

    Memory follows the batch size (one batch of every tapped tensor), never the number of batches.

    Args:
        model: a serialised ONNX model from `images` `[N, 3, R, R]` to at least the tapped tensors.
        taps: layer name -> the model's output that is the layer's input; layers may share one.
        shapes: layer name -> shape of that input without the batch, `[C, H, W]`.
        batches: preprocessed images, float32 `[B, 3, R, R]` each.
        batch_size: B.
        threads: of the runtime.
        progress: called after each batch with the number of batches done so far.

    Raises:
        ModelError: if the model has no such output, or it has another shape.
        DataError: if there is no batch, or one has another size than B.
        NumericalError: if a layer's input is not finite.
    """
    # Keyed by tensor: what several layers share is computed once.
    covariances = {tensor: ModeCovariances((batch_size, *shapes[layer])) for layer, tensor in taps.items()}
    sinks = {tensor: [one] for tensor, one in covariances.items()}
    run_taps(TapRunner(model, taps, shapes, batch_size, threads, sinks), batches, progress)
    done = {tensor: covariance.spectra() for tensor, covariance in covariances.items()}
    return {layer: done[tensor] for layer, tensor in taps.items()}


def layer_moments(
    model: bytes,
    taps: Mapping[str, str],
    layers: Sequence[Layer],
    mode: Mode,
    memory: Mapping[str, LayerMemory],
    batches: Iterable[NDArray[np.float32]],
    batch_size: int,
    threads: int,
    progress: Callable[[int], None],
) -> dict[str, Moments]:
    """The second moments of every layer's input by mode, for patch mode and for continual learning.

    Args:
        memory: by layer, what the modes beside the protected one are without; may be empty.

    Raises:
        ModelError, DataError, NumericalError: as `layer_spectra`.
    """
    found = {one.name: LayerMoments(one, mode, batch_size, memory.get(one.name)) for one in layers}
    sinks: dict[str, list[Sink]] = {tensor: [] for tensor in taps.values()}
    for name, moments in found.items():
        sinks[taps[name]].append(moments)
    shapes = {layer.name: layer.input_shape for layer in layers}
    run_taps(TapRunner(model, taps, shapes, batch_size, threads, sinks), batches, progress)
    return {name: moments.moments() for name, moments in found.items()}


def run_taps(
    runner: "TapRunner", batches: Iterable[NDArray[np.float32]], progress: Callable[[int], None]
) -> None:
    """All batches through the network.

    Raises:
        DataError: if there is none.
    """
    number = 0
    for number, images in enumerate(batches, start=1):
        runner.add(images, number)
        progress(number)
    if not number:
        raise DataError("calibration: expected at least one full batch of images, found none; add images")


class Sink(Protocol):
    """What takes whole batches of a layer's input."""

    def add(self, activation: NDArray[np.float32], /) -> None:
        """Take one, `[B, ...]`; the array is written to again afterwards."""


class TapRunner:
    """One pass over the batches: a session, and a buffer for each tapped tensor."""

    def __init__(
        self,
        model: bytes,
        taps: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        batch_size: int,
        threads: int,
        sinks: Mapping[str, Sequence[Sink]],
    ) -> None:
        self.batch_size, self.sinks = batch_size, sinks
        self.session = open_session(model, threads)
        _require_outputs(self.session, taps)
        self.layers = {tensor: layer for layer, tensor in taps.items()}
        sizes = {tensor: (batch_size, *shapes[layer]) for tensor, layer in self.layers.items()}
        self.buffers = {tensor: np.empty(size, np.float32) for tensor, size in sizes.items()}

    def add(self, images: NDArray[np.float32], number: int) -> None:
        """Run a batch `[B, 3, R, R]`, its number from 1, and hand the tapped tensors on.

        Raises:
            ModelError, DataError, NumericalError: see `layer_spectra`.
        """
        if len(images) != self.batch_size:
            raise DataError(
                f"calibration batch {number}: expected {self.batch_size} images, found {len(images)};"
                " the batch mode needs full batches"
            )
        for start in range(0, len(images), CHUNK_IMAGES):
            self._run_chunk(images, start)
        for tensor, buffer in self.buffers.items():
            if not np.isfinite(buffer).all():
                raise NumericalError(
                    f"calibration batch {number}, input of {self.layers[tensor]}: expected finite values, found"
                    " NaN or infinity; check the weights and the preprocessing"
                )
            for sink in self.sinks[tensor]:
                sink.add(buffer)

    def _run_chunk(self, images: NDArray[np.float32], start: int) -> None:
        """Run one chunk and put the tapped tensors into their rows of the batch."""
        chunk = images[start : start + CHUNK_IMAGES]
        names = list(self.buffers)
        for tensor, part in zip(names, self.session.run(names, {IMAGES: chunk}), strict=True):
            rows = self.buffers[tensor][start : start + len(chunk)]  # [n, C, H, W]
            if part.shape != rows.shape:
                raise ModelError(
                    f"input of {self.layers[tensor]}: expected shape {rows.shape[1:]} per image, found"
                    f" {part.shape[1:]}; the network was exported at another resolution than its layers say"
                )
            rows[...] = part


def _require_outputs(session: Any, taps: Mapping[str, str]) -> None:
    present = {output.name for output in session.get_outputs()}
    for layer, tensor in taps.items():
        if tensor not in present:
            raise ModelError(
                f"input of {layer}: expected the calibration model to have the output {tensor!r}, found"
                f" {', '.join(sorted(present))}; export the model with the layer's input as an output"
            )
