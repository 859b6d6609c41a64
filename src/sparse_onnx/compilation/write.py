"""Write a model with its layers in their forms, and time the whole against the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.whole_model import Variant, choose_variant, settle
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import Declined, PassContext
from sparse_onnx.passes.lower.guard import Guard
from sparse_onnx.passes.lower.layers import lower_layers
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.running.runtime import of_our_making
from sparse_onnx.timing.cache import file_digest
from sparse_onnx.timing.choose import Bench, Decision, lowered
from sparse_onnx.timing.models import time_models
from sparse_onnx.timing.rounds import Ratio, overall

__all__ = ["Lowered", "Writer", "Written", "judged", "lower", "time_whole"]


@dataclasses.dataclass(frozen=True)
class Written:
    """A model as it was written, and the layers that could not be merged or fused."""

    model: ir.Model
    not_together: tuple[Declined, ...]


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes ``model``, which stays as it is, with its layers in the forms that are decided for. Operators that could
    be one stay apart where the ``guard`` says so."""

    job: Job
    model: ir.Model
    packer: Packer
    context: PassContext
    guard: Guard | None = None

    def __call__(self, decisions: Sequence[Decision]) -> Written:
        with self.job.clock("lower and write"):
            chosen = lowered(decisions)
            written = Written(*lower_layers(self.model, chosen, self.packer, self.context, self.guard))
            model_io.save_model(written.model, self.job.folder)
        return written


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The variant that ships, as it was ``written``: its ``decisions``, and ``timings`` of the whole at every target,
    empty where it was not timed."""

    written: Written
    decisions: tuple[Decision, ...]
    timings: tuple[Ratio, ...]


def lower(
    job: Job,
    source: Source,
    inputs: Inputs,
    write: Writer,
    decisions: Sequence[Decision],
    bench: Bench,
    *,
    smaller: bool,
) -> Lowered:
    """Write the model with its layers in the chosen forms, or fewer where that is surely better. ``smaller`` says that
    structures were removed, so that it is worth timing with dense layers, too."""
    made: list[tuple[Written, Variant]] = []

    def attempt(decided: Sequence[Decision]) -> Variant:
        written = write(decided)
        variant = Variant(tuple(decided))
        if job.benchmark and (variant.lowered or smaller):
            with job.clock("time the whole model"):
                timings = settle(
                    lambda: time_whole(written.model, job, source, inputs),
                    lambda found: judged(inputs.weights, found),
                    progress=job.say,
                )
            known = _as_before(job, source, inputs.targets, timings, bench)
            variant = Variant(variant.decisions, tuple(timings), judged(inputs.weights, known))
        made[:] = [(written, variant)]
        return variant

    chosen = choose_variant(decisions, attempt, progress=job.say)
    ((written, last),) = made
    if chosen is not last:
        written = write(chosen.decisions)
    return Lowered(written, chosen.decisions, chosen.timings)


@of_our_making()
def time_whole(optimized: ir.Model, job: Job, source: Source, inputs: Inputs) -> list[Ratio]:
    """The original against what was written, interleaved, at every target."""
    original = model_io.load_model(source.path)
    pair: list[tuple[ir.Model, Path]] = [(original, source.path), (optimized, job.written)]
    return time_models(pair, inputs.timed, source.bench)


def judged(weights: Sequence[float] | None, timings: Sequence[Ratio]) -> Ratio:
    """What the targets come to: their mean by ``weights``, or the worst."""
    return overall(timings, weights)[0]


def _as_before(
    job: Job,
    source: Source,
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    timings: Sequence[Ratio],
    bench: Bench,
) -> list[Ratio]:
    """``timings`` of the whole model. Those that cannot tell faster from slower are replaced by what an earlier run
    measured of the same two models, so that it is not decided otherwise for nothing."""
    models = [file_digest(path) for path in (source.path, job.written)]
    values = {spec.name: spec.value for spec in source.specs if spec.value is not None}
    settled = []
    for shapes, timing in zip(targets, timings, strict=True):
        key = {"models": models, "inputs": shapes, "values": values} | bench.environment
        known = bench.cache.get(key)
        if known is not None and (timing.close_to(1) or not timing.quiet):
            settled.append(known)
        else:
            bench.cache.put(key, timing)
            settled.append(timing)
    return settled
