"""The domain of the operators of the kernel library, and its version."""

from __future__ import annotations

__all__ = ["DOMAIN", "VERSION"]

DOMAIN = "sparse_onnx"
VERSION = 1
