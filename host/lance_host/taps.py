"""What PyTorch knows of a trainable layer: its input, the gradient of its output, its weight gradient."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.grad import conv2d_weight

from lance_edge.errors import ModelError
from lance_edge.manifest import Layer

CHUNK_IMAGES = 16  # of a batch in PyTorch at a time: bounds the memory of its intermediate tensors


def batch_tensors(
    network: torch.nn.Module,
    layers: Sequence[Layer],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input `[B, *input_shape]` and output gradient `[B, *output_shape]` of each layer, for the mean loss.

    The batch passes in chunks: with frozen batch-norm its images do not see each other.

    Args:
        network: in evaluation mode; left as it is.
        images: float32 `[B, 3, R, R]`.
    """
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {layer.name: [] for layer in layers}
    with only_trainable(network, [layer.weight for layer in layers]):
        for start in range(0, len(images), CHUNK_IMAGES):
            rows = slice(start, start + CHUNK_IMAGES)
            chunk = _chunk_tensors(network, layers, images[rows], labels[rows], len(images))
            for name, tensors in chunk.items():
                parts[name].append(tensors)
    return {
        name: (torch.cat([x for x, _ in tensors]), torch.cat([dy for _, dy in tensors]))
        for name, tensors in parts.items()
    }


def _chunk_tensors(
    network: torch.nn.Module,
    layers: Sequence[Layer],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    batch_size: int,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    with module_taps(network, [layer.name for layer in layers]) as taps, torch.enable_grad():
        logits = network(torch.from_numpy(images))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
        gradients = loss_gradients(loss / batch_size, {layer.name: taps[layer.name][1] for layer in layers})
    return {
        layer.name: as_described(layer, taps[layer.name][0], gradient)
        for layer, gradient in zip(layers, gradients, strict=True)
    }


def loss_gradients(loss: torch.Tensor, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of a loss with respect to each value, of its shape.

    Raises:
        ModelError: naming the first value that PyTorch itself has no gradient of.
    """
    cut = [name for name, value in values.items() if not value.requires_grad]
    if not cut:
        found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
        cut = [name for name, gradient in zip(values, found, strict=True) if gradient is None]
    if cut:
        raise ModelError(
            f"{cut[0]}: PyTorch has no gradient of it: forward detaches it, or computes it under"
            " torch.no_grad; leave it out of --layers, or change forward"
        )
    return list(found)


def as_described(layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output gradient as they came to the module, in the shapes that the manifest says."""
    return x.reshape(-1, *layer.input_shape), dy.reshape(-1, *layer.output_shape)


@contextmanager
def only_trainable(network: torch.nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Only these parameters ask for a gradient, so that autograd keeps nothing for the others."""
    parameters = dict(network.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])


@contextmanager
def module_taps(
    network: torch.nn.Module, names: Sequence[str]
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Record (input, output) of modules while the network runs."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    modules: Mapping[str, torch.nn.Module] = dict(network.named_modules())

    def keep(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            found[name] = (inputs[0].detach().clone(), output)
            return output.clone()  # what comes next may work in place

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def rebuilt_patches(
    layer: Layer, x: torch.Tensor, bases: Mapping[int, NDArray[np.floating[Any]]]
) -> torch.Tensor:
    """Patch mode, literally: the patches of a convolution, `[B, g, D, L]`, projected on each basis and back.

    Args:
        x: `[B, C, H, W]`.
        bases: U0 (its first B rows), U1 `[D, r1]` or `[g, D, r1]`, and U2; a mode without one stays whole.
    """
    kernel, groups = layer.weight_shape[2:], layer.groups
    columns = torch.nn.functional.unfold(_padded(layer, x), kernel, layer.dilation, 0, layer.stride)
    patches = columns.reshape(len(x), groups, -1, columns.shape[-1])
    tensors = {mode: torch.from_numpy(array) for mode, array in bases.items()}
    inputs = tensors[1].expand(groups, *tensors[1].shape[-2:])
    patches = inputs @ (inputs.transpose(1, 2) @ patches)
    if 2 in tensors:
        patches = patches @ tensors[2] @ tensors[2].T
    if 0 in tensors:
        rows = tensors[0][: len(x)]
        patches = torch.tensordot(rows @ rows.T, patches, 1)
    return patches


def patch_weight_gradient(layer: Layer, patches: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """`dY P^T` of each group, `[O, C / groups, k, k]`."""
    outputs = dy.reshape(len(dy), layer.groups, -1, patches.shape[-1])  # [B, g, O/g, L]
    return torch.einsum("bgol,bgdl->god", outputs, patches).reshape(layer.weight_shape)


def patch_output(layer: Layer, weight: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """The convolution of these patches without its bias, `[B, O, H', W']`."""
    filters = weight.reshape(layer.groups, -1, patches.shape[2])  # [g, O/g, D]
    return (filters @ patches).reshape(-1, *layer.output_shape)


def _padded(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    top, left, bottom, right = layer.padding
    return torch.nn.functional.pad(x, (left, right, top, bottom))


def weight_gradient(layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of the layer's weight, `[O, C / groups, k, k]` or `[O, F]`."""
    if layer.is_linear:
        return dy.flatten(0, -2).T @ x.flatten(0, -2)
    padded = _padded(layer, x)
    gradient: torch.Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        padded, list(layer.weight_shape), dy, layer.stride, 0, layer.dilation, layer.groups
    )
    return gradient
