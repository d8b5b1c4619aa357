"""The device side: trains from a package with numpy and onnxruntime alone; never imports torch or onnx."""
