"""Which module of the network an exported node belongs to."""

import ast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter writes the path of modules


def module_of(node: ir.Node) -> str | None:
    """The path of the module that a node was exported from, as `named_modules` has it."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    names = [name for name in scopes[:-1] if name]  # the last is the operation's own
    return names[-1] if names else None
