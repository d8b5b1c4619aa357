"""Convolutions as rules; the gradients themselves are in `lance_host.autodiff.conv`.

A 1-D convolution is the 2-D one on maps of height 1.  A transposed convolution is the input gradient of a
convolution, so its own input gradient is that convolution, and its weight gradient is the convolution's
with input and output gradient exchanged.
"""

from collections.abc import Sequence

import onnx_ir as ir

from lance_edge.errors import ModelError
from lance_host.autodiff.conv import ConvGeometry, geometry, input_gradient, weight_gradient
from lance_host.autodiff.emit import Emit, dims
from lance_host.autodiff.rules.common import Thunk, operand, rank_of, result

HEIGHT = 2  # the axis that a 1-D map lacks


def conv(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """Y = X * W + b."""
    x, weight = operand(node, 0), operand(node, 1)
    geo = _geometry(node, x, result(node))

    def dx() -> ir.Value:
        gradient = input_gradient(emit, geo, _as_map(emit, weight, x), _as_map(emit, dy, x))
        return _as_before(emit, gradient, x)

    def of_weight() -> ir.Value:
        gradient = weight_gradient(emit, geo, _as_map(emit, x, x), _as_map(emit, dy, x))
        return _as_before(emit, gradient, x)

    return dx, of_weight, lambda: _sum_positions(emit, dy, x)


def conv_transpose(emit: Emit, node: ir.Node, dy: ir.Value) -> Sequence[Thunk]:
    """X is the gradient of the output, and Y that of the input, of a convolution with the same weight."""
    x, weight = operand(node, 0), operand(node, 1)
    geo = _geometry(node, result(node), x)

    def dx() -> ir.Value:
        names = ("strides", "pads", "dilations")
        attributes = {name: node.attributes.get_ints(name, ()) for name in names if name in node.attributes}
        return emit("Conv", dy, weight, group=geo.groups, **attributes)

    def of_weight() -> ir.Value:
        gradient = weight_gradient(emit, geo, _as_map(emit, dy, x), _as_map(emit, x, x))
        return _as_before(emit, gradient, x)

    return dx, of_weight, lambda: _sum_positions(emit, dy, x)


def _geometry(node: ir.Node, x: ir.Value, y: ir.Value) -> ConvGeometry:
    """The geometry of the 2-D convolution from `x` to `y` with the node's weight and attributes."""
    spatial = rank_of(x) - 2
    if spatial not in (1, 2):
        raise ModelError(
            f"{node.name}: expected a 1-D or 2-D convolution, found {spatial}-D; choose other --layers"
        )
    if "output_shape" in node.attributes:
        raise ModelError(f"{node.name}: output_shape is not supported; export with explicit pads")
    attributes = {name: node.attributes[name].value for name in node.attributes if name in SIMPLE}
    if spatial == 1:
        attributes |= {
            name: [neutral, *attributes[name]] for name, neutral in LIFTED.items() if name in attributes
        }
        if "pads" in attributes:
            before, after = attributes["pads"]
            attributes["pads"] = [0, before, 0, after]
    same = ir.Node(
        "",
        "Conv",
        [_lifted(x), _lifted(operand(node, 1))],
        attributes=ir.convenience.convert_attributes(attributes),
        outputs=[_lifted(y)],
        name=node.name,
    )
    return geometry(same)


SIMPLE = ("group", "strides", "dilations", "pads", "auto_pad")
LIFTED = {"strides": 1, "dilations": 1}


def _lifted(value: ir.Value) -> ir.Value:
    """A value of the same shape on maps, with the height 1 where there was none."""
    shape = list(dims(value))
    if len(shape) == 3:
        shape.insert(HEIGHT, 1)
    return ir.Value(name=value.name, shape=ir.Shape(shape))


def _as_map(emit: Emit, value: ir.Value, like: ir.Value) -> ir.Value:
    """A value of a convolution of `like`: with the height 1 where that is 1-D."""
    return value if rank_of(like) == 4 else emit("Unsqueeze", value, emit.constant([HEIGHT]))


def _as_before(emit: Emit, value: ir.Value, like: ir.Value) -> ir.Value:
    return value if rank_of(like) == 4 else emit("Squeeze", value, emit.constant([HEIGHT]))


def _sum_positions(emit: Emit, dy: ir.Value, like: ir.Value) -> ir.Value:
    return emit.sum(dy, 0, *range(2, rank_of(like)))
