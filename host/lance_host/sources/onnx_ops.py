"""What ONNX operators compute, in PyTorch: the table with which an ONNX file becomes a module.

An entry is given the operator (`Op`: attributes, constant operands, the shape of its result) and its tensors.
Layers with weights (Conv, Gemm, MatMul, BatchNormalization) are modules of their own: see `onnx_file.py`.
Meanings are those of the ONNX operator texts at opset 18.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from lance_edge.errors import ModelError

Tensor = torch.Tensor
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Op:
    """One node: its known operands by position, and the positions of all that are not left out.

    `dims` is the shape of its first result, `operand_dims` that of its first operand: `None` stands for the
    batch, and -1 for another dimension that grows with it.
    """

    name: str
    kind: str
    attributes: Mapping[str, Any]
    constants: Mapping[int, NDArray[Any]]
    present: frozenset[int]
    outputs: int
    dims: tuple[int | None, ...]
    operand_dims: tuple[int | None, ...]

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def number(self, index: int) -> float | None:
        """The number that an operand holds, `None` where it is left out."""
        if index not in self.present:
            return None
        return float(self.constants[index].item()) if index in self.constants else self._not_constant(index)

    def integers(self, index: int) -> list[int] | None:
        """The integers that an operand holds, `None` where it is left out."""
        if index not in self.present:
            return None
        return self.constants[index].ravel().tolist() if index in self.constants else self._not_constant(index)

    def _not_constant(self, index: int) -> Any:
        raise ModelError(
            f"node {self.name} ({self.kind}): expected operand {index} to be a constant, found a computed"
            " value; export the network again with a fixed input size"
        )


# --- elementwise ----------------------------------------------------------------------------------------


def _clip(op: Op, x: Tensors) -> Tensor:
    low, high = op.number(1), op.number(2)
    return torch.clamp(x[0], low, high) if (low, high) != (None, None) else x[0]


def _gelu(op: Op, x: Tensors) -> Tensor:
    return F.gelu(x[0], approximate=op.get("approximate", "none"))


def _hard_sigmoid(op: Op, x: Tensors) -> Tensor:
    return torch.clamp(x[0] * op.get("alpha", 0.2) + op.get("beta", 0.5), 0.0, 1.0)


def _prelu(op: Op, x: Tensors) -> Tensor:
    return torch.where(x[0] < 0, x[0] * x[1], x[0])


_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float32, 11: torch.float32}


def _cast(op: Op, x: Tensors) -> Tensor:
    kind = op.get("to", 1)
    if kind not in _TYPES:
        raise ModelError(f"node {op.name} (Cast): to ONNX type {kind}, which no network here needs; remove it")
    return x[0].to(_TYPES[kind])


# --- shape ----------------------------------------------------------------------------------------------


# The shape of their result says all that their other operands do.
SHAPED = frozenset({"Expand", "Reshape", "Resize"})


def _reshape(op: Op, x: Tensors) -> Tensor:
    if len(op.dims) == 2 and op.dims[0] is None and op.operand_dims[:1] == (None,):
        return x[0].flatten(1)  # without numbers: behind a head they are those of the old classes
    growing = sum(dim is None or dim < 0 for dim in op.dims)
    if growing > 1:
        raise ModelError(
            f"node {op.name} ({op.kind}): more than one dimension depends on the batch; reshape it once"
        )
    return x[0].reshape([-1 if dim is None else dim for dim in op.dims])


def _squeeze(op: Op, x: Tensors) -> Tensor:
    axes = op.integers(1)
    return _reshape(op, x) if axes is None else x[0].squeeze(tuple(axes))


def _unsqueeze(op: Op, x: Tensors) -> Tensor:
    y, axes = x[0], op.integers(1) or []
    rank = y.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        y = y.unsqueeze(axis)
    return y


def _expand(op: Op, x: Tensors) -> Tensor:
    return x[0].expand([x[-1].shape[0] if dim is None else dim for dim in op.dims])


def _transpose(op: Op, x: Tensors) -> Tensor:
    return x[0].permute(list(op.get("perm", reversed(range(x[0].ndim)))))


def _slice(op: Op, x: Tensors) -> Tensor:
    starts, ends = op.integers(1) or [], op.integers(2) or []
    axes = op.integers(3) or list(range(len(starts)))
    steps = op.integers(4) or [1] * len(starts)
    if min(steps) < 1:
        raise ModelError(
            f"node {op.name} (Slice): a step of {min(steps)} is not supported; flip by another operator"
        )
    y = x[0]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index = [slice(None)] * y.ndim
        index[axis] = slice(start, min(end, 2**31), step)
        y = y[tuple(index)]
    return y


def _split(op: Op, x: Tensors) -> tuple[Tensor, ...]:
    axis, sizes = op.get("axis", 0), op.integers(1)
    if sizes is not None:
        return torch.split(x[0], sizes, axis)
    return torch.split(x[0], -(-x[0].shape[axis] // op.outputs), axis)


def _gather(op: Op, x: Tensors) -> Tensor:
    axis, indices = op.get("axis", 0) % x[0].ndim, op.constants.get(1)
    if indices is None:
        raise ModelError(
            f"node {op.name} (Gather): computed indices are not supported; this is no image classifier"
        )
    if indices.ndim == 0:
        return x[0].select(axis, int(indices))
    flat = torch.index_select(x[0], axis, torch.from_numpy(indices.ravel() % x[0].shape[axis]))
    return flat.reshape(*x[0].shape[:axis], *indices.shape, *x[0].shape[axis:][1:])


def _pad(op: Op, x: Tensors) -> Tensor:
    pads, rank = op.integers(1) or [], x[0].ndim
    axes = op.integers(3)
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes or range(rank)):
        before[axis], after[axis] = pads[place], pads[place + len(pads) // 2]
    widths = [width for axis in reversed(range(rank)) for width in (before[axis], after[axis])]
    while widths and widths[-2:] == [0, 0]:
        widths = widths[:-2]  # PyTorch's other modes take the last dimensions only
    mode = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}[op.get("mode", "constant")]
    value = op.number(2) if mode == "constant" else None
    return F.pad(x[0], widths, mode, value if mode == "constant" else None)


def _resize(op: Op, x: Tensors) -> Tensor:
    mode, align = op.get("mode", "nearest"), op.get("coordinate_transformation_mode", "half_pixel")
    size = [dim for dim in op.dims[2:] if dim is not None]
    if mode == "nearest" and (align, op.get("nearest_mode", "round_prefer_floor")) == ("asymmetric", "floor"):
        return F.interpolate(x[0], size, mode="nearest")
    if mode == "linear" and align in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(x[0], size, mode="bilinear", align_corners=align == "align_corners")
    raise ModelError(f"node {op.name} (Resize): {mode} with {align} is not supported; use nearest or bilinear")


# --- reductions and pooling -------------------------------------------------------------------------------


def _axes(op: Op, x: Tensor) -> list[int]:
    axes = op.integers(1)
    return list(axes) if axes else list(range(x.ndim))


def _reduce(function: Callable[..., Tensor]) -> "Rule":
    return lambda op, x: function(x[0], dim=_axes(op, x[0]), keepdim=bool(op.get("keepdims", 1)))


def _pool(kind: str) -> "Rule":
    def pool(op: Op, x: Tensors) -> Tensor:
        kernel = list(op.get("kernel_shape", ()))
        stride, ceil = list(op.get("strides", [1] * len(kernel))), bool(op.get("ceil_mode", 0))
        pads = explicit_pads(op, x[0].shape[2:], kernel, stride, [1] * len(kernel))
        half = len(pads) // 2
        if pads[:half] != pads[half:]:
            fill = float("-inf") if kind == "max" else 0.0
            if kind == "average" and not op.get("count_include_pad", 0):
                raise ModelError(f"node {op.name} ({op.kind}): uneven padding that is not counted; pad evenly")
            x, pads = [F.pad(x[0], pad_widths(pads), value=fill)], [0] * len(pads)
        if kind == "max":
            dilation = list(op.get("dilations", [1] * len(kernel)))
            function = F.max_pool2d if len(kernel) == 2 else F.max_pool1d
            return function(x[0], kernel, stride, pads[:half], dilation, ceil)
        counted = bool(op.get("count_include_pad", 0))
        average = F.avg_pool2d if len(kernel) == 2 else F.avg_pool1d
        return average(x[0], kernel, stride, pads[:half], ceil, counted)

    return pool


def explicit_pads(
    op: Op, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The padding of a convolution or pool before and behind each dimension, `auto_pad` worked out."""
    mode, rank = op.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", ""):
        return list(op.get("pads", [0] * 2 * rank))
    before, behind = [], []
    for length, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max((-(-length // s) - 1) * s + d * (k - 1) + 1 - length, 0) if mode.startswith("SAME") else 0
        small, large = total // 2, total - total // 2
        before.append(small if mode != "SAME_LOWER" else large)
        behind.append(large if mode != "SAME_LOWER" else small)
    return before + behind


def pad_widths(pads: Sequence[int]) -> list[int]:
    """ONNX pads (all begins, all ends) as PyTorch wants them (last dimension first, begin and end)."""
    half = len(pads) // 2
    return [width for axis in reversed(range(half)) for width in (pads[axis], pads[axis + half])]


def _global_pool(function: Callable[..., Tensor]) -> "Rule":
    return lambda op, x: function(x[0], dim=list(range(2, x[0].ndim)), keepdim=True)


# --- norms and products -------------------------------------------------------------------------------------


def _layer_norm(op: Op, x: Tensors) -> Tensor:
    axis = op.get("axis", -1) % x[0].ndim
    return F.layer_norm(x[0], x[0].shape[axis:], x[1], x[2] if len(x) > 2 else None, op.get("epsilon", 1e-5))


def _instance_norm(op: Op, x: Tensors) -> Tensor:
    return F.instance_norm(x[0], weight=x[1], bias=x[2], eps=op.get("epsilon", 1e-5))


def _gemm(op: Op, x: Tensors) -> Tensor:
    a = x[0].transpose(0, 1) if op.get("transA", 0) else x[0]
    b = x[1].transpose(0, 1) if op.get("transB", 0) else x[1]
    y = a @ b * float(op.get("alpha", 1.0))
    return y + x[2] * float(op.get("beta", 1.0)) if len(x) > 2 else y


def _flat_softmax(function: Callable[..., Tensor]) -> "Rule":
    return lambda op, x: function(x[0], dim=op.get("axis", -1))


Rule = Callable[[Op, Tensors], Tensor | tuple[Tensor, ...]]


def _each(function: Callable[..., Tensor]) -> Rule:
    return lambda op, x: function(*x)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def fold(op: Op, x: Tensors) -> Tensor:
        y = x[0]
        for operand in x[1:]:
            y = function(y, operand)
        return y

    return fold


OPS: dict[str, Rule] = {
    "Abs": _each(torch.abs),
    "Add": _each(torch.add),
    "AveragePool": _pool("average"),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda op, x: torch.cat(list(x), dim=op.get("axis", 0)),
    "Div": _each(torch.div),
    "Dropout": lambda op, x: x[0],
    "Elu": lambda op, x: F.elu(x[0], op.get("alpha", 1.0)),
    "Equal": _each(torch.eq),
    "Erf": _each(torch.erf),
    "Exp": _each(torch.exp),
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(torch.mean),
    "GlobalMaxPool": _global_pool(torch.amax),
    "Greater": _each(torch.gt),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _each(F.hardswish),
    "Identity": lambda op, x: x[0],
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda op, x: F.leaky_relu(x[0], op.get("alpha", 0.01)),
    "Less": _each(torch.lt),
    "Log": _each(torch.log),
    "LogSoftmax": _flat_softmax(F.log_softmax),
    "MatMul": _each(torch.matmul),
    "Max": _fold(torch.maximum),
    "MaxPool": _pool("max"),
    "Min": _fold(torch.minimum),
    "Mish": _each(F.mish),
    "Mul": _each(torch.mul),
    "Neg": _each(torch.neg),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _each(torch.pow),
    "Reciprocal": _each(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _each(F.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _each(F.selu),
    "Sigmoid": _each(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _flat_softmax(F.softmax),
    "Softplus": _each(F.softplus),
    "Split": _split,
    "Sqrt": _each(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _each(torch.sub),
    "Sum": _fold(torch.add),
    "Tanh": _each(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _each(torch.where),
}
