"""The grid that weights get where only their bits are asked for."""

from __future__ import annotations

from typing import NamedTuple

from sparse_onnx.model.bit_packing import packed_bytes, stored_bits
from sparse_onnx.passes.solvers.masks import MaskStructure

__all__ = ["UsualGrid", "usual_grid"]

_FEW_BITS, _GROUP = 4, 64
"""Up to so many bits, so many inputs share a scale and have a zero point: with 4 bits that takes a quarter of a bit a
weight and loses a tenth less than symmetric grids. With more, a scale for each output does, and integer kernels
take no other."""

_OF, _MOST_KEPT = 16, 6
"""Up to so many kept of 16 are best stored with their positions, whose operator is a twentieth faster without zero
points."""

_HALF = 2  # bytes of a scale


class UsualGrid(NamedTuple):
    """Options of :class:`sparse_onnx.passes.quantize.weight.QuantizeWeights`, by their names there."""

    bits: int
    group_size: int
    symmetric: bool

    def nbytes(self, shape: tuple[int, int]) -> int:
        """What a weight [K, N] takes, integers, scales and zero points."""
        bits = stored_bits(self.bits)
        return packed_bytes(*shape, bits, self.group_size, zeros=not self.symmetric, scale_bytes=_HALF)


def usual_grid(bits: int, group_size: int | None = None, structure: str = "unstructured") -> UsualGrid:
    """That of ``bits`` (2 to 8) for weights with zeros in a pattern, with another group size where one is given."""
    few = bits <= _FEW_BITS
    usual = _GROUP if few else 0
    pattern = MaskStructure.parse(structure)
    positions = pattern.kind == "n:m" and pattern.size[1] == _OF and pattern.size[0] <= _MOST_KEPT
    return UsualGrid(bits, usual if group_size is None else group_size, not few or positions)
