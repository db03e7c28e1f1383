"""Operators for ONNX Runtime on a CPU, in C++."""
