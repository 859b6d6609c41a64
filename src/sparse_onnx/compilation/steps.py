"""The steps of one compilation: load, clean up, prune, decide layer by layer, lower, write, time, fall back, verify."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sparse_onnx import sparse_ops
from sparse_onnx.compilation.give_back import Originals, exchange, keeping_zeros, with_pruning, without_zeros
from sparse_onnx.compilation.goals import Gate, gates, goal_document
from sparse_onnx.compilation.recipe import Recipe, recipe_document
from sparse_onnx.compilation.report_rows import (
    kernel_names,
    layer_rows,
    quantized_rows,
    summary,
    target_rows,
    untouched_rows,
)
from sparse_onnx.compilation.whole_model import Variant, choose_variant, exit_code, settle
from sparse_onnx.compilation.worth_pruning import (
    below_break_even,
    measured_curves,
    prunes,
    tabulated_curves,
    without_kernel,
)
from sparse_onnx.data import inputs
from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples, open_samples
from sparse_onnx.errors import GoalNotMetError, UsageError, VerificationError
from sparse_onnx.exporter.source import source_file
from sparse_onnx.model import model_io
from sparse_onnx.model.opset_conversion import converted_from, refusal
from sparse_onnx.model.probe import shapes_in, with_shape_outputs
from sparse_onnx.model.quantized_weights import QuantizedWeight, quantized_weights
from sparse_onnx.model.work import NodeWork, Work
from sparse_onnx.passes.base import CalibrationData, Declined, PassContext, PassResult, Pipeline, Stage
from sparse_onnx.passes.calibration import Options as CalibrationOptions
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.layers import lower_layers
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.presets import FUSION_PASSES, PREPARATION_PASSES
from sparse_onnx.progress import Progress
from sparse_onnx.report.environment import SCHEMA_VERSION, environment
from sparse_onnx.running.fix_inputs import fix_inputs
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.input_choice import Choice, choose_inputs, explaining_guesses
from sparse_onnx.running.outputs import check_outputs, left_out
from sparse_onnx.running.runtime import LEVELS, Runner, of_our_making, open_runner, session_budget
from sparse_onnx.running.session import import_onnxruntime
from sparse_onnx.running.stages import StageClock
from sparse_onnx.timing import choose
from sparse_onnx.timing.cache import TimingCache, file_digest
from sparse_onnx.timing.choose import Decision, lowered
from sparse_onnx.timing.models import time_models
from sparse_onnx.timing.profile import time_shares
from sparse_onnx.timing.rounds import Ratio, overall
from sparse_onnx.timing.table import TimingTable
from sparse_onnx.units import format_error
from sparse_onnx.verification.comparison import compare
from sparse_onnx.verification.compiler_error import judge
from sparse_onnx.verification.layer_errors import layer_errors
from sparse_onnx.verification.metrics import Metric, MetricResult, open_metric
from sparse_onnx.verification.predictions import confirm, find_heads, make_probe
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR

__all__ = ["Compilation"]

_MAX_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was done before layers are decided on: cleaning up, structured ``removed`` parts, weights ``pruned`` and
    ``quantized``; and the weights as they were before they were pruned, but for those that were quantized."""

    cleaned: PassResult
    removed: PassResult
    pruned: PassResult
    quantized: PassResult
    originals: Originals


class Compilation:
    """One compilation: the state that its steps share."""

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        benchmark: bool,
        say: Callable[[str], None],
        folder: Path,
        work: Path,
        command: str,
        cache: Path | None = None,
        table: TimingTable | None = None,
        threads: int | None = None,
        after: Callable[[str, ir.Model], None] = lambda _name, _model: None,
    ) -> None:
        self.after = after
        self.source, self.recipe, self.benchmark = source, recipe, benchmark
        self.folder, self.work, self.command = folder, work, command
        self.clock = StageClock(say)
        self.say = self.clock.say
        self.threads = threads or recipe.target.threads or available_cores()
        self.declined: list[Declined] = []
        self.path = source
        self.targets: list[dict[str, tuple[int, ...]]] = []
        self.choices: list[Choice] = []
        self.cache, self.table = cache, table
        self.calibration: CalibrationData | None = None
        self.held_out: Samples | None = None
        self.metric_samples: Samples | None = None
        self.converted_from: int | None = None
        self.left_out: Mapping[str, str] = {}
        self.levels: dict[str, str] = {}
        self.errors: dict[str, float | None] = {}
        self.held_out_errors: dict[str, float] = {}
        self.node_work: tuple[NodeWork, ...] = ()
        self.quantized: Sequence[QuantizedWeight] = ()
        self.given_back: Collection[str] = ()
        self.not_together: Sequence[Declined] = ()
        self._original_outputs: list[Feeds] | None = None

    # -- steps ------------------------------------------------------------------------------------------------

    def load(self) -> ir.Model:
        self.path = source_file(self.source, self.work, self.say)
        model, target = model_io.load_model(self.path), self.recipe.target
        self.converted_from = converted_from(model, self.say)
        check_outputs(model, self.say)
        self.left_out = left_out(model)
        self.specs = inputs.input_specs(model, target.input_values, target.fixed_inputs)
        self.fixed = fix_inputs(model, self.specs)
        return model

    def prove_conversion(self, model: ir.Model, feeds: Feeds) -> None:
        """That ``model``, if it was converted, computes what its file does. Raises ModelFileError if not."""
        if self.converted_from is None:
            return
        with self.clock("prove the conversion"):
            with self.open(model, self.path, library=False) as runner:
                expected = runner.run(feeds)
            try:
                with self.open(model, None, library=False) as runner:
                    found = compare([expected], [runner.run(feeds)])
            except UsageError as error:
                raise refusal(self.path, self.converted_from, str(error)) from error
        if not found.relative_error <= MAX_COMPILER_ERROR:
            reason = f"converted, it computes another {found.worst_output}: relative error {found.relative_error:.2e}"
            raise refusal(self.path, self.converted_from, reason)

    def prepare(
        self, model: ir.Model, pipeline: Pipeline, context: PassContext, bench: choose.Bench | None = None
    ) -> Prepared:
        """Clean up, remove structures, and prune what can pay; ``declined`` collects what was left alone."""
        cleaned = Pipeline(PREPARATION_PASSES)(model, context)
        self.before = {name: value.const_value for name, value in model.graph.initializers.items()}
        dense = model.clone() if self.held_out is not None else None
        removing, pruning, quantizing, others = (
            Pipeline(tuple(step for step in pipeline.passes if first <= step.stage < end))
            for first, end in itertools.pairwise(
                (Stage.CLEAN, Stage.PRUNE, Stage.QUANTIZE, Stage.FUSE, math.inf)
            )
        )
        removed = removing(model, context)
        originals = Originals.of(model)
        spared = self.spared(model, pruning, bench)
        pruned = pruning(model, dataclasses.replace(context, spared=spared))
        exact = Originals.of(model)
        quantized = quantizing(model, context)
        originals = originals.without(state.name for state in exact.changed(model))
        rest = others(model, context)
        if dense is not None:
            self.held_out_errors = self.errors_on_held_out(dense, model, pipeline)
        for result in (cleaned, removed, pruned, quantized, rest):
            self.declined += result.declined
        self.errors = {change.name: change.error for change in pruned.layers}
        self.quantized = quantized_weights(model)
        return Prepared(cleaned, removed, pruned, quantized, originals)

    def spared(self, model: ir.Model, pruning: Pipeline, bench: choose.Bench | None) -> dict[str, str]:
        """The weights that are not to be pruned, since it would gain nothing, with the reasons."""
        if self.recipe.goal.keep_pruned or not prunes(pruning.passes):
            return {}
        spared = without_kernel(model)
        table, curves_of = self.table, None
        if self.benchmark and bench is not None:
            curves_of = measured_curves(model, bench)
        elif table is not None:
            curves_of = tabulated_curves(table)
        if curves_of is not None:
            spared |= below_break_even(
                model,
                pruning.passes,
                self.run_dense(model, find_candidates(model)[0], ())[1],
                curves_of,
                weights=self.recipe.target.weights,
                min_speedup=self.recipe.goal.min_speedup,
                progress=self.say,
            )
        return spared

    def errors_on_held_out(self, dense: ir.Model, pruned: ir.Model, pipeline: Pipeline) -> dict[str, float]:
        """Of every pruned layer, on inputs such as its method saw."""
        assert self.held_out is not None
        assert self.calibration is not None
        behind_pruned = any(modifier.sees_pruned_inputs for modifier in pipeline.passes)
        try:
            return layer_errors(
                dense,
                pruned,
                self.held_out,
                self.calibration.options,
                work=self.work,
                behind_pruned=behind_pruned,
                progress=self.say,
            )
        except UsageError as error:  # of the data: no reason to lose what was pruned
            self.say(f"warning: no errors on held-out data: {error}")
            return {}

    def fuse(self, model: ir.Model, context: PassContext) -> list[Candidate]:
        """Fuse what lies between the linears; returns the layers that kernels could take."""
        fused = Pipeline(FUSION_PASSES)(model, context)
        candidates, left = find_candidates(model)
        self.declined += [*fused.declined, *left]
        return candidates

    def plan(self, pipeline: Pipeline) -> dict[str, Any]:
        with self.clock("load"):
            model = self.load()
        self.nbytes = model_io.file_bytes(self.path, model)
        with model_io.Spool(self.work) as spool, self.clock("prune"):
            context = PassContext(spool.put, self.say)
            prepared = self.prepare(model, _planned(pipeline), context)
            shapes = choose_inputs(model, self.specs, self.recipe.target.all_shapes[0], ()).shapes
            self.node_work = Work(model, shapes).count()
            candidates = self.fuse(model, context)
            # What stays dense is not known before it is timed: nothing is given back.
            layers = self.rows(choose.decide_by_table(candidates), None, prepared, {})
        found = gates(self.recipe.goal, drop=None, speedup=None, bytes_before=self.nbytes, bytes_after=None)
        return self.report(None, [], layers, {}, found)

    def compile(self, pipeline: Pipeline) -> tuple[int, dict[str, Any]]:
        import_onnxruntime()  # what is missing is better known now than after minutes
        sparse_ops.info()
        with self.clock("load"):
            model = self.load()
        self.nbytes = model_io.file_bytes(self.path, model)
        self.weight_bytes = model_io.weight_bytes(model)
        self.budget = session_budget(self.weight_bytes)
        self.open = functools.partial(
            open_runner, threads=self.threads, budget=self.budget, work=self.work, progress=self.say
        )
        samples, self.feeds = self.inputs(model, pipeline)
        self.prove_conversion(model, samples[0])
        metric = self.metric(model)
        bench = self.bench()
        with model_io.Spool(self.work) as spool:
            context = PassContext(spool.put, self.say, self.calibration, after=self.after)
            with self.clock("prune"):
                prepared = self.prepare(model, pipeline, context, bench)
                candidates = find_candidates(model)[0]
            with self.clock("run dense"):
                reference, shapes = self.run_dense(model, candidates, samples)
                unfused = model.clone()
            with self.clock("fuse"):
                candidates = self.fuse(model, context)
            packer = Packer(context)
            with self.clock("decide"), of_our_making():
                if self.benchmark:
                    weights = self.recipe.target.weights
                    decisions = choose.decide(
                        model, candidates, shapes, packer, bench, weights=weights, progress=self.say
                    )
                else:
                    decisions = choose.decide_by_table(
                        candidates,
                        self.table,
                        shapes,
                        weights=self.recipe.target.weights,
                        min_speedup=self.recipe.goal.min_speedup,
                    )
            optimized, variant = self.lower(model, decisions, packer, context, bench, prepared)
            with self.clock("give back"):
                decisions, exchanged = self.give_back(
                    [model, unfused], variant.decisions, prepared, samples, reference
                )
            timings = list(variant.timings)
            zeros = bool(prepared.originals.changed(model))
            gained = any(decision.lowered for decision in decisions) or prepared.removed.modified
            if exchanged is not None:
                reference = exchanged
                optimized = self.write(model, decisions, packer, context)
            rewritten = bool(self.fixed) or prepared.quantized.modified
            unchanged = not gained and not zeros and not rewritten
            if unchanged:
                # The model as it was, not even cleaned.
                optimized, timings = model_io.load_model(self.path), []
                model_io.save_model(optimized, self.folder)
            with self.clock("verify"):
                changed = zeros or prepared.removed.modified or prepared.cleaned.modified or rewritten
                verification = self.verify(optimized, unfused, samples, reference, changed)
            with self.clock("compare weights"):
                kernels = kernel_names(optimized, shapes[0])
                layers = self.rows(decisions, shapes[0], prepared, kernels)
            profile = self.profile(optimized, [row["name"] for row in layers]) if timings else None
        measured = None
        if metric is not None:
            with self.clock("measure the metric"):
                measured = metric.compare(self.written, threads=self.threads)
        drop = 1 - verification["against_original"]["cosine"] if measured is None else measured.drop
        # The same model has the same size, however its file was laid out.
        written = model_io.load_model(self.written)
        size = self.nbytes if unchanged else model_io.file_bytes(self.written, written)
        found = gates(
            self.recipe.goal,
            drop=drop,
            metric=measured,
            speedup=self.overall(timings).median if timings else None,
            bytes_before=self.nbytes,
            bytes_after=size,
        )
        if not all(gate.met for gate in found):
            code = GoalNotMetError.exit_code
        else:
            code = exit_code(self.overall(timings) if timings else None, gained=gained)
        report = self.report(size, timings, layers, verification, found, measured)
        report["summary"]["written"] = (
            "original" if unchanged else "pruned" if zeros and not gained else "compiled"
        )
        return code, report if profile is None else {**report, "profile": profile}

    def profile(self, optimized: ir.Model, weights: Sequence[str]) -> dict[str, Any] | None:
        """Where the time goes before and after, at the first target; None of models too large for one session."""
        if max(model_io.weight_bytes(optimized), self.weight_bytes) > self.budget:
            return None
        with self.clock("profile"):
            original = model_io.load_model(self.path)
            Pipeline(PREPARATION_PASSES)(original)  # so that weights have the names that the report has
            shares = functools.partial(
                time_shares, weights=weights, feeds=self.feeds[0], threads=self.threads, work=self.work
            )
            return {"before": shares(original, library=False), "after": shares(optimized, library=True)}

    def metric(self, original: ir.Model) -> Metric | None:
        """The metric that the goal names, measured of the original; None if it names none."""
        goal, calibration = self.recipe.goal, self.recipe.calibration
        if goal.metric is None:
            return None
        if goal.metric_data is not None:
            self.metric_samples = open_samples(
                goal.metric_data,
                self.specs,
                batch=calibration.batch_size,
                tokenizer=calibration.tokenizer,
                labels=goal.labels,
            )
        with self.clock("measure the metric of the original"):
            return open_metric(
                goal.metric,
                original,
                list(self.metric_samples or ()),
                labels=goal.labels,
                output=goal.metric_output,
                threads=self.threads,
            )

    def bench(self) -> choose.Bench:
        cache = TimingCache(self.cache if self.benchmark else None, self.say)
        return choose.Bench(self.threads, self.work, cache, self.recipe.goal.min_speedup)

    def inputs(self, model: ir.Model, pipeline: Pipeline) -> tuple[list[Feeds], list[Feeds]]:
        """Batches to verify with (real ones if given), and those to time with, one for each target. Where the pipeline
        needs real inputs, most of them are for that, and an eighth is held out to verify with."""
        specs, calibration = self.specs, self.recipe.calibration
        samples: list[Feeds] = []
        if calibration.data is not None:
            goal = self.recipe.goal
            labels = goal.labels if goal.metric_data is None else None
            labelled = open_samples(
                calibration.data,
                specs,
                limit=calibration.num_calibration_samples,
                batch=calibration.batch_size,
                tokenizer=calibration.tokenizer,
                labels=labels,
            )
            known = labelled if labels is None else labelled.without(labels)
            held, self.metric_samples = known, labelled
            if any(modifier.needs_calibration for modifier in pipeline.passes):
                kept = len(known) - max(1, len(known) // 8) if len(known) > 1 else 1
                self.calibration = CalibrationData(
                    known.part(0, kept),
                    self.work,
                    CalibrationOptions(mask=calibration.padding_mask, threads=self.threads),
                    None if calibration.statistics is None else Path(calibration.statistics),
                    None if calibration.checkpoint is None else Path(calibration.checkpoint),
                )
                if len(known) > 1:
                    held, self.metric_samples = (x.part(kept, len(known)) for x in (known, labelled))
                if held is known:
                    self.say(
                        "warning: one batch only: the result is measured on the data that it was made with"
                    )
            for feeds in held:
                samples.append(feeds)
                if sum(inputs.sample_count(batch, specs) for batch in samples) >= _MAX_SAMPLES:
                    break
            if self.calibration is not None and held is not known:
                self.held_out = held.part(0, len(samples))
        given = self.recipe.target.all_shapes
        first = [next(iter(known))] if samples else []
        self.choices = [choose_inputs(model, specs, shapes, first) for shapes in given]
        self.targets = [choice.shapes for choice in self.choices]
        for line in dict.fromkeys(
            line for choice in self.choices for line in choice.notes("to decide for another")
        ):
            self.say(f"note: {line}")
        self.generated = not samples
        timed = [choice.feeds(calibration.seed) for choice in self.choices]
        return samples or timed, timed

    def run_dense(
        self, model: ir.Model, candidates: Sequence[Candidate], samples: Sequence[Feeds]
    ) -> tuple[list[Feeds], list[dict[str, tuple[int, ...]]]]:
        """Outputs of the pruned dense model on the samples, and the shapes of all layers' inputs at each target."""
        layers = [layer for candidate in candidates for layer in candidate.layers]
        names = {value.name or "" for layer in layers for value in layer.inputs}
        work = Work(model, {name: array.shape for name, array in self.feeds[0].items()})
        names |= work.unknown()
        with self.open(with_shape_outputs(model, names), None, library=False) as runner:
            self.say("running the dense model")
            with explaining_guesses(self.choices):
                timed = [shapes_in(runner.run(feeds)) for feeds in self.feeds]
            self.node_work = work.count(timed[0][1])
            outputs = [] if self.generated else self.run_all(runner, samples, "batch")
            outputs = [shapes_in(output)[0] for output in outputs]
            self.levels["pruned_dense"] = runner.level
        return outputs or [output for output, _ in timed], [shapes for _, shapes in timed]

    def lower(
        self,
        model: ir.Model,
        decisions: Sequence[Decision],
        packer: Packer,
        context: PassContext,
        bench: choose.Bench,
        prepared: Prepared,
    ) -> tuple[ir.Model, Variant]:
        """Write the model with its layers in the chosen forms, or fewer where that is surely better."""
        made: list[tuple[ir.Model, Variant]] = []

        def attempt(decided: Sequence[Decision]) -> Variant:
            optimized = self.write(model, decided, packer, context)
            variant = Variant(tuple(decided))
            if self.benchmark and (variant.lowered or prepared.removed.modified):
                with self.clock("time the whole model"):
                    timings = settle(lambda: self.time_whole(optimized), self.overall, progress=self.say)
                judged = self.overall(self.as_before(timings, bench))
                variant = Variant(variant.decisions, tuple(timings), judged)
            made[:] = [(optimized, variant)]
            return variant

        chosen = choose_variant(decisions, attempt, progress=self.say)
        ((optimized, last),) = made
        if chosen is not last:
            optimized = self.write(model, chosen.decisions, packer, context)
        return optimized, chosen

    def write(
        self, model: ir.Model, decisions: Sequence[Decision], packer: Packer, context: PassContext
    ) -> ir.Model:
        """A copy of ``model`` with its layers in the chosen forms, as it was written."""
        with self.clock("lower and write"):
            optimized, self.not_together = lower_layers(model, lowered(decisions), packer, context)
            model_io.save_model(optimized, self.folder)
        return optimized

    def give_back(
        self,
        models: Sequence[ir.Model],
        decisions: Sequence[Decision],
        prepared: Prepared,
        samples: Sequence[Feeds],
        reference: Sequence[Feeds],
    ) -> tuple[list[Decision], list[Feeds] | None]:
        """Give weights that stay dense their originals back, in ``models``, copies of one another, if the outputs are
        nearer to the original's then. Where that was done, also the new outputs of the last model on ``samples``;
        ``reference`` are those before."""
        kept = {name for decision in decisions if decision.lowered for name in decision.candidate.names}
        states = prepared.originals.changed(models[0], prepared.pruned.layers, kept)
        if self.recipe.goal.keep_pruned or not states:
            return list(decisions), None
        names = {state.name for state in states}
        zeros = exchange(models, states)
        with self.open(models[-1], None, library=False) as runner:
            outputs = self.run_all(runner, samples, "with original weights where dense")
        if (kept or prepared.removed.modified) and not self.generated:
            original = self.original_outputs(samples)
            before, after = (compare(original, x).relative_error for x in (reference, outputs))
            if before < after:  # later layers were solved for the pruned ones before them
                exchange(models, zeros)
                why = (
                    f"the whole is nearer to the original with them ({format_error(before)} instead of "
                    f"{format_error(after)})"
                )
                self.say(f"note: layers that stay dense keep their zeros: {why}")
                return keeping_zeros(decisions, names, why), None
        self.given_back = names
        return without_zeros(decisions, names), outputs

    def original_outputs(self, samples: Sequence[Feeds]) -> list[Feeds]:
        """Of the original, run once."""
        if self._original_outputs is None:
            original = model_io.load_model(self.path)
            with self.open(original, self.path, library=False) as runner:
                self._original_outputs = self.run_all(runner, samples, "the original")
                self.levels["original"] = runner.level
        return self._original_outputs

    def rows(
        self,
        decisions: Sequence[Decision],
        shapes: Mapping[str, tuple[int, ...]] | None,
        prepared: Prepared,
        kernels: Mapping[str, str],
    ) -> list[dict[str, Any]]:
        """The layers of the report."""
        errors = {name: error for name, error in self.errors.items() if name not in self.given_back}
        held_out = {n: error for n, error in self.held_out_errors.items() if n not in self.given_back}
        say = self.say if shapes is not None else lambda _line: None
        rows = layer_rows(decisions, shapes, self.before, errors, held_out, kernels, say)
        return with_pruning(rows, prepared.pruned.layers, self.given_back, self.declined)

    def overall(self, timings: Sequence[Ratio]) -> Ratio:
        """What the targets come to: their weighted mean, or the worst."""
        return overall(timings, self.recipe.target.weights)[0]

    def as_before(self, timings: Sequence[Ratio], bench: choose.Bench) -> list[Ratio]:
        """``timings`` of the whole model. Those that cannot tell faster from slower are replaced by what an earlier run
        measured of the same two models, so that it is not decided otherwise for nothing."""
        models = [file_digest(path) for path in (self.path, self.written)]
        settled = []
        for shapes, timing in zip(self.targets, timings, strict=True):
            values = {spec.name: spec.value for spec in self.specs if spec.value is not None}
            key = {"models": models, "inputs": shapes, "values": values} | bench.environment
            known = bench.cache.get(key)
            if known is not None and (timing.close_to(1) or not timing.quiet):
                settled.append(known)
            else:
                bench.cache.put(key, timing)
                settled.append(timing)
        return settled

    @of_our_making()
    def time_whole(self, optimized: ir.Model) -> list[Ratio]:
        """The original against what was written, interleaved, at every target."""
        original = model_io.load_model(self.path)
        return time_models(
            [(original, self.path), (optimized, self.written)],
            self.feeds,
            threads=self.threads,
            budget=self.budget,
            work=self.work,
            progress=self.say,
        )

    @property
    def written(self) -> Path:
        return self.folder / "model.onnx"

    @of_our_making()
    def verify(
        self,
        optimized: ir.Model,
        dense: ir.Model,
        samples: Sequence[Feeds],
        reference: Sequence[Feeds],
        changed: bool,
    ) -> dict[str, Any]:
        """Compiler correctness, with and without the library, and compression loss: two things, never mixed up.
        ``reference`` are the outputs of ``dense`` on the samples."""
        heads = find_heads(optimized)
        probe = None if self.generated else make_probe(heads, samples[0])
        with self.open(optimized, self.written, library=True) as runner:
            ours = self.run_all(runner, samples, "with the library")
            heads = confirm(heads, probe, ours[0], {} if probe is None else runner.run(probe.feeds))
            self.levels["with_library"] = runner.level
        compiled = compare(reference, ours, () if changed else heads, samples)
        self.say("on standard operators only")
        with self.open(optimized, self.written, library=False, lean=True) as runner:
            portable = compare(reference[:1], [runner.run(samples[0])])
            self.levels["without_library"] = runner.level
        rounding: dict[str, float | None] = {}
        for what, difference, batches in (
            ("with the library", compiled, samples),
            ("without it", portable, samples[:1]),
        ):
            judged = judge(
                dense,
                optimized,
                batches,
                difference,
                threshold=self.recipe.goal.max_compiler_error,
                library=what == "with the library",
                threads=self.threads,
                work=self.work,
                progress=self.say,
            )
            if judged.at_fault:
                raise VerificationError(
                    f"the compiled model, run {what}, differs from the pruned dense one: {judged.describe()}"
                )
            rounding |= judged.rounding_document()
            if judged.rounding:
                self.say(
                    f"note: run {what}, the compiled model differs by what rounding explains: {judged.describe()}"
                )
        loss = compare(self.original_outputs(samples), ours, heads, samples) if changed else compiled
        return {
            "inputs": "generated" if self.generated else str(self.recipe.calibration.data),
            "batches": len(samples),
            "against_pruned_dense": compiled.to_dict(),
            "without_library": portable.to_dict(),
            "against_original": loss.to_dict(),
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
            **({} if {*self.levels.values()} == {LEVELS[0]} else {"optimization_levels": self.levels}),
            **({"rounding": rounding} if rounding else {}),
        }

    def run_all(self, runner: Runner, samples: Sequence[Feeds], what: str) -> list[Feeds]:
        """The outputs of every batch."""
        steps = Progress(self.say, what, len(samples))
        outputs = []
        for feeds in samples:
            outputs.append(runner.run(feeds))
            steps.step()
        return outputs

    # -- report -----------------------------------------------------------------------------------------------

    def report(
        self,
        size: int | None,
        timings: Sequence[Ratio],
        layers: list[dict[str, Any]],
        verification: dict[str, Any],
        found: Sequence[Gate],
        metric: MetricResult | None = None,
    ) -> dict[str, Any]:
        timing = self.overall(timings) if timings else None
        loss = verification.get("against_original", {})
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(
                threads=self.recipe.target.threads or available_cores(),
                seed=self.recipe.calibration.seed,
                isa=sparse_ops.info().isa,
            ),
            "command": self.command,
            "recipe": recipe_document(self.recipe),
            "source": self.source.name,
            **({} if self.converted_from is None else {"converted_from_opset": self.converted_from}),
            "input_shapes": {name: list(shape) for name, shape in next(iter(self.targets), {}).items()},
            "targets": target_rows(self.targets, self.recipe.target.weights, timings),
            "summary": summary(layers, self.node_work, timing, self.nbytes, size, loss, metric),
            "goal": goal_document(found),
            "verification": verification,
            "layers": layers,
            "declined": [dataclasses.asdict(place) for place in (*self.declined, *self.not_together)],
            "untouched": untouched_rows(layers, self.node_work, self.declined),
            **({"quantized": quantized_rows(self.quantized, self.errors)} if self.quantized else {}),
            "stages": self.clock.stages,
        }


def _planned(pipeline: Pipeline) -> Pipeline:
    """What stands for the passes in a plan."""
    stand_ins = (modifier.stand_in() for modifier in pipeline.passes)
    return Pipeline(tuple(step for step in stand_ins if step is not None))
