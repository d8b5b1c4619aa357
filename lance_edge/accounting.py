"""The paper's figures: activation bytes and multiply-adds of one trainable layer.

These are formulas, reported beside what the emitted graphs really save and compute.  Notation as in the
paper: B images, input `[C, H, W]`, output `[O, H', W']`, kernel k x k, ranks r0 (batch), r1 (channels),
r2 (height), r3 (width).  All activations are float32; one multiply-add counts as one.

A linear layer is counted as the 1x1 convolution that it is, with features for channels and tokens for space:
its modes are batch, tokens, features.

At r0 = B the batch mode is kept whole: its factor would be an orthogonal `[B, B]` that changes nothing, so
there is none, and no products with it.

Source: LANCE, arXiv 2509.21617; for grouped convolutions C / groups stands for C where the kernel is met.
"""

import math
from collections.abc import Sequence

from lance_edge.manifest import Layer

FLOAT32_BYTES = 4


def bp_activation_bytes(layer: Layer, batch_size: int) -> int:
    """Plain backpropagation keeps the layer's input: `B C H W` float32 values, in bytes."""
    return FLOAT32_BYTES * batch_size * math.prod(layer.input_shape)


def core_bytes(ranks: Sequence[int]) -> int:
    """The core `[r0, r1, ...]`, in bytes.

    Examples:
        >>> core_bytes((16, 4, 2, 2))  # 256 float32
        1024
    """
    return FLOAT32_BYTES * math.prod(ranks)


def factor_bytes(layer: Layer, batch_size: int, ranks: Sequence[int]) -> int:
    """The factors `U0 [B, r0]` (none at r0 = B), `U1 [n1, r1]`, ... of the other modes, in bytes."""
    sizes = (batch_size, *layer.input_shape)
    values = [size * rank for size, rank in zip(sizes, _one_per_mode(layer, ranks), strict=True)]
    return FLOAT32_BYTES * sum(values[1:] if is_batch_whole(batch_size, ranks) else values)


def is_batch_whole(batch_size: int, ranks: Sequence[int]) -> bool:
    """Whether the batch mode is kept whole, without a factor.

    Examples:
        >>> is_batch_whole(16, (16, 4, 2, 2)), is_batch_whole(16, (8, 4, 2, 2))
        (True, False)
    """
    return ranks[0] == batch_size


def factored_activation_bytes(layer: Layer, batch_size: int, ranks: Sequence[int]) -> int:
    """The paper's activation memory of LANCE, ASI and HOSVD, in bytes: core and factors.

    LANCE's factors are constant, so one could count its core alone; the published figures do not.  For
    the last 2 and 4 convolutions of MCUNet on CIFAR-10 (ε 0.7, batch 128) they are 0.04 and 0.09 MiB;
    50 calibration batches through the ImageNet weights give 0.026 and 0.109 MiB for core and factors,
    0.0006 and 0.039 MiB for the core alone.
    """
    return core_bytes(ranks) + factor_bytes(layer, batch_size, ranks)


def bp_forward_macs(layer: Layer, batch_size: int) -> int:
    """`B O H' W' (C/groups) k k` multiply-adds: the layer itself."""
    return batch_size * math.prod(layer.output_shape) * _patch(layer)


def lance_forward_macs(layer: Layer, batch_size: int, ranks: Sequence[int]) -> int:
    """The layer and `B C H W (r0 + r1 + r2 + r3)` multiply-adds for the projection to the core.

    C is the full number of channels in the second term: the whole input is projected, whatever the
    groups.  The paper counts every mode on the unprojected input, which no good order of them costs.
    """
    ranks = _one_per_mode(layer, ranks)
    projected = ranks[1:] if is_batch_whole(batch_size, ranks) else ranks
    return bp_forward_macs(layer, batch_size) + batch_size * math.prod(layer.input_shape) * sum(projected)


def asi_forward_macs(layer: Layer, batch_size: int, ranks: Sequence[int]) -> int:
    """As LANCE, and one step of subspace iteration `A_i (A_i^T U_i)` for each mode: `2 B C H W r_i`.

    Making the columns orthonormal again, `n_i r_i^2`, is small beside it and left out.
    """
    projection = lance_forward_macs(layer, batch_size, ranks) - bp_forward_macs(layer, batch_size)
    return lance_forward_macs(layer, batch_size, ranks) + 2 * projection


def hosvd_forward_macs(layer: Layer, batch_size: int, ranks: Sequence[int]) -> int:
    """As LANCE, and for each mode of size n its Gram matrix, `n B C H W`, and eigenvectors, some `n^3`."""
    sizes = (batch_size, *layer.input_shape)
    gram = sum(sizes) * math.prod(sizes)
    return lance_forward_macs(layer, batch_size, ranks) + gram + sum(size**3 for size in sizes)


def bp_weight_gradient_macs(layer: Layer, batch_size: int) -> int:
    """`B O H' W' (C/groups) k k` multiply-adds, as many as forward."""
    return bp_forward_macs(layer, batch_size)


def lance_weight_gradient_macs(layer: Layer, batch_size: int, ranks: Sequence[int]) -> int:
    """The weight gradient from the core, in multiply-adds.

    The terms, in this order: the output gradient projected on the batch mode, the core rebuilt over
    height, then over width, the weight gradient of r0 images with r1 channels, and those channels
    expanded to C / groups.
    """
    r0, *others = _one_per_mode(layer, ranks)
    channel = len(others) - 1 if layer.is_linear else 0  # where channels stand among the modes
    r1, sizes = others.pop(channel), list(layer.input_shape)
    sizes.pop(channel)
    out_channels = layer.weight_shape[0]
    on_batch = 0 if is_batch_whole(batch_size, ranks) else batch_size
    rebuilt = sum(math.prod(sizes[: i + 1]) * math.prod(others[i:]) for i in range(len(sizes)))
    return (
        r0 * math.prod(layer.output_shape) * on_batch
        + r0 * r1 * rebuilt
        + r0 * r1 * math.prod(layer.output_shape) * math.prod(layer.weight_shape[2:])
        + out_channels * _patch(layer) * r1
    )


def _patch(layer: Layer) -> int:
    """`(C/groups) k k`: the inputs that one output value sums over."""
    return math.prod(layer.weight_shape[1:])


def _one_per_mode(layer: Layer, ranks: Sequence[int]) -> Sequence[int]:
    if len(ranks) != len(layer.modes):
        raise ValueError(f"ranks: expected {len(layer.modes)} ({', '.join(layer.modes)}), found {tuple(ranks)}")
    return ranks
