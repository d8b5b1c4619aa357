"""Reverse-mode differentiation of an ONNX graph into plain ONNX operators."""
