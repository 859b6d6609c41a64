"""Operators of the domain ``sparse_onnx``: their contracts in Python, and the library with their kernels."""

from sparse_onnx.sparse_ops.library import LibraryInfo, check, info, library_path, register, run

__all__ = ["LibraryInfo", "check", "info", "library_path", "register", "run"]
