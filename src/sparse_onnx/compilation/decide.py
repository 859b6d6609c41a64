"""Fuse a prepared model, and decide in which form every layer ships."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.compilation.groups import FLOAT32
from sparse_onnx.compilation.job import Job
from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import Selection, find_weights
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
    job: Job,
    fused: Fused,
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    packer: Packer,
    bench: Bench,
    weights: Sequence[float] | None,
) -> list[Decision]:
    """By the times of every layer here in all its forms, or by a timing table; ``shapes`` are those of the layers'
    inputs at every target, ``weights`` how much these count."""
    allowed = _allowed(job, fused)
    candidates = _with_float_inputs(fused, job.recipe.target.float_inputs)
    with job.clock("decide"), of_our_making():
        if job.benchmark:
            return choose.decide(
                fused.model, candidates, shapes, packer, bench, weights=weights, allowed=allowed
            )
        return choose.decide_by_table(
            candidates,
            job.table,
            shapes,
            weights=weights,
            min_speedup=bench.min_speedup,
            allowed=allowed,
        )


def _with_float_inputs(fused: Fused, entries: tuple[str, ...]) -> list[Candidate]:
    """The candidates, those that ``entries`` choose without forms that round all of an input with one scale.

    Raises UsageError for an entry that chooses nothing.
    """
    if not entries:
        return list(fused.candidates)
    chosen = Selection(entries, ())
    for entry in chosen.unmatched(find_weights(fused.model, encoded=True)[0]):
        raise UsageError(
            f"target.float_inputs: {entry!r} matches no weight, node, module or op type of a layer"
        )
    return [
        dataclasses.replace(candidate, forms=tuple(form for form in candidate.forms if not form.is_coarse))
        if chosen.reason_against(candidate.weight) is None
        else candidate
        for candidate in fused.candidates
    ]


def _allowed(job: Job, fused: Fused) -> set[str]:
    """The forms that may change numbers: all, where the recipe allows another arithmetic than that of floats."""
    if job.recipe.target.precision == FLOAT32:
        return set()
    return {form.name for candidate in fused.candidates for form in candidate.forms if not form.exact}


def decide_unseen(fused: Fused) -> tuple[Decision, ...]:
    """By the zeros alone, in a plan."""
    return tuple(choose.decide_by_table(fused.candidates))
