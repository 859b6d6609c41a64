"""The domain of the operators of the kernel library, and its version."""

from __future__ import annotations

__all__ = ["DOMAIN", "EXACT_DOMAIN", "VERSION"]

DOMAIN = "sparse_onnx"
VERSION = 1

EXACT_DOMAIN = f"{DOMAIN}.exact"
"""Of operators that round activations, as functions that do not. No kernels belong to these."""
