"""The candidates of all lowerings."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.model.work import left_alone
from sparse_onnx.passes.base import Declined
from sparse_onnx.passes.lower.dynamic_int8 import LowerDynamicInt8
from sparse_onnx.passes.lower.int8_matmul import LowerInt8MatMul, LowerSparseInt8MatMul
from sparse_onnx.passes.lower.lowering import Candidate, Lowering
from sparse_onnx.passes.lower.matmul_nbits import LowerMatMulNBits
from sparse_onnx.passes.lower.q_matmul import LowerQMatMul, LowerSparseQMatMul
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.passes.lower.sparse_int8_conv import LowerSparseInt8Conv
from sparse_onnx.passes.lower.sparse_integers import LowerPositions, LowerSparseIntegers
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.lower.sparse_recurrent import LowerSparseRecurrent

__all__ = ["LOWERINGS", "find_candidates"]

LOWERINGS: tuple[type[Lowering], ...] = (
    LowerSparseMatMul,
    LowerSparseConv,
    LowerSparseRecurrent,
    LowerInt8MatMul,
    LowerSparseInt8MatMul,
    LowerQMatMul,
    LowerSparseQMatMul,
    LowerSparseInt8Conv,
    LowerMatMulNBits,
    LowerDynamicInt8,
    LowerSparseIntegers,
    LowerPositions,
)
"""Whose candidates the guard decides on."""


def find_candidates(model: ir.Model) -> tuple[list[Candidate], list[Declined]]:
    """The candidates of all lowerings, each with every form that one of them makes, and the places that these leave
    alone or do not look at."""
    by_name: dict[str, Candidate] = {}
    refused, declined = [], []
    for lowering in LOWERINGS:
        found, left = lowering.find_candidates(model)
        refused += [Declined(lowering.name, place, reason) for place, reason in left]
        for candidate in found:
            first = by_name.setdefault(candidate.weight.name, candidate)
            if first is candidate:
                continue
            if _reaches(first) == _reaches(candidate):
                forms = (*first.forms, *candidate.forms)
                by_name[candidate.weight.name] = dataclasses.replace(first, forms=forms)
            else:  # timed in one round, all forms must compute the same
                reason = f"its layer ends elsewhere than that of {first.forms[0].lowering.name}"
                declined.append(Declined(lowering.name, candidate.weight.name, reason))
    candidates = list(by_name.values())
    # What one lowering refuses, another may take: then nothing was left alone.
    declined += [place for place in refused if place.place not in by_name]
    nodes = [node for candidate in candidates for layer in candidate.layers for node in layer.nodes]
    known = {value.name or "" for node in nodes for value in node.inputs if value is not None}
    known |= {place.place for place in declined} | {name for c in candidates for name in c.names}
    declined += [Declined("lower", place, reason) for place, reason in left_alone(model, known)]
    return candidates, declined


def _reaches(
    candidate: Candidate,
) -> list[tuple[tuple[str, ...], tuple[ir.Value, ...], tuple[ir.Value, ...]]]:
    """The weights, and from where to where the layers go."""
    return [(candidate.names, layer.inputs, tuple(layer.results)) for layer in candidate.layers]
