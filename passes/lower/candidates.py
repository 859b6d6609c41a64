"""The candidates of all lowerings."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.model.work import left_alone
from sparse_onnx.passes.base import Declined
from sparse_onnx.passes.lower.lowering import Candidate, Lowering
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.lower.sparse_recurrent import LowerSparseRecurrent

__all__ = ["LOWERINGS", "find_candidates"]

LOWERINGS: tuple[type[Lowering], ...] = (LowerSparseMatMul, LowerSparseConv, LowerSparseRecurrent)
"""Whose candidates the guard decides on."""


def find_candidates(model: ir.Model) -> tuple[list[Candidate], list[Declined]]:
    """The candidates of all lowerings, and the places that these leave alone or do not look at."""
    candidates, declined = [], []
    for lowering in LOWERINGS:
        found, left = lowering.find_candidates(model)
        candidates += found
        declined += [Declined(lowering.name, place, reason) for place, reason in left]
    nodes = [node for candidate in candidates for layer in candidate.layers for node in layer.nodes]
    known = {value.name or "" for node in nodes for value in node.inputs if value is not None}
    known |= {place.place for place in declined}
    declined += [Declined("lower", place, reason) for place, reason in left_alone(model, known)]
    return candidates, declined
