"""Packages as the training artifacts of ONNX Runtime's own training API."""
