"""Lower linears of integers, as quantizers write them, to our products of integers: the arithmetic of the graph itself.

::

    Before                                          After

    x = DequantizeLinear(q)                         Y = sparse_onnx.SparseQMatMulGelu<K, N, ..., grids>(q, stored
    W = DequantizeLinear(v)                                 parts of v, bias)
    h = MatMul(x, W)
    g = DequantizeLinear(QuantizeLinear(h))
    Y = Gelu(Add(g, bias))

q are the integers that the graph has there already, so that linears of one input share how it is rounded, and all sums
are those of the graph; g stays on its grid. See :mod:`sparse_onnx.sparse_ops.ops.q_matmul`. With ``SparseQMatMul`` four
neighbouring inputs whose weights for an output are all zero are neither stored nor multiplied. Against ONNX Runtime's
own products of integers, the guard measures it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.integer_grid import IntegerGrid, read_grid
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.lower.encoded_linear import EncodedForm
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.int8_matmul import (
    LowerBytes,
    SparseInt8Form,
    reason_against_inputs,
    share_of_quads,
)
from sparse_onnx.passes.lower.lowering import Candidate
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY
from sparse_onnx.passes.patterns.linear import Linear
from sparse_onnx.passes.patterns.q_linear import match_q_linear, reads_integers
from sparse_onnx.sparse_ops.ops import q_matmul

__all__ = ["LowerQMatMul", "LowerSparseQMatMul"]


def _reason_against(grid: IntegerGrid) -> str:
    """Why our products of bytes cannot take weights on ``grid``; empty if they can."""
    if grid.bits != 8:
        return f"has {grid.bits} bits, not 8"
    if len(grid.scale) != 1:
        return "has more than one scale for an output"
    steps = grid.integers.astype(np.int16) - grid.zero_point
    if steps.min(initial=0) < -128 or steps.max(initial=0) > 127:
        return "has integers that are further from their zero point than 8 bits reach"
    return reason_against_inputs(grid.inputs)


@dataclasses.dataclass(frozen=True)
class LowerQMatMul(LowerBytes):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.q-matmul"
    integers: ClassVar[bool] = True
    rounds: ClassVar[bool] = False  # the graph itself does
    dense: ClassVar[bool] = True

    @classmethod
    def op_type(cls, base: str, grid: IntegerGrid) -> str:
        return q_matmul.op_type_of(base, cls.dense)

    @classmethod
    def concerns(cls, weight: Weight) -> bool:
        return any(map(reads_integers, weight.nodes))

    @classmethod
    def read(cls, weight: Weight) -> IntegerGrid | str:
        return read_grid(weight, rounded=True)

    @classmethod
    def match(cls, weight: Weight, node: ir.Node, graph: ir.Graph, shapes: Shapes) -> Linear | str:
        return match_q_linear(weight, node, graph, shapes)

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        return _reason_against(grid) or EncodedForm("int8-given", cls)


@dataclasses.dataclass(frozen=True)
class LowerSparseQMatMul(LowerQMatMul):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-q-matmul"
    dense: ClassVar[bool] = False

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        """Without the reasons for others, which are those of :class:`LowerQMatMul`."""
        return super().find_candidates(model)[0], []

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        return _reason_against(grid) or SparseInt8Form(
            "int8-given-quads", cls, least_zeros=MIN_SPARSITY, kept=share_of_quads(grid)
        )
