"""The package's network in PyTorch, plain and rewritten for speed."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lance_edge.errors import ModelError
from lance_edge.manifest import Manifest
from lance_host.zoo import ZOO
from lance_host.zoo.efficientnet_lite import SameConv2d


def load_network(
    manifest: Manifest, weights: Mapping[str, NDArray[np.generic]], trained: tuple[str, ...]
) -> nn.Module:
    """The network with the package's weights, batch-norm frozen, only `trained` with gradients.

    Raises:
        ModelError: if the package's model is none of lance-host's own.
    """
    if manifest.model not in ZOO:
        raise ModelError(
            f"--artifact of model {manifest.model}: expected one of {', '.join(ZOO)}: these have a"
            " twin in PyTorch; calibrate one of these"
        )
    network = ZOO[manifest.model].build(len(manifest.classes))
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    known = dict(network.named_parameters())
    missing = [name for name in trained if name not in known]
    if missing:
        raise ModelError(f"{manifest.model}: has no parameter {missing[0]}; rebuild the package")
    for name, parameter in known.items():
        parameter.requires_grad_(name in trained)
    return network.eval()


class ScaledConv(nn.Module):
    """A trainable convolution and its frozen batch-norm as one convolution: `[N, C, H, W] -> [N, O, H', W']`.

    The scale multiplies the weight inside the graph, so that gradients are those of the original weight.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_var is not None
        assert norm.running_mean is not None
        self.weight = conv.weight
        self.pad = conv.pad if isinstance(conv, SameConv2d) else None
        self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = 0.0 if conv.bias is None else conv.bias
        self.register_buffer("scale", scale.detach().reshape(-1, 1, 1, 1))
        self.register_buffer("shift", (norm.bias + (bias - norm.running_mean) * scale).detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stride, padding, dilation, groups = self.geometry
        return nn.functional.conv2d(
            x if self.pad is None else self.pad(x),
            self.weight * self.scale,
            self.shift,
            stride,
            padding,
            dilation,
            groups,
        )


def fuse_batch_norm(network: nn.Module) -> None:
    """Fold every batch-norm that reads nothing but a convolution, in place, wherever modules keep the two.

    A pair is one that the forward pass makes, not one of neighbours in a Sequential: residual blocks keep
    theirs as attributes.
    """
    for conv_name, norm_name in _pairs(network):
        conv, norm = network.get_submodule(conv_name), network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        is_trained = conv.weight.requires_grad
        network.set_submodule(
            conv_name, ScaledConv(conv, norm) if is_trained else fuse_conv_bn_eval(conv, norm)
        )
        network.set_submodule(norm_name, nn.Identity())


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch-norms that alone read them, each called once."""
    nodes = [node for node in _Tracer().trace(network).nodes if node.op == "call_module"]
    calls = Counter(str(node.target) for node in nodes)
    found = []
    for node in nodes:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        names = str(source.target), str(node.target)
        kinds = [network.get_submodule(name) for name in names]
        is_pair = isinstance(kinds[0], nn.Conv2d) and isinstance(kinds[1], nn.BatchNorm2d)
        if is_pair and all(calls[name] == 1 for name in names):
            found.append(names)
    return found


def split(network: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The frozen part, images to a tuple of tensors, and the trainable part, from those to logits."""
    graph = _Tracer().trace(network)
    trainable = _trainable_nodes(graph, network)
    boundary = [
        node for node in graph.nodes if node not in trainable and any(user in trainable for user in node.users)
    ]
    prefix, tail = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in trainable:
            copies[node] = prefix.node_copy(node, lambda old: copies[old])
    prefix.output(tuple(copies[node] for node in boundary))
    inside = {node: tail.placeholder(f"boundary_{index}") for index, node in enumerate(boundary)}
    for node in graph.nodes:
        if node in trainable:
            inside[node] = tail.node_copy(node, lambda old: inside[old])
    return fx.GraphModule(network, prefix), fx.GraphModule(network, tail)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ScaledConv | nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _trainable_nodes(graph: fx.Graph, network: nn.Module) -> set[fx.Node]:
    """Nodes behind a trainable parameter, the output included."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        trains = node.op == "call_module" and any(
            parameter.requires_grad for parameter in network.get_submodule(str(node.target)).parameters()
        )
        if trains or node.op == "output" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
