"""A converted network as an ONNX graph."""
