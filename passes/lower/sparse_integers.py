"""Lower linears with weights of 4 or 8 bits and zeros among them to ``SparseMatMulInt*``: for few tokens.

::

    Before                                  After

    W = Unpack4(q, scale)                   Y = sparse_onnx.SparseMatMulInt4Gelu<K, N, group, format>(
    h = MatMul(X, W)                            X, masks, values, scales, bias)
    b = Add(h, bias)
    Y = Gelu(b)

Zeros are not stored, the weight keeps its numbers, and the operator rounds each group of inputs of every token to 8
bits. The masks are bitmaps, which take any pattern of zeros, or positions within 16 inputs where the weight was pruned
to keep some of these (``4:16``, ``2:8``). Scales must be float16, as ``quant.weight`` has them.

See :mod:`sparse_onnx.sparse_ops.formats.nbits` and :mod:`sparse_onnx.sparse_ops.ops.sparse_matmul_nbits`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from sparse_onnx.model.integer_grid import IntegerGrid
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.lower.encoded_linear import LowerFused
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.lowering import Candidate
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.formats.nbits import LAYOUTS, Layout, PackedLevels, fits_half, most_of_16, pack
from sparse_onnx.sparse_ops.ops.sparse_matmul_nbits import op_type_of

__all__ = ["LowerPositions", "LowerSparseIntegers"]

_FEW_ZEROS = 0.25
"""Below, a bitmap of 4 bits saves nothing."""
_MOST_OF_16 = 8
"""With more, positions take more than all integers."""
_LARGEST_GROUP = 128


@dataclasses.dataclass(frozen=True)
class SparseIntegerForm(Form):
    """Integers that are not zero, in a ``layout``; ``group`` inputs share a float16 scale. Where positions are stored,
    ``kept`` of 16 are."""

    layout: Layout = LAYOUTS["bitmap4"]
    group: int = _LARGEST_GROUP
    kept: int = 0

    @property
    def lies(self) -> Mapping[str, int | str]:
        return {"kept": self.kept} if self.kept else {}

    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        """Without scales."""
        size = shape[0] * shape[1]
        if self.layout.masks:
            return size * (1 / 8 + (1 - sparsity) * self.layout.bits / 8)
        return size * (_of_16(structure) or 16) / 16

    def scale_nbytes(self, shape: tuple[int, int]) -> float:
        return (2.0 + self.layout.zeros) * -(-shape[0] // self.group) * shape[1]


@dataclasses.dataclass(frozen=True)
class _LowerNBits(LowerFused):
    """What both have in common."""

    @classmethod
    @abc.abstractmethod
    def layout_of(cls, grid: IntegerGrid) -> Layout | None:
        """How the integers of a grid are stored; None: they are not."""

    @classmethod
    def pack(cls, candidate: Candidate, grid: IntegerGrid) -> PackedLevels:
        group = _group(grid)
        groups = np.arange(0, grid.inputs, group) // grid.group_size
        zero_point = grid.zero_point[groups]
        levels = grid.integers.astype(np.int16) - zero_point[np.arange(grid.inputs) // group]
        return pack(levels, grid.scale[groups], group, cls._layout(grid), zero_point)

    @classmethod
    def op_type(cls, base: str, grid: IntegerGrid) -> str:
        return op_type_of(base, cls._layout(grid))

    @classmethod
    def _layout(cls, grid: IntegerGrid) -> Layout:
        layout = cls.layout_of(grid)
        assert layout is not None
        return layout


@dataclasses.dataclass(frozen=True)
class LowerSparseIntegers(_LowerNBits):
    """See the module's docstring: bitmaps."""

    name: ClassVar[str] = "lower.sparse-integers"

    @classmethod
    def layout_of(cls, grid: IntegerGrid) -> Layout | None:
        four = LAYOUTS["bitmap4" if grid.symmetric else "bitmap4_zeros"]
        return {4: four, 8: LAYOUTS["bitmap8"]}.get(grid.bits)

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        layout = cls.layout_of(grid)
        if layout is None:
            return f"has {grid.bits} bits, not 4 or 8"
        return _unfit(grid, layout) or SparseIntegerForm(
            f"int{grid.bits}-bitmap",
            cls,
            exact=False,
            least_zeros=_FEW_ZEROS,
            bits=grid.bits,
            layout=layout,
            group=_group(grid),
        )


@dataclasses.dataclass(frozen=True)
class LowerPositions(_LowerNBits):
    """See the module's docstring: positions within 16 inputs."""

    name: ClassVar[str] = "lower.sparse-positions"

    @classmethod
    def layout_of(cls, grid: IntegerGrid) -> Layout | None:
        return LAYOUTS["n_of_16" if grid.symmetric else "n_of_16_zeros"] if grid.bits == 4 else None

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        layout = cls.layout_of(grid)
        if layout is None:
            return f"has {grid.bits} bits, not 4"
        kept = _of_16(weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured"))
        if kept is None:
            return f"keeps no {_MOST_OF_16} or fewer of 16 inputs by its pattern"
        if reason := _unfit(grid, layout):
            return reason
        zero_point = grid.zero_point[np.arange(grid.inputs) // grid.group_size]
        if (most := most_of_16(grid.integers != zero_point)) > kept:
            return f"keeps {most} of 16 inputs, although its pattern says {kept}"
        return SparseIntegerForm(
            "int4-of-16",
            cls,
            exact=False,
            least_zeros=1 - _MOST_OF_16 / 16,
            bits=grid.bits,
            layout=layout,
            group=_group(grid),
            kept=most,
        )


def _of_16(structure: str) -> int | None:
    """How many of 16 inputs are kept at most by a pattern of zeros; None: it does not say, or too many."""
    parsed = MaskStructure.parse(structure)
    keep, of = parsed.size
    if parsed.kind != "n:m" or 16 % of or keep * 16 > of * _MOST_OF_16:
        return None
    return keep * 16 // of


def _unfit(grid: IntegerGrid, layout: Layout) -> str:
    """Why the layout cannot hold the weight; empty if it can."""
    if not grid.symmetric and not layout.zeros:
        return "has zero points"
    group = _group(grid)
    if group not in layout.groups:
        return (
            f"has groups of {grid.group_size}, which cannot be cut into {min(layout.groups)} inputs or more"
        )
    return "" if fits_half(grid.scale) else "has scales that are no float16"


def _group(grid: IntegerGrid) -> int:
    """The inputs that share a scale in the operator, a power of 2."""
    if grid.group_size >= grid.inputs:
        return _LARGEST_GROUP
    return min(grid.group_size & -grid.group_size, _LARGEST_GROUP)
