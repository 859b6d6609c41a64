"""The stored formats."""

from __future__ import annotations

from sparse_onnx.sparse_ops.formats.base import StoredFormat
from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC

__all__ = ["FORMATS", "SPARSE_FORMAT"]

FORMATS: tuple[StoredFormat, ...] = (CHUNKED_CSC,)

SPARSE_FORMAT: StoredFormat = CHUNKED_CSC
"""In which weights with many zeros are stored."""
