"""LANCE written out literally in PyTorch: every activation projected and rebuilt, then the layer's gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from graph_runner import Array, project_and_rebuild
from torch import nn
from torch.func import functional_call

from lance_edge.manifest import Layer


def layer_gradients(
    layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Of input and weight, by autograd through the module itself."""
    with torch.enable_grad():
        x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
        return torch.autograd.grad(functional_call(layer, {"weight": weight}, (x,)), [x, weight], dy)


class Compressed(torch.autograd.Function):
    """Exact forward and input gradient; the weight gradient of the projected and rebuilt input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        layer: nn.Module,
        name: str,
        projections: Mapping[str, Array],
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.name, ctx.projections = layer, name, projections
        return functional_call(layer, {"weight": weight}, (x,))

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (dy,), (x, weight), layer = outputs, ctx.saved_tensors, ctx.layer
        dx, _ = layer_gradients(layer, x, weight, dy)
        apart = x
        if isinstance(layer, nn.Linear):  # samples, tokens (of all windows, or positions), features
            apart = x.reshape(-1, *(len(ctx.projections[f"{ctx.name}/U{mode}"]) for mode in _inner(ctx)))
        rebuilt = project_and_rebuild(apart, ctx.projections, ctx.name).reshape(x.shape)
        _, dw = layer_gradients(layer, rebuilt, weight, dy)
        return dx, dw, None, None, None


def _inner(ctx: Any) -> Sequence[int]:
    """The modes but the batch."""
    return [mode for mode in range(1, 4) if f"{ctx.name}/U{mode}" in ctx.projections]


class CompressedLayer(nn.Module):
    def __init__(self, layer: nn.Conv2d | nn.Linear, name: str, projections: Mapping[str, Array]) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        layer.bias = None
        self.layer, self.name, self.projections = layer, name, projections

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Compressed.apply(x, self.weight, self.layer, self.name, self.projections)
        if self.bias is None:
            return result
        return result + (self.bias if isinstance(self.layer, nn.Linear) else self.bias[:, None, None])


def compress_layers(network: nn.Module, layers: Sequence[str], projections: Mapping[str, Array]) -> None:
    """Put the literal method in place of the named layers."""
    for name in layers:
        parent, _, child = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        setattr(network.get_submodule(parent), child, CompressedLayer(layer, name, projections))


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
