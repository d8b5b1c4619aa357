"""LANCE as one writes it in PyTorch: an autograd function that keeps the core of its input.

arXiv 2509.21617: the core is the input projected on the calibrated subspace of every mode, and the weight
gradient that of the input rebuilt from it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

from lance_edge.errors import ModelError

Projections = tuple[torch.Tensor | None, ...]  # by mode, `[n_mode, r_mode]`; `None`: the mode is kept whole
Geometry = tuple[Any, Any, Any, int]  # stride, padding, dilation, groups


def mode_product(x: torch.Tensor, matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """`x` with `matrix^T` applied to one mode: n_mode becomes the columns of `matrix` `[n_mode, r]`."""
    product: torch.Tensor = torch.tensordot(x, matrix, dims=([mode], [0]))  # the new mode comes last
    return product.movedim(-1, mode)


class LanceFunction(torch.autograd.Function):
    """A convolution whose weight gradient is taken from the core of its input."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, projections: Projections
    ) -> torch.Tensor:
        """`[N, C, H, W] -> [N, O, H', W']`; keeps the core `[r0, r1, r2, r3]`, not the input."""
        core = x
        for mode in _shrinking_most_first(projections):
            core = mode_product(core, _known(projections[mode]), mode)
        ctx.save_for_backward(core, weight)
        ctx.geometry, ctx.projections, ctx.input_shape = geometry, projections, x.shape
        return nn.functional.conv2d(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        """Exact with respect to the input; for the weight with the r0 components as samples."""
        (dy,) = gradients
        core, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(ctx.input_shape, weight, dy, *ctx.geometry)  # type: ignore[no-untyped-call]
        rebuilt, rows = core, ctx.projections[0]
        for mode in (1, 2, 3):
            rebuilt = mode_product(rebuilt, ctx.projections[mode].T, mode)  # [r0, C, H, W] at the end
        components = dy if rows is None else mode_product(dy, rows, 0)  # [r0, O, H', W']
        dw = conv2d_weight(rebuilt, weight.shape, components, *ctx.geometry)  # type: ignore[no-untyped-call]
        return dx, dw, None, None


def _shrinking_most_first(projections: Projections) -> list[int]:
    known = [
        (matrix.shape[1] / matrix.shape[0], mode)
        for mode, matrix in enumerate(projections)
        if matrix is not None
    ]
    return [mode for _, mode in sorted(known)]


def _known(matrix: torch.Tensor | None) -> torch.Tensor:
    assert matrix is not None
    return matrix


class LanceConv(nn.Module):
    """Stands for a convolution without bias."""

    def __init__(self, conv: nn.Conv2d, projections: Projections) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry: Geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.projections = projections

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = LanceFunction.apply(x, self.weight, self.geometry, self.projections)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.reshape(-1, 1, 1)


def use_lance(network: nn.Module, projections: Mapping[str, Projections]) -> None:
    """Replace the convolutions that `projections` names, in place.

    Raises:
        ModelError: if one is no plain convolution.
    """
    for name, matrices in projections.items():
        conv = network.get_submodule(name)
        if not isinstance(conv, nn.Conv2d) or type(conv) is not nn.Conv2d:  # a subclass may pad in its own way
            raise ModelError(
                f"{name}: expected an nn.Conv2d, found a {type(conv).__name__}, which the PyTorch"
                " LANCE of the benchmark does not know; compare another --model"
            )
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, LanceConv(conv, matrices))
