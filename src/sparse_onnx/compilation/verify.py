"""Verify what was written: against the pruned dense model, with the library and without, and against the original."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import onnx_ir as ir

from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.runs import run_all, run_original
from sparse_onnx.compilation.settle import Settled
from sparse_onnx.compilation.ship import Shipped
from sparse_onnx.document import Level, VerificationDocument
from sparse_onnx.errors import VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.passes.calibration import Options as CalibrationOptions
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.running.fix_inputs import fix_inputs
from sparse_onnx.running.runtime import LEVELS, of_our_making, open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification.comparison import Difference, compare
from sparse_onnx.verification.compiler_error import judge
from sparse_onnx.verification.likeness import PROFILE_FILE, profile_of, unlikeness, warn_of
from sparse_onnx.verification.predictions import confirm, find_heads, make_probe

__all__ = ["Verified", "verify"]


@dataclasses.dataclass(frozen=True)
class Verified:
    """How far the written model lies from others: two things, never mixed up.

    Attributes:
        inputs: "generated", or where the real ones came from.
        batches: How many times each model was run.
        compiled, portable: The compiler's error, with the library and without it.
        loss: What was lost against the original.
        left_out: Outputs that were not compared: what they are by their name.
        levels: ONNX Runtime's optimizations with which each model ran.
        rounding: Of stock ONNX Runtime against itself by output, where the compiler's error was large.
        rounded_activations: What the forms that round activations do to the outputs, where there are such: it belongs
            to what is lost, not to the compiler's error.
        unlikeness: Of the data that was measured on to the calibration data, where it is known.
    """

    inputs: str
    batches: int
    compiled: Difference
    portable: Difference
    loss: Difference
    left_out: Mapping[str, str]
    levels: Mapping[str, Level]
    rounding: Mapping[str, float | None]
    rounded_activations: Difference | None
    unlikeness: float | None

    def document(self) -> VerificationDocument:
        """The ``verification`` of a report."""
        document: VerificationDocument = {
            "inputs": self.inputs,
            "batches": self.batches,
            "against_pruned_dense": self.compiled.to_dict(),
            "without_library": self.portable.to_dict(),
            "against_original": self.loss.to_dict(),
        }
        if self.left_out:
            document["left_out"] = dict(self.left_out)
        if {*self.levels.values()} != {LEVELS[0]}:
            document["optimization_levels"] = dict(self.levels)
        if self.rounding:
            document["rounding"] = dict(self.rounding)
        if self.rounded_activations is not None:
            document["rounded_activations"] = self.rounded_activations.to_dict()
        if self.unlikeness is not None:
            document["unlikeness"] = self.unlikeness
        return document


@of_our_making()
def verify(
    job: Job,
    source: Source,
    inputs: Inputs,
    shipped: Shipped,
    dense: ir.Model,
    level: Level,
    settled: Settled,
) -> Verified:
    """Hold what was written against ``dense``, the pruned dense model, which ran at this optimization ``level``, and,
    if it was changed at all, against the original, which is run if it was not yet. Where forms round activations, its
    exact twin is held against ``dense``."""
    samples, original, optimized = inputs.samples, settled.original, shipped.model
    expected = settled.outputs
    if shipped.is_packed:  # nothing was compiled: the original is what it is held to
        original = original or run_original(source, samples)
        expected, dense = original.outputs, optimized
    twin = exact_twin(optimized)
    exact, path = (optimized, job.written) if twin is None else (twin, None)
    levels: dict[str, Level] = {"pruned_dense": level}
    levels |= {} if original is None else {"original": original.level}
    heads = find_heads(optimized)
    probe = None if inputs.generated else make_probe(heads, samples[0])
    with open_runner(optimized, source.bench, job.written, library=True) as runner:
        ours = run_all(runner, samples, "with the library", job.say)
        heads = confirm(heads, probe, ours[0], {} if probe is None else runner.run(probe.feeds))
        levels["with_library"] = runner.level
    outputs = ours
    if twin is not None:
        with open_runner(twin, source.bench, library=True) as runner:
            outputs = run_all(runner, samples, "with exact activations", job.say)
    compiled = compare(expected, outputs, () if shipped.changed else heads, samples)
    job.say("on standard operators only")
    with open_runner(exact, source.bench, path, library=False, lean=True) as runner:
        portable = compare(expected[:1], [runner.run(samples[0])])
        levels["without_library"] = runner.level
    rounding = _judge(job, source.bench, inputs, dense, exact, {True: compiled, False: portable})
    loss = compiled
    if shipped.changed:
        original = original or run_original(source, samples)
        levels["original"] = original.level
        loss = compare(original.outputs, ours, heads, samples)
    return Verified(
        "generated" if inputs.generated else ", ".join(job.recipe.calibration.sources),
        len(samples),
        compiled,
        portable,
        loss,
        source.left_out,
        levels,
        rounding,
        None if twin is None else compare(outputs, ours, heads, samples),
        _unlikeness(job, source, inputs),
    )


def _unlikeness(job: Job, source: Source, inputs: Inputs) -> float | None:
    """How unlike the data that is measured on is to the calibration data, whose profile goes beside the model."""
    if inputs.calibration is None:
        return None
    original = model_io.load_model(source.path)
    fix_inputs(original, source.specs)
    options = inputs.calibration.options or CalibrationOptions()
    profile = functools.partial(profile_of, original, options=options, work=job.work, progress=job.say)
    known = profile(inputs.calibration.samples)
    known.save(job.folder / PROFILE_FILE)
    found = None if inputs.held_out is None else unlikeness(known, profile(inputs.held_out, like=known))
    warn_of(found, "the data that the result is measured on", job.say)
    return found


def _judge(
    job: Job,
    bench: Workbench,
    inputs: Inputs,
    dense: ir.Model,
    optimized: ir.Model,
    found: Mapping[bool, Difference],
) -> dict[str, float | None]:
    """What rounding does to the outputs, where the differences ``found`` with the library and without it are large.
    Raises VerificationError where it does not explain them."""
    rounding: dict[str, float | None] = {}
    for library, difference in found.items():
        what = "with the library" if library else "without it"
        judged = judge(
            dense,
            optimized,
            inputs.samples if library else inputs.samples[:1],
            difference,
            bench,
            threshold=job.recipe.goal.max_compiler_error,
            library=library,
        )
        if judged.at_fault:
            raise VerificationError(
                f"the compiled model, run {what}, differs from the pruned dense one: {judged.describe()}"
            )
        rounding |= judged.rounding_document()
        if judged.rounding:
            job.say(
                f"note: run {what}, the compiled model differs by what rounding explains: {judged.describe()}"
            )
    return rounding
