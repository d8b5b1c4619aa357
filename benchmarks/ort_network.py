"""The network of a package as `onnxruntime.training.artifacts.generate_artifacts` takes it."""

from onnx import ModelProto, helper, numpy_helper

from lance_edge.bundle import Bundle
from lance_edge.manifest import Variant
from lance_edge.names import IMAGES, LOGITS, WEIGHTS_MEMBER
from lance_host.graph_file import read_graph
from lance_host.ort_training.join import join
from lance_host.ort_training.models import IR_VERSION, OPSET


def plain_network(bundle: Bundle, variant: Variant) -> ModelProto:
    """Images to logits in the network's own operators; the trained tensors are initializers under their names.

    Frozen weights are constants with batch-norm folded, as in our own graphs.
    """
    parts = {role: read_graph(bundle, variant.graphs[role]) for role in ("prefix", "tail")}
    graph = join(parts, {})
    weights = bundle.arrays(WEIGHTS_MEMBER)
    graph.name = "network"
    graph.initializer.extend(numpy_helper.from_array(weights[name], name) for name in variant.parameters)
    graph.input.extend(value for value in parts["prefix"].graph.input if value.name == IMAGES)
    graph.output.extend(value for value in parts["tail"].graph.output if value.name == LOGITS)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
