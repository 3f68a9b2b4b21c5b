"""trtpass: a compiler pass that brings token-sparse attention and its kin into ONNX Runtime and TensorRT engines."""

__version__ = "0.1.0"
