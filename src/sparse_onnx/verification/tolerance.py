"""How far a compiled model may be from what its weights say."""

from __future__ import annotations

__all__ = ["MAX_COMPILER_ERROR"]

MAX_COMPILER_ERROR = 1e-4
"""Largest relative error of a compiled model against the pruned dense one: both compute the same in float32."""
