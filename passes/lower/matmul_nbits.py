"""Lower linears whose weights have 4 or 8 bits to ONNX Runtime's ``MatMulNBits``.

::

    Before                                  After

    W = Unpack4(q, scale)                   h = com.microsoft.MatMulNBits<bits = 4, accuracy_level = 4>(
    h = MatMul(X, W)                            X, q, scale, zero_point)

The weight keeps its numbers. With ``accuracy_level`` 4 the operator rounds each block of X to 8 bits; without it, it is
two to three times slower on CPUs and computes in floats. Groups of inputs that are no power of 2 are cut into blocks
that are, with the same scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.integer_grid import IntegerGrid
from sparse_onnx.model.nbits import pack_bits
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.lower.encoded_linear import EncodedForm, LowerProduct
from sparse_onnx.passes.lower.forms import Form

__all__ = ["LowerMatMulNBits"]

_DOMAIN = "com.microsoft"
_BITS, _SMALLEST, _LARGEST = (4, 8), 16, 128

_IN_FLOATS, _ROUNDED = 1, 4  # values of accuracy_level: activations in float32, or rounded to 8 bits


@dataclasses.dataclass(frozen=True)
class LowerMatMulNBits(LowerProduct):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.matmul-nbits"
    domains: ClassVar[Mapping[str, int]] = {_DOMAIN: 1}

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        if grid.bits not in _BITS:
            return f"has {grid.bits} bits; MatMulNBits is fast with 4 and 8"
        block = _block_size(grid)
        if block is None:
            return f"has groups of {grid.group_size}, which cannot be cut into blocks of 16 or more"
        return EncodedForm(
            f"int{grid.bits}-nbits",
            cls,
            exact=False,
            bits=grid.bits,
            block=block,
            zero_points=not grid.symmetric,
        )

    @classmethod
    def arrays(cls, grid: IntegerGrid) -> Mapping[str, np.ndarray]:
        """``packed`` [N, blocks, bytes], ``scales`` [N · blocks] and, where not all are the middle, ``zero_points``
        [N · bytes], as the operator has them."""
        (K, N), block = grid.integers.shape, _block_size(grid)
        assert block is not None
        blocks = -(-K // block)
        group = np.arange(blocks) * block // grid.group_size  # of every block
        scale, zero_point = grid.scale[group].T, grid.zero_point[group].T
        padded = np.repeat(zero_point, block, axis=1)
        padded[:, :K] = grid.integers.T
        found = {
            "packed": pack_bits(padded.reshape(N, blocks, block), grid.bits),
            "scales": scale.reshape(-1),
        }
        if not grid.symmetric:
            found["zero_points"] = pack_bits(zero_point, grid.bits).reshape(-1)
        return found

    @classmethod
    def product(
        cls,
        node: Callable[..., list[ir.Value]],
        x: ir.Value,
        grid: IntegerGrid,
        stored: Mapping[str, ir.Value],
    ) -> ir.Value:
        (K, N), block = grid.integers.shape, _block_size(grid)
        attributes = {"K": K, "N": N, "bits": grid.bits, "block_size": block}
        (y,) = node(
            "MatMulNBits",
            x,
            *stored.values(),
            domain=_DOMAIN,
            accuracy_level=_ROUNDED,
            **attributes,
        )
        return y

    @classmethod
    def exact_twin(cls, model: ir.Model, node: ir.Node) -> None:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _IN_FLOATS)


def _block_size(grid: IntegerGrid) -> int | None:
    """The inputs that share a scale in the operator, a power of 2; None: there is no such number."""
    if grid.group_size >= grid.inputs:
        return _LARGEST
    power = grid.group_size & -grid.group_size
    return min(power, _LARGEST) if power >= _SMALLEST else None
