"""Convolutions as the manifest describes them, without a network around them."""

import torch

from lance_edge.manifest import Layer


def conv_layer(
    channels: int,
    size: tuple[int, int],
    out: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    name: str = "conv",
) -> Layer:
    """A layer with the output shape that PyTorch gives it."""
    conv = torch.nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups)
    with torch.no_grad():
        output = conv(torch.zeros(1, channels, *size))
    return Layer(
        name=name,
        weight=f"{name}.weight",
        weight_shape=tuple(conv.weight.shape),
        input_shape=(channels, *size),
        output_shape=tuple(output.shape[1:]),
        stride=(stride, stride),
        padding=(padding,) * 4,
        dilation=(dilation, dilation),
        groups=groups,
    )


def linear_layer(input_shape: tuple[int, ...], out_features: int) -> Layer:
    """A linear layer of `[T, F]` or `[F]`."""
    *tokens, features = input_shape
    return Layer(
        name="linear",
        weight="linear.weight",
        weight_shape=(out_features, features),
        input_shape=input_shape,
        output_shape=(*tokens, out_features),
        stride=(),
        padding=(),
        dilation=(),
        groups=1,
    )
