"""Functions of each value by itself."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from lance_host.sources.onnx_ops.op import Op, Rule, Tensor, Tensors


def each(function: Callable[..., Tensor]) -> Rule:
    """A function of the operands alone."""
    return lambda op, x: function(*x)


def fold(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A function of two, over any number of operands."""

    def folded(op: Op, x: Tensors) -> Tensor:
        y = x[0]
        for operand in x[1:]:
            y = function(y, operand)
        return y

    return folded


def clip(op: Op, x: Tensors) -> Tensor:
    """Between operands that may be left out."""
    low, high = op.number(1), op.number(2)
    return torch.clamp(x[0], low, high) if (low, high) != (None, None) else x[0]


def gelu(op: Op, x: Tensors) -> Tensor:
    """Exact, or by tanh."""
    return F.gelu(x[0], approximate=op.get("approximate", "none"))


def hard_sigmoid(op: Op, x: Tensors) -> Tensor:
    """alpha x + beta between 0 and 1."""
    return torch.clamp(x[0] * op.get("alpha", 0.2) + op.get("beta", 0.5), 0.0, 1.0)


def prelu(op: Op, x: Tensors) -> Tensor:
    """The slope broadcasts as everywhere in ONNX."""
    return torch.where(x[0] < 0, x[0] * x[1], x[0])


# ONNX data type -> what it becomes; half and double are computed in float32.
TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float32, 11: torch.float32}


def cast(op: Op, x: Tensors) -> Tensor:
    """To a type that networks compute with."""
    kind = op.get("to", 1)
    if kind not in TYPES:
        raise op.refuse(f"to ONNX type {kind}, which no network here needs; remove it")
    return x[0].to(TYPES[kind])
