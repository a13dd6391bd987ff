"""Prune a CNN's channels, remove them from its ONNX graph with proof, and measure the latency honestly."""

__version__ = "0.1.0"
__all__ = ["__version__"]
