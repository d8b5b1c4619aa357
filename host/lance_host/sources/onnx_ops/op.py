"""One node of a file, as the table's entries are given it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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

    def refuse(self, what: str) -> ModelError:
        """The error of an entry that does not cover this use of its operator."""
        return ModelError(f"node {self.name} ({self.kind}): {what}")

    def _not_constant(self, index: int) -> Any:
        raise self.refuse(
            f"expected operand {index} to be a constant, found a computed value; export the network again with"
            " a fixed input size"
        )


Rule = Callable[[Op, Tensors], Tensor | tuple[Tensor, ...]]
