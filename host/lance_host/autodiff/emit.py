"""Appending plain ONNX operators to a graph.

The rules write `emit("Mul", dy, 2.0)` and read like the formula they implement.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lance_edge.errors import ModelError

Attribute = int | float | str | Sequence[int]
Operand = ir.Value | float | None


class Emit:
    """A pen for one graph: every call appends a node and returns its output."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        """Write into `graph`; names of new values start with `prefix` and are unique."""
        self.graph = graph
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(self, op_type: str, *inputs: Operand, **attributes: Attribute) -> ir.Value:
        """Append a node of the standard domain with one output; a number among the inputs is a float32."""
        return self.several(op_type, 1, *inputs, **attributes)[0]

    def several(self, op_type: str, count: int, *inputs: Operand, **attributes: Attribute) -> list[ir.Value]:
        """Append a node with `count` outputs."""
        operands = [self.constant(value) if isinstance(value, float) else value for value in inputs]
        self._count += 1
        name = f"{self._prefix}{op_type}_{self._count}"
        names = [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
        node = ir.Node(
            "",
            op_type,
            operands,
            attributes=ir.convenience.convert_attributes(attributes),
            outputs=[ir.Value(name=output) for output in names],
            name=f"{name}/node",
        )
        self.graph.append(node)
        return list(node.outputs)

    def constant(self, value: NDArray[np.generic] | Sequence[int] | float) -> ir.Value:
        """An initializer: arrays as they are, numbers as float32, integer lists as int64."""
        array = np.asarray(value)
        if isinstance(value, float):
            array = array.astype(np.float32)
        elif not isinstance(value, np.ndarray):
            array = array.astype(np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:  # one of each, so that equal nodes have equal inputs
            self._count += 1
            name = f"{self._prefix}constant_{self._count}"
            self._constants[key] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            self.graph.register_initializer(self._constants[key])
        return self._constants[key]

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """ONNX Reshape: 0 keeps a dimension, -1 is inferred."""
        return self("Reshape", value, self.constant(shape))

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        """Permute the axes."""
        return self("Transpose", value, perm=perm)

    def swap(self, value: ir.Value) -> ir.Value:
        """Exchange batch and channels of a map: `[N, C, H, W] <-> [C, N, H, W]`."""
        return self.transpose(value, 1, 0, 2, 3)

    def sum(self, value: ir.Value, *axes: int, keepdims: bool = False) -> ir.Value:
        """Sum over axes."""
        return self("ReduceSum", value, self.constant(axes), keepdims=int(keepdims))

    def mean(self, value: ir.Value, *axes: int) -> ir.Value:
        """Mean over axes, which stay with size 1."""
        return self("ReduceMean", value, self.constant(axes), keepdims=1)

    def pad(self, value: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
        """Zeros before and after each axis; a negative number crops."""
        if not any((*before, *after)):
            return value
        return self("Pad", value, self.constant([*before, *after]))

    def keep(self, value: ir.Value, mask: ir.Value) -> ir.Value:
        """`value` where `mask` holds, else 0.

        A product, because the runtime's `Where` with a scalar is slower, up to four times in old versions.
        """
        return self("Mul", value, self("Cast", mask, to=int(ir.DataType.FLOAT)))


def dims(value: ir.Value) -> tuple[int | str, ...]:
    """The shape of a value of the captured network; the batch dimension is a `str`.

    Raises:
        ModelError: if shape inference left it open.
    """
    shape = value.shape if value.shape is not None or value.const_value is None else value.const_value.shape
    if shape is None or any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in shape):
        raise ModelError(
            f"{value.name}: the exported graph does not say its shape;"
            " train only layers behind it (smaller --layers)"
        )
    return tuple(dim if isinstance(dim, int) else str(dim) for dim in shape)


def static_dims(value: ir.Value, start: int = 0) -> tuple[int, ...]:
    """The dimensions from `start` on, which must be numbers.

    Raises:
        ModelError: if one of them is not.
    """
    found = dims(value)[start:]
    if not all(isinstance(dim, int) for dim in found):
        raise ModelError(
            f"{value.name}: from axis {start} on, expected fixed sizes, found {found};"
            " train only layers behind it (smaller --layers)"
        )
    return tuple(dim for dim in found if isinstance(dim, int))


def static_dim(value: ir.Value, axis: int) -> int:
    """One dimension, which must be a number.

    Raises:
        ModelError: if it is not.
    """
    found = dims(value)[axis]
    if isinstance(found, int):
        return found
    raise ModelError(
        f"{value.name}: expected a fixed size of axis {axis}, found {found};"
        " train only layers behind it (smaller --layers)"
    )
