"""Nodes of an ONNX file that have weights, as PyTorch layers that bear their names."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import nn

from lance_host.sources.onnx_ops.op import Op
from lance_host.sources.onnx_ops.padding import explicit_pads, pad_widths


@dataclass(frozen=True)
class Weights:
    """The constant operands of a node, by position."""

    arrays: Mapping[int, NDArray[np.float32]]

    def __contains__(self, index: int) -> bool:
        return index in self.arrays

    def parameter(self, index: int) -> nn.Parameter:
        """A copy as a trainable tensor."""
        return nn.Parameter(torch.from_numpy(np.array(self.arrays[index], np.float32)))


class PaddedConv(nn.Module):
    """Uneven padding, then the convolution: it is `conv` that holds the weight."""

    def __init__(self, conv: nn.Module, pads: Sequence[int]) -> None:
        super().__init__()
        self.conv, self.widths = conv, pad_widths(pads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad and convolve."""
        result: torch.Tensor = self.conv(F.pad(x, self.widths))
        return result


def conv_layer(op: Op, weights: Weights, size: Sequence[int]) -> nn.Module | None:
    """Conv with a constant weight, 1-D or 2-D; `size` is that of the input, `[H, W]`."""
    rank = weights.arrays[1].ndim - 2
    if rank not in (1, 2) or (2 in op.present and 2 not in weights):
        return None
    out, per_group, *kernel = weights.arrays[1].shape
    groups = op.get("group", 1)
    stride, dilation = list(op.get("strides", [1] * rank)), list(op.get("dilations", [1] * rank))
    pads = explicit_pads(op, size, kernel, stride, dilation)
    is_even = pads[:rank] == pads[rank:]
    kind: Callable[..., nn.Module] = nn.Conv2d if rank == 2 else nn.Conv1d
    conv = kind(
        per_group * groups,
        out,
        kernel,
        stride,
        pads[:rank] if is_even else 0,
        dilation,
        groups,
        2 in op.present,
    )
    conv.weight = weights.parameter(1)
    if 2 in op.present:
        conv.bias = weights.parameter(2)
    return conv if is_even else PaddedConv(conv, pads)


def linear_layer(op: Op, weights: Weights, size: Sequence[int]) -> nn.Module | None:
    """Gemm or MatMul with a constant matrix, and with a constant bias if any."""
    if weights.arrays[1].ndim != 2 or op.get("transA", 0) or (2 in op.present and 2 not in weights):
        return None
    matrix = weights.arrays[1] * op.get("alpha", 1.0)
    matrix = matrix if op.get("transB", 0) else matrix.T  # [O, I], as PyTorch has it
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=2 in op.present)
    linear.weight = Weights({0: matrix}).parameter(0)
    if 2 in op.present:
        bias = np.broadcast_to(weights.arrays[2] * op.get("beta", 1.0), (1, matrix.shape[0])).ravel()
        linear.bias = Weights({0: bias}).parameter(0)
    return linear


def norm_layer(op: Op, weights: Weights, size: Sequence[int]) -> nn.Module | None:
    """BatchNormalization as it is in inference, with the file's statistics."""
    if not all(index in weights for index in (1, 2, 3, 4)):
        return None
    kinds: dict[int, Callable[..., nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
    if len(size) not in kinds:
        return None
    norm = kinds[len(size)](len(weights.arrays[1]), eps=op.get("epsilon", 1e-5))
    norm.weight, norm.bias = weights.parameter(1), weights.parameter(2)
    for name, index in (("running_mean", 3), ("running_var", 4)):
        norm.register_buffer(name, weights.parameter(index).data)
    return norm


Layer = Callable[[Op, Weights, Sequence[int]], nn.Module | None]

# Operator -> how a layer is made of it; `None` where this node is none, and `onnx_ops` computes it.
LAYERS: dict[str, Layer] = {
    "BatchNormalization": norm_layer,
    "Conv": conv_layer,
    "Gemm": linear_layer,
    "MatMul": linear_layer,
}


def fuse_biases(graph: ir.Graph) -> None:
    """MatMul by a matrix and Add of a vector become one MatMul of three operands, which only we understand."""
    for add in [node for node in graph if node.op_type == "Add"]:
        for index, value in enumerate(add.inputs):
            product = value.producer() if value is not None else None
            bias = add.inputs[1 - index]
            if (
                value is not None
                and product is not None
                and product.op_type == "MatMul"
                and len(product.inputs) == 2
                and len(list(value.uses())) == 1
                and _rank(product.inputs[1]) == 2
                and _rank(bias) == 1
            ):
                product.resize_inputs(3)
                product.replace_input_with(2, bias)
                ir.convenience.replace_all_uses_with(add.outputs[0], value, replace_graph_outputs=True)
                graph.remove(add, safe=True)
                break


def _rank(value: ir.Value | None) -> int | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else len(tensor.shape)


def module_path(node: ir.Node, number: int) -> tuple[str, ...]:
    """Where a layer stands in the module: after its weight in the file, else after its node."""
    weight = node.inputs[1].name if node.inputs[1] is not None else None
    if weight is not None and weight.endswith(".weight"):
        text = weight.removesuffix(".weight")
    else:
        words = (node.name or f"{node.op_type.lower()}_{number}").strip("/").split("/")
        text = _without_repeats(words[:-1] if len(words) > 1 and words[-1].startswith(node.op_type) else words)
    parts = [re.sub(r"\W", "_", part) for part in text.split(".") if part]
    reserved = nn.Module()
    return tuple(f"{part}_" if hasattr(reserved, part) else part for part in parts)


def _without_repeats(words: Sequence[str]) -> str:
    """`layers, layers.13, layers.13.0, act` (an exporter's scopes) to `layers.13.0.act`."""
    kept: list[str] = []
    for word in words:
        if kept and word.startswith(f"{kept[-1]}."):
            kept.pop()
        kept.append(word)
    return ".".join(kept)


def place(root: nn.Module, path: tuple[str, ...], layer: nn.Module) -> None:
    """Put a layer at its place, or beside it where the place is taken."""
    parent = root
    for part in path[:-1]:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    name, number = path[-1], 2
    while name in parent._modules:
        name, number = f"{path[-1]}_{number}", number + 1
    parent.add_module(name, layer)
