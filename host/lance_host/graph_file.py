"""A graph of a package as a protobuf message, for whoever joins graphs again."""

from collections.abc import Sequence

import onnx
from google.protobuf.message import DecodeError

from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError


def read_graph(bundle: Bundle, members: Sequence[str]) -> onnx.ModelProto:
    """A graph of the package; one whose constants lie in other files is refused, not followed.

    Raises:
        ArtifactError: if the members are no graph, or one with files of its own.
    """
    where = f"{bundle.path}: {members[0]}"
    try:
        graph = onnx.load_from_string(bundle.read(*members))
    except DecodeError as error:
        raise ArtifactError(f"{where}: not an ONNX graph ({error}); rebuild the package") from None
    if any(item.data_location == onnx.TensorProto.EXTERNAL for item in graph.graph.initializer):
        raise ArtifactError(f"{where}: refers to files outside the package; do not use this file")
    return graph
