"""What trains beside the weights of the layers and the head: `--train-bias`, `--train-norm`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from lance_host.traverse import depends_on, descendants

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.RMSNorm,
)
AFFINE = ("weight", "bias")


@dataclass(frozen=True)
class Extras:
    """`biases` of the trained layers, and the affine of those `norms` (module names) that are in the tail."""

    biases: bool = False
    norms: tuple[str, ...] = ()


NOTHING_MORE = Extras()


def norm_modules(network: nn.Module) -> tuple[str, ...]:
    """Names of the norm layers that have an affine, in module order."""
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, NORMS) and any(True for _ in module.parameters(recurse=False))
    )


def extra_parameters(
    graph: ir.Graph, layers: Sequence[str], trained: Sequence[str], extras: Extras
) -> list[str]:
    """The further parameters that train, by state-dict name.

    Args:
        layers: the trained layers.
        trained: names of the parameters that train anyway: where they are, the tail begins.
    """
    names = [f"{layer}.bias" for layer in layers] if extras.biases else []
    tail = descendants(graph, [graph.initializers[name] for name in trained])
    affine = [f"{norm}.{part}" for norm in extras.norms for part in AFFINE]
    names += [name for name in affine if _is_read_in(tail, graph, name)]
    return [name for name in names if name in graph.initializers]


def _is_read_in(tail: set[ir.Value], graph: ir.Graph, name: str) -> bool:
    """Whether the parameter meets values of the tail first."""
    value = graph.initializers.get(name)
    if value is None:
        return False
    return any(operand in tail for node in _meeting(value, graph) for operand in node.inputs)


def _meeting(value: ir.Value, graph: ir.Graph) -> Iterator[ir.Node]:
    """The first nodes that read a parameter, or what is made of it alone, together with data."""
    for use in value.uses():
        if any(operand is not None and depends_on(operand, graph.inputs[0]) for operand in use.node.inputs):
            yield use.node
        else:
            for output in use.node.outputs:
                yield from _meeting(output, graph)
