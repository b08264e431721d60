"""grood-edge: give an image classifier a calibrated "I do not know this", in one ONNX file."""

__version__ = "0.1.0"

__all__ = ["__version__"]
