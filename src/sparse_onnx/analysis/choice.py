"""What one layer becomes in a plan."""

from __future__ import annotations

from typing import NamedTuple

from sparse_onnx.passes.lower.forms import FLOAT_BITS
from sparse_onnx.timing.curves import UNSTRUCTURED

__all__ = ["ROUNDED_BITS", "Choice"]

ROUNDED_BITS = 8
"""Of activations that operators round."""


class Choice(NamedTuple):
    """What a layer becomes.

    Attributes:
        sparsity: Its share of zeros, in [0, 1).
        structure: Their pattern, as :class:`sparse_onnx.passes.solvers.masks.MaskStructure` writes it.
        bits: Of its weight: 32 is float32; 8, 4, 3 or 2.
        activations: Bits that its operator may round its input to when it runs, with one scale for all of it or for
            every token: 8 for ONNX Runtime's dynamic int8. Operators that round blocks of inputs (MatMulNBits) need no
            such leave: what they lose belongs to the bits of the weight.
    """

    sparsity: float = 0.0
    structure: str = UNSTRUCTURED
    bits: int = FLOAT_BITS
    activations: int = FLOAT_BITS
