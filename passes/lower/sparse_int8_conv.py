"""Lower convolutions of integers, as quantizers write them, to ``SparseInt8Conv``: the arithmetic of the graph itself.

::

    Before                                          After

    x = DequantizeLinear(q)                         p = sparse_onnx.SparseInt8Conv<kernel_shape, ..., K, N, ..., grids>(
    W = DequantizeLinear(v)                                 q, stored parts of v, bias)
    h = Conv<...>(x, W, bias)
    p = QuantizeLinear(Relu(h))

The result is what ONNX Runtime's own convolution of integers makes of it, integer by integer: sums are exact, and
rounded once. Four neighbouring channels whose weights for an output are all zero at a place of the window are neither
stored nor multiplied. Against ONNX Runtime's, the guard measures it.

See :mod:`sparse_onnx.sparse_ops.ops.int8_conv`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.integer_grid import IntegerGrid
from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import CONVOLUTIONS, Weight
from sparse_onnx.passes.lower.encoded_linear import LowerFused
from sparse_onnx.passes.lower.forms import Form
from sparse_onnx.passes.lower.int8_matmul import SparseInt8Form, bytes_of, reason_against_inputs
from sparse_onnx.passes.lower.lowering import Candidate
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY, Layer
from sparse_onnx.passes.patterns.q_conv import QConvolution, match_q_conv
from sparse_onnx.sparse_ops.formats.int8_quads import Int8Weight
from sparse_onnx.sparse_ops.ops import int8_conv

__all__ = ["LowerSparseInt8Conv"]


@dataclasses.dataclass(frozen=True)
class LowerSparseInt8Conv(LowerFused):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-int8-conv"
    kind: ClassVar[str] = "convolution"
    op_types: ClassVar[tuple[str, ...]] = CONVOLUTIONS
    rounds: ClassVar[bool] = False  # the graph itself does

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        candidates, declined = super().find_candidates(model)
        alike = []
        for candidate in candidates:
            if len({_group(layer) for layer in candidate.layers}) > 1:  # blocks are cut to fit the groups
                declined.append((candidate.weight.name, "shared by convolutions with different groups"))
            else:
                alike.append(candidate)
        return alike, declined

    @classmethod
    def match(cls, weight: Weight, node: ir.Node, graph: ir.Graph, shapes: Shapes) -> Layer | str:
        return match_q_conv(weight, node, graph, shapes)

    @classmethod
    def form_of(cls, weight: Weight, grid: IntegerGrid) -> Form | str:
        matrix = int8_conv.matrix_of(_filters(weight, grid))
        if reason := reason_against_inputs(len(matrix)):
            return reason
        kept = float(matrix.reshape(len(matrix) // 4, 4, -1).any(axis=1).mean())
        return SparseInt8Form("int8-given-quads", cls, least_zeros=MIN_SPARSITY, kept=kept)

    @classmethod
    def pack(cls, candidate: Candidate, grid: IntegerGrid) -> Int8Weight:
        scales = np.ascontiguousarray(grid.scale[0])
        return int8_conv.pack(_filters(candidate.weight, grid), scales, _group(candidate.layers[0]))

    @classmethod
    def op_type(cls, base: str, grid: IntegerGrid) -> str:
        return base


def _group(layer: Layer) -> int:
    assert isinstance(layer, QConvolution)
    return layer.window.group


def _filters(weight: Weight, grid: IntegerGrid) -> np.ndarray:
    """int8 [N, C / group, window...]"""
    return np.ascontiguousarray(bytes_of(grid).T).reshape(weight.dims)
