"""Lower linears whose weights have 8 bits and a scale for each output to our products of integers.

::

    Before                                  After

    W = Unpack8(q, scale)                   Y = sparse_onnx.Int8MatMulGelu<K, N, ...>(X, stored parts of W, bias)
    h = MatMul(X, W)
    b = Add(h, bias)
    Y = Gelu(b)

The weight keeps its numbers; X is rounded to 8 bits in every run, token by token, see
:mod:`sparse_onnx.sparse_ops.ops.int8_matmul`. With ``SparseInt8MatMul`` four neighbouring inputs whose weights for an
output are all zero are neither stored nor multiplied. Which of the two is faster, the guard measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.lower.encoded_linear import EncodedForm, LowerFused, reason_against_bytes
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.sparse_ops.formats import int8_quads
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.sparse_ops.formats.int8_quads import Int8Weight
from sparse_onnx.sparse_ops.ops import int8_matmul

__all__ = [
    "LowerBytes",
    "LowerInt8MatMul",
    "LowerSparseInt8MatMul",
    "SparseInt8Form",
    "bytes_of",
    "reason_against_inputs",
    "share_of_quads",
]


def share_of_quads(grid: IntegerGrid) -> float:
    """Of the quads of a weight, how many have an integer other than 0."""
    rows = np.arange(0, grid.inputs, 4)
    return float(np.logical_or.reduceat(grid.integers != grid.zero_point, rows, axis=0).mean())


@dataclasses.dataclass(frozen=True)
class SparseInt8Form(EncodedForm):
    """Integers without quads of zeros. ``kept`` is the share of quads that are left, where it is known."""

    kept: float | None = None

    @property
    def lies(self) -> Mapping[str, int | str]:
        """Equal shares of zeros leave more or fewer quads, by their pattern."""
        return {} if self.kept is None else {"quads": f"{self.kept:.2f}"}

    def expected_nbytes(
        self, shape: tuple[int, int], sparsity: float, structure: str, outputs: Outputs
    ) -> float:
        if self.kept is not None:
            return int8_quads.expected_nbytes(shape, self.kept)
        parsed = MaskStructure.parse(structure)
        if parsed.kind == "n:m":
            return int8_quads.expected_nbytes(shape, 1)  # some of nearly every four are kept
        together = parsed.size[1] if parsed.kind == "block" else 1  # inputs that are kept or not as one
        return int8_quads.expected_nbytes(shape, 1 - sparsity ** max(1, 4 / together))


def bytes_of(grid: IntegerGrid) -> np.ndarray:
    """The integers of ``grid`` less their zero points, int8 [K, N], where these are within reach."""
    return np.asarray(grid.integers.astype(np.int16) - grid.zero_point, np.int8)


def reason_against_inputs(inputs: int) -> str:
    """Why our products of bytes cannot take so many ``inputs``; empty if they can."""
    if inputs > int8_quads.MAX_INPUTS:
        return f"has {inputs} inputs; sums are exact up to {int8_quads.MAX_INPUTS}"
    return ""


@dataclasses.dataclass(frozen=True)
class LowerBytes(LowerFused):
    """Of products of bytes, whose weights are on grids of one scale an output."""

    dense: ClassVar[bool]
    """Whether all quads are stored, or those without a weight left out."""

    @classmethod
    def pack(cls, candidate: Candidate, grid: IntegerGrid) -> Int8Weight:
        pack = int8_quads.pack_dense if cls.dense else int8_quads.pack_quads
        return pack(bytes_of(grid), np.ascontiguousarray(grid.scale[0]))


@dataclasses.dataclass(frozen=True)
class LowerInt8MatMul(LowerBytes):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.int8-matmul"
    dense: ClassVar[bool] = True

    @classmethod
    def op_type(cls, base: str, grid: IntegerGrid) -> str:
        return int8_matmul.op_type_of(base, cls.dense)

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        return reason_against_bytes(grid) or reason_against_inputs(grid.inputs) or cls._form()

    @classmethod
    def _form(cls) -> Form:
        return EncodedForm("int8-token", cls, exact=False, activations=8, by_token=True)


@dataclasses.dataclass(frozen=True)
class LowerSparseInt8MatMul(LowerInt8MatMul):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-int8-matmul"
    dense: ClassVar[bool] = False

    @classmethod
    def layout(cls, candidate: Candidate, form: Form, packer: Packer) -> Mapping[str, int | str]:
        """Equal shares of zeros leave more or fewer quads, by their pattern."""
        grid = read_grid(candidate.weight)
        assert isinstance(grid, IntegerGrid)
        share = share_of_quads(grid)
        candidate.weight.release()
        return {**super().layout(candidate, form, packer), "quads": f"{share:.2f}"}

    @classmethod
    def _form(cls) -> Form:
        return SparseInt8Form(
            "int8-quads", cls, exact=False, least_zeros=MIN_SPARSITY, activations=8, by_token=True
        )
