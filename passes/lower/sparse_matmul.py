"""Lower linears with enough zeros to ``SparseMatMul``.

Before::                                       After::

    h = MatMul(X, W)                               Y = sparse_onnx.SparseMatMulGelu<K, N, ...>(
    b = Add(h, bias)                                   X, stored parts of W, bias)
    Y = Gelu(b)

See :mod:`sparse_onnx.passes.lower.lowering` for what is the same for all operators.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.model.shapes import Shapes
from sparse_onnx.model.weights import LINEARS, find_weights
from sparse_onnx.passes.lower.forms import sparse_form
from sparse_onnx.passes.lower.lowering import Candidate, Lowering, match_layers
from sparse_onnx.passes.patterns.linear import match_linear

__all__ = ["LowerSparseMatMul"]


@dataclasses.dataclass(frozen=True)
class LowerSparseMatMul(Lowering):
    """See the module's docstring."""

    name: ClassVar[str] = "lower.sparse-matmul"
    kind: ClassVar[str] = "linear"

    @classmethod
    def find_candidates(cls, model: ir.Model) -> tuple[list[Candidate], list[tuple[str, str]]]:
        weights, declined = find_weights(model, LINEARS, encoded=True, integers=False)
        shapes = Shapes(model)
        found = match_layers(
            weights, lambda weight, node: match_linear(weight, node, model.graph, shapes), declined
        )
        forms = (sparse_form(cls),)
        return [Candidate(weight, linears, cls.kind, forms) for weight, linears in found], declined
