"""Fuse a prepared model, and decide in which form every layer ships."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.compilation.job import Job
from sparse_onnx.passes.base import Declined, PassContext, Pipeline
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.presets import FUSION_PASSES
from sparse_onnx.running.runtime import of_our_making
from sparse_onnx.timing import choose
from sparse_onnx.timing.choose import Bench, Decision

__all__ = ["Fused", "decide", "decide_unseen", "fuse"]


@dataclasses.dataclass(frozen=True)
class Fused:
    """A model with what lies between its linears fused: its ``candidates`` are the layers that kernels could take,
    ``declined`` what was left alone."""

    model: ir.Model
    candidates: tuple[Candidate, ...]
    declined: tuple[Declined, ...]


def fuse(model: ir.Model, context: PassContext) -> Fused:
    """Fuse ``model`` in place."""
    fused = Pipeline(FUSION_PASSES)(model, context)
    candidates, left = find_candidates(model)
    return Fused(model, tuple(candidates), (*fused.declined, *left))


def decide(
    job: Job, fused: Fused, shapes: Sequence[Mapping[str, tuple[int, ...]]], packer: Packer, bench: Bench
) -> list[Decision]:
    """By the times of every layer here in all its forms, or by a timing table; ``shapes`` are those of the layers'
    inputs at every target."""
    weights = job.recipe.target.weights
    with job.clock("decide"), of_our_making():
        if job.benchmark:
            return choose.decide(fused.model, fused.candidates, shapes, packer, bench, weights=weights)
        return choose.decide_by_table(
            fused.candidates, job.table, shapes, weights=weights, min_speedup=bench.min_speedup
        )


def decide_unseen(fused: Fused) -> tuple[Decision, ...]:
    """By the zeros alone, in a plan."""
    return tuple(choose.decide_by_table(fused.candidates))
