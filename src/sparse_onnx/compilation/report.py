"""The report of a compilation, of all that its steps found; :mod:`.report_rows` makes the rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from sparse_onnx import sparse_ops
from sparse_onnx.compilation.give_back import with_pruning
from sparse_onnx.compilation.goals import Gate, goal_document
from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.outcome import Outcome
from sparse_onnx.compilation.prepare import Prepared
from sparse_onnx.compilation.recipe import recipe_document
from sparse_onnx.compilation.report_rows import (
    declined_rows,
    layer_rows,
    summary,
    target_rows,
    untouched_rows,
)
from sparse_onnx.compilation.settle import Settled
from sparse_onnx.compilation.ship import Shipped
from sparse_onnx.compilation.verify import Verified
from sparse_onnx.compilation.write import judged
from sparse_onnx.document import (
    SCHEMA_VERSION,
    LayerRow,
    Nothing,
    ProfileDocument,
    QuantizedRow,
    Report,
    VerificationDocument,
)
from sparse_onnx.model import model_io
from sparse_onnx.model.work import NodeWork
from sparse_onnx.passes.base import Declined, Pipeline
from sparse_onnx.passes.presets import PREPARATION_PASSES
from sparse_onnx.report.environment import environment
from sparse_onnx.running.requests import Phase
from sparse_onnx.timing.profile import time_shares

__all__ = ["Found", "make_report", "profile", "rows"]


@dataclasses.dataclass(frozen=True)
class Found:
    """What the steps of a compilation found; a plan knows the first five.

    Attributes:
        layers: The rows of all layers.
        work: Of all operators.
        declined: What passes left alone.
        gates: The goals.
        quantized: The rows of all weights that are stored as integers.
        targets, weights, phases: The shapes of the inputs at every target, how much it counts, and what a decoder does
            there.
        shipped, verified, outcome: What was written, how far off it is, and what it reached.
        profile: Where the time goes, if that was measured.
    """

    layers: list[LayerRow]
    work: Sequence[NodeWork]
    declined: Sequence[Declined]
    gates: Sequence[Gate]
    quantized: list[QuantizedRow]
    targets: Sequence[Mapping[str, tuple[int, ...]]] = ()
    weights: Sequence[float] | None = None
    phases: Sequence[Phase | None] = ()
    shipped: Shipped | None = None
    verified: Verified | None = None
    outcome: Outcome | None = None
    profile: ProfileDocument | None = None


def rows(
    job: Job,
    prepared: Prepared,
    settled: Settled,
    declined: Sequence[Declined],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    kernels: Mapping[str, str] | None = None,
) -> list[LayerRow]:
    """The layers of the report; in a plan neither ``shapes`` of their inputs nor ``kernels`` are known."""
    back = settled.given_back
    errors = {name: error for name, error in prepared.errors.items() if name not in back}
    held_out = {name: error for name, error in prepared.held_out_errors.items() if name not in back}
    say = job.say if shapes is not None else lambda _line: None
    found = layer_rows(settled.decisions, shapes, prepared.before, errors, held_out, kernels or {}, say)
    return with_pruning(found, prepared.pruned.layers, back, declined)


def profile(
    job: Job, source: Source, inputs: Inputs, shipped: Shipped, layers: Sequence[LayerRow]
) -> ProfileDocument | None:
    """Where the time goes before and after, at the first target; None of models that were not timed, or are too large
    for one session."""
    held = max(model_io.weight_bytes(shipped.model), source.weight_bytes)
    if not shipped.timings or held > source.budget:
        return None
    with job.clock("profile"):
        original = model_io.load_model(source.path)
        Pipeline(PREPARATION_PASSES)(original)  # so that weights have the names that the report has
        weights = [row["name"] for row in layers]
        shares = functools.partial(
            time_shares, weights=weights, feeds=inputs.timed[0], threads=job.threads, work=job.work
        )
        return {"before": shares(original, library=False), "after": shares(shipped.model, library=True)}


def make_report(job: Job, source: Source, found: Found) -> Report:
    """The report, see :mod:`sparse_onnx.document`."""
    recipe, shipped, outcome = job.recipe, found.shipped, found.outcome
    timings = () if shipped is None else shipped.timings
    verification: Nothing | VerificationDocument = {}
    loss = None
    if found.verified is not None:
        verification = found.verified.document()
        loss = verification["against_original"]
    whole = summary(
        found.layers,
        found.work,
        judged(found.weights, timings) if timings else None,
        source.nbytes,
        None if outcome is None else outcome.size,
        loss,
        None if outcome is None else outcome.metric,
    )
    not_together = () if shipped is None else shipped.not_together
    if shipped is not None:
        whole["written"] = shipped.what
    report: Report = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(
            threads=job.target_threads, seed=recipe.calibration.seed, isa=sparse_ops.info().isa
        ),
        "command": job.command,
        "recipe": recipe_document(recipe),
        "source": job.source.name,
        "input_shapes": {name: list(shape) for name, shape in next(iter(found.targets), {}).items()},
        "targets": target_rows(found.targets, found.weights, timings, found.phases),
        "summary": whole,
        "goal": goal_document(found.gates),
        "verification": verification,
        "layers": found.layers,
        "declined": declined_rows((*found.declined, *not_together)),
        "untouched": untouched_rows(found.layers, found.work, found.declined),
        "stages": job.clock.stages,
    }
    if source.converted_from is not None:
        report["converted_from_opset"] = source.converted_from
    if found.quantized:
        report["quantized"] = found.quantized
    if found.profile is not None:
        report["profile"] = found.profile
    return report
