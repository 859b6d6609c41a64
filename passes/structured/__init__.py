"""Structured pruning: whole units are removed and shapes shrink, so any runtime is faster without special kernels."""

from __future__ import annotations

from sparse_onnx.passes.structured.channels import Channels
from sparse_onnx.passes.structured.ffn import Ffn
from sparse_onnx.passes.structured.heads import Heads
from sparse_onnx.passes.structured.structured import StructuredPass

__all__ = ["STRUCTURED_PASSES", "Channels", "Ffn", "Heads"]

STRUCTURED_PASSES: tuple[type[StructuredPass], ...] = (Channels, Ffn, Heads)
"""The passes of this package, sorted by name."""
