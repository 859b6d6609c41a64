"""What one layer becomes in a plan."""

from __future__ import annotations

from typing import NamedTuple

from sparse_onnx.timing.curves import UNSTRUCTURED

__all__ = ["FLOAT_BITS", "Choice"]

FLOAT_BITS = 32


class Choice(NamedTuple):
    """What a layer becomes.

    Attributes:
        sparsity: Its share of zeros, in [0, 1).
        structure: Their pattern, as :class:`sparse_onnx.passes.solvers.masks.MaskStructure` writes it.
        bits: Of its weight: 32 is float32; 8, 4, 3 or 2.
        activations: Bits that its operator rounds activations to when it runs: 8 for products of integers, 32
            otherwise.
    """

    sparsity: float = 0.0
    structure: str = UNSTRUCTURED
    bits: int = FLOAT_BITS
    activations: int = FLOAT_BITS
