"""The dropout modules of a network: what `--dropout` switches on, and what is said about it.

`nn.Dropout` drops single values, `nn.Dropout1d`, `2d` and `3d` whole channels of a sample.  All are exported as
ONNX's Dropout, those of channels with a mark; `autodiff/dropout.py` computes the masks.
"""

import contextlib
import functools
from collections.abc import Iterator

import onnx_ir as ir
from torch import nn
from torch.nn import functional

from lance_host.autodiff.dropout import WHOLE_CHANNELS, dropping_nodes
from lance_host.scopes import module_of

OF_VALUES, OF_CHANNELS = (nn.Dropout,), (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
OTHERS = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)  # with a ratio that stays unused


@contextlib.contextmanager
def dropping(network: nn.Module, is_on: bool) -> Iterator[None]:
    """The network in evaluation mode, but for its dropouts, which drop single values for the time being."""
    network.eval()
    modules = [module for module in network.modules() if is_on and isinstance(module, OF_VALUES + OF_CHANNELS)]
    try:
        for module in modules:
            # Of this module alone: other networks have its class, too.
            vars(module)["forward"] = functools.partial(functional.dropout, p=_ratio(module), training=True)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def mark_whole_channels(model: ir.Model, network: nn.Module) -> None:
    """Mark the Dropouts of an exported network whose module drops whole channels."""
    for node in model.graph:
        name = module_of(node) if node.op_type == "Dropout" else None
        if name is not None and isinstance(network.get_submodule(name), OF_CHANNELS):
            node.metadata_props[WHOLE_CHANNELS] = "yes"


def describe(network: nn.Module, graph: ir.Graph) -> list[str]:
    """Lines that say which modules drop in a captured graph, and which stay off."""
    modules = dict(network.named_modules())
    on = list(dict.fromkeys(filter(None, map(module_of, dropping_nodes(graph)))))
    ratios = [f"{name} ({_ratio(modules[name]):g}{_unit(modules[name])})" for name in on]
    lines = [f"dropout: {', '.join(ratios)} drop while the board trains"]
    frozen = [
        name
        for name, module in modules.items()
        if isinstance(module, OF_VALUES + OF_CHANNELS) and _ratio(module) > 0 and name not in on
    ]
    if frozen:
        lines.append(f"dropout: {', '.join(frozen)} stay off, before the first trained layer")
    unknown = [
        f"{name} ({type(module).__name__})"
        for name, module in modules.items()
        if isinstance(module, OTHERS) and not isinstance(module, OF_VALUES + OF_CHANNELS) and _ratio(module) > 0
    ]
    if unknown:
        lines.append(
            f"warning: {', '.join(unknown)} stay off: only nn.Dropout, Dropout1d, Dropout2d and Dropout3d drop"
        )
    return lines


def _unit(module: nn.Module) -> str:
    return " of the channels" if isinstance(module, OF_CHANNELS) else ""


def _ratio(module: nn.Module) -> float:
    return float(getattr(module, "p", 0) or getattr(module, "dropout", 0))
