"""Values by their position."""

import torch

from lance_host.sources.onnx_ops.op import Op, Tensor, Tensors


def gather(op: Op, x: Tensors) -> Tensor:
    """Constant positions of one axis."""
    axis, indices = op.get("axis", 0) % x[0].ndim, op.constants.get(1)
    if indices is None:
        raise op.refuse("computed indices are not supported; this is no image classifier")
    if indices.ndim == 0:
        return x[0].select(axis, int(indices))
    flat = torch.index_select(x[0], axis, torch.from_numpy(indices.ravel() % x[0].shape[axis]))
    return flat.reshape(*x[0].shape[:axis], *indices.shape, *x[0].shape[axis:][1:])


def gather_nd(op: Op, x: Tensors) -> Tensor:
    """Positions `[*batch, ..., k]` of the first k axes behind `batch_dims`."""
    batch, indices = op.get("batch_dims", 0), x[1].long()
    lead = [
        torch.arange(size).reshape([-1 if axis == place else 1 for axis in range(indices.ndim - 1)])
        for place, size in enumerate(indices.shape[:batch])
    ]
    return x[0][(*lead, *indices.unbind(-1))]


def scatter_nd(op: Op, x: Tensors) -> Tensor:
    """Updates at positions `[..., k]` of the first k axes: in place of what is there, or added to it."""
    reduction = op.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise op.refuse(f"reduction {reduction} is not supported; use none or add")
    return x[0].index_put(tuple(x[1].long().unbind(-1)), x[2], accumulate=reduction == "add")


def triangle(op: Op, x: Tensors) -> Tensor:
    """Trilu."""
    diagonal = int(op.number(1) or 0)
    return torch.triu(x[0], diagonal) if op.get("upper", 1) else torch.tril(x[0], diagonal)


def cumulative_sum(op: Op, x: Tensors) -> Tensor:
    """From either end, with or without the value itself."""
    axis, is_reverse = int(op.number(1) or 0), bool(op.get("reverse", 0))
    y = x[0].flip(axis) if is_reverse else x[0]
    y = y.cumsum(axis) - (y if op.get("exclusive", 0) else 0)
    return y.flip(axis) if is_reverse else y
