"""LANCE written out literally in PyTorch: every activation projected and rebuilt, then convolved."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from graph_runner import Array, project_and_rebuild
from torch import nn
from torch.func import functional_call

from lance_edge.manifest import Layer


def convolution_gradients(
    conv: nn.Module, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Of input and weight, by autograd through the module itself."""
    with torch.enable_grad():
        x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
        return torch.autograd.grad(functional_call(conv, {"weight": weight}, (x,)), [x, weight], dy)


class CompressedConvolution(torch.autograd.Function):
    """Exact forward and input gradient; the weight gradient of the projected and rebuilt input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        conv: nn.Conv2d,
        name: str,
        projections: Mapping[str, Array],
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.conv, ctx.name, ctx.projections = conv, name, projections
        return functional_call(conv, {"weight": weight}, (x,))

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (dy,), (x, weight), conv = outputs, ctx.saved_tensors, ctx.conv
        dx, _ = convolution_gradients(conv, x, weight, dy)
        _, dw = convolution_gradients(conv, project_and_rebuild(x, ctx.projections, ctx.name), weight, dy)
        return dx, dw, None, None, None


class CompressedLayer(nn.Module):
    def __init__(self, conv: nn.Conv2d, name: str, projections: Mapping[str, Array]) -> None:
        super().__init__()
        self.conv, self.name, self.projections = conv, name, projections

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = CompressedConvolution.apply(
            x, self.conv.weight, self.conv, self.name, self.projections
        )
        return result


def compress_layers(network: nn.Module, layers: Sequence[str], projections: Mapping[str, Array]) -> None:
    """Put the literal method in place of the named convolutions."""
    for name in layers:
        parent, _, child = name.rpartition(".")
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        setattr(network.get_submodule(parent), child, CompressedLayer(conv, name, projections))


def ranks_of(
    layers: Sequence[Layer], batch: int, share: float, batch_share: float
) -> dict[str, tuple[int, ...]]:
    """Ranks that keep a share of each mode's dimension."""
    return {
        layer.name: (
            math.ceil(batch_share * batch),
            *(math.ceil(share * size) for size in layer.input_shape),
        )
        for layer in layers
    }
