"""The main job: from a model to a folder with a faster, verified model and a report.

The road: load, clean up, prune, decide layer by layer (the guard), lower, write, time the whole model, fall back
until it is not slower, verify, report. The source is never touched; the output folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx import inputs, model_io, sparse_ops
from sparse_onnx.comparison import MAX_COMPILER_ERROR, compare
from sparse_onnx.errors import GoalNotMetError, UsageError, VerificationError
from sparse_onnx.goals import Gate, gates, goal_document
from sparse_onnx.inputs import Feeds
from sparse_onnx.layer_errors import layer_errors
from sparse_onnx.layer_timing import shapes_in, with_shape_outputs
from sparse_onnx.machine_load import OtherLoad
from sparse_onnx.metadata_keys import STRUCTURE_KEY
from sparse_onnx.metrics import Metric, MetricResult, check_metric_name, open_metric
from sparse_onnx.node_profile import time_shares
from sparse_onnx.passes import guard
from sparse_onnx.passes.attention import FuseAttention
from sparse_onnx.passes.base import CalibrationData, Declined, PassContext, PassResult, Pipeline
from sparse_onnx.passes.batch_norm import FuseBatchNorm
from sparse_onnx.passes.calibration import Options as CalibrationOptions
from sparse_onnx.passes.calibration import Samples, open_samples
from sparse_onnx.passes.cleanup import CLEAN_PASSES
from sparse_onnx.passes.guard import LOWERINGS, Decision, find_candidates
from sparse_onnx.passes.lowering import Candidate, Packer
from sparse_onnx.passes.magnitude import Magnitude
from sparse_onnx.passes.masks import MaskStructure
from sparse_onnx.passes.merge_linears import MergeLinears
from sparse_onnx.passes.oneshot import OneShot
from sparse_onnx.passes.recipe import Recipe, dump_recipe, load_recipe, override, recipe_document
from sparse_onnx.passes.skip_layer_norm import FuseSkipLayerNorm
from sparse_onnx.predictions import confirm, find_heads, make_probe
from sparse_onnx.progress import Progress
from sparse_onnx.report import (
    SCHEMA_VERSION,
    StageClock,
    available_cores,
    describe_call,
    environment,
    write_json,
)
from sparse_onnx.runtime import Ratio, Runner, interleave, open_runner, ratio, session_budget
from sparse_onnx.session import import_onnxruntime
from sparse_onnx.timing_cache import TimingCache, default_cache_file, file_digest
from sparse_onnx.timing_table import TimingTable, read_table

__all__ = [
    "FUSION_PASSES",
    "NOTHING_FASTER",
    "PREPARATION_PASSES",
    "OptimizeResult",
    "lower_layers",
    "optimize",
    "source_file",
]

NOTHING_FASTER = 5
"""Exit code where no layer is faster in sparse form: the dense model was written."""

PREPARATION_PASSES = (*CLEAN_PASSES, FuseBatchNorm())
"""What comes before pruning."""

FUSION_PASSES = (FuseAttention(), FuseSkipLayerNorm())
"""What follows pruning: ORT's own fusions look for MatMul nodes, which lowering replaces."""

PLACEHOLDER = 0.5
"""The share of zeros of a method whose shares are searched for."""

_WHOLE_ROUNDS, _WHOLE_SECONDS = 15, 8.0
_MAX_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class OptimizeResult:
    """What :func:`optimize` made. ``report`` is the content of ``report.json``; ``exit_code`` is that of the
    command line: 0 faster, 4 a goal was missed, 5 nothing was faster and the dense model was written.
    ``folder`` is None after a dry run."""

    folder: Path | None
    exit_code: int
    report: dict[str, Any]

    @property
    def speedup(self) -> float | None:
        """Dense time / optimized time of the whole model on this machine; None if it was not timed."""
        value = self.report["summary"]["speedup"]
        return None if value is None else float(value)


def optimize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    method: str | None = None,
    sparsity: float | None = None,
    mask_structure: str | None = None,
    scope: str | None = None,
    theta: float | None = None,
    gradients: str | Path | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    calibration_data: str | Path | None = None,
    calibration: str | None = None,
    allocation: str | None = None,
    sparsities: Mapping[str, float] | None = None,
    bias_correction: bool | None = None,
    dampening_frac: float | None = None,
    num_calibration_samples: int | None = None,
    batch_size: int | None = None,
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
    checkpoint: str | Path | None = None,
    input_shapes: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
    shape_weights: Sequence[float] | None = None,
    threads: int | None = None,
    min_speedup: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    metric_data: str | Path | None = None,
    labels: str | None = None,
    metric_output: str | None = None,
    target_speedup: float | None = None,
    target_size: float | str | None = None,
    seed: int | None = None,
    benchmark: bool = True,
    timing_cache: str | Path | bool = True,
    timing_table: str | Path | None = None,
    search_trials: int | None = None,
    search_minutes: float | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> OptimizeResult:
    """Compile ``model`` into the folder ``output``.

    Args:
        model: An ``.onnx`` file or a Hugging Face model folder.
        output: The folder to write: model.onnx, model.onnx.data, recipe.yaml, report.json, report.html.
        recipe: A recipe file or object; the other arguments override it.
        method, sparsity, mask_structure, scope, theta, gradients, targets, ignore: Pruning; without ``method`` and
            ``sparsity`` the zeros that are already there are used.
        calibration_data: Real inputs, to prune with and to measure the result on: an .npz, a folder of .npz,
            ``module:function``, or a text file with ``tokenizer``, a folder.
        num_calibration_samples, batch_size: How many of them to use, and at a time.
        calibration, allocation, sparsities, bias_correction, dampening_frac: Of methods with calibration, see
            :class:`sparse_onnx.passes.oneshot.OneShot`.
        statistics: A file for the statistics of one-shot calibration: read if it fits, else written.
        checkpoint: A folder for finished layers, from which an interrupted run goes on.
        input_shapes: Shapes to decide and time for, by input name; a sequence of these for several targets: nothing may
            then be slower at any of them.
        shape_weights: With several targets, how much each counts: their weighted mean time decides, not the worst.
        threads: Intra-op threads to decide and time for; None: all cores of this process.
        min_speedup: A layer becomes sparse only if that is at least this many times faster (1.02).
        max_drop: Goal: what the metric may lose, see :func:`.quality.drop`; without one 1 − cosine between the outputs
            of the original and the result.
        metric: A metric of the original and the result, see :mod:`.metrics`: ``module:function`` or built in.
        metric_data: What it is measured on, as ``calibration_data``; None: the calibration data that is held out.
        labels: The array of the metric's data with the labels.
        metric_output: The output that the metric is of.
        target_speedup: Goal: how many times faster the whole model becomes, at least.
        target_size: Goal: what its files take, at most: a share of the original weights (0.5 or "50%") or "120MB".
        seed: Of generated inputs and of random pruning.
        benchmark: False: decide by a table instead of timing, for another machine.
        timing_cache: A file with the timings of earlier runs, see :mod:`sparse_onnx.timing_cache`; True: the one in the
            user's cache folder; False: none.
        timing_table: With ``benchmark=False``: a file of :func:`sparse_onnx.analyze` with timings of the target machine
            to decide by.
        search_trials, search_minutes: When a search stops, at most: 16 trials, 60 minutes. With a ``method``, goals and
            no ``sparsity``, the zeros of every layer are searched for, see :mod:`sparse_onnx.search`;
            ``mask_structure`` may then name several patterns to choose from, with commas.
        jobs: Trials of a search at once, in processes of this machine (1).
        ray: The address of a Ray cluster to run trials on.
        dry_run: Plan only; nothing is written and nothing timed.
        overwrite: Replace ``output`` if it is an output folder of ours.
        command: What was asked for, as the report is to say it; None: this call.
        progress: Called with one line of text at every step.

    Raises:
        SparseOnnxError: With one clear message and its exit code; nothing is written then.
    """
    asked = command or describe_call(optimize, locals())
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe)) if recipe else Recipe()
    asked_goals = (max_drop, target_speedup, target_size)
    known_goals = (resolved.goal.max_drop, resolved.goal.target_speedup, resolved.goal.target_size)
    fixed = sparsity is not None or sparsities is not None or _implies_zeros(mask_structure)
    searching = (
        method is not None and not fixed and any(goal is not None for goal in (*asked_goals, *known_goals))
    )
    resolved = override(
        resolved,
        method=method,
        sparsity=PLACEHOLDER if searching else sparsity,
        mask_structure=None if searching else mask_structure,
        scope=scope,
        theta=theta,
        gradients=None if gradients is None else str(gradients),
        targets=targets,
        ignore=ignore,
        calibration_data=None if calibration_data is None else str(calibration_data),
        calibration=calibration,
        allocation=allocation,
        sparsities=sparsities,
        bias_correction=bias_correction,
        dampening_frac=dampening_frac,
        num_calibration_samples=num_calibration_samples,
        batch_size=batch_size,
        tokenizer=None if tokenizer is None else str(tokenizer),
        statistics=None if statistics is None else str(statistics),
        checkpoint=None if checkpoint is None else str(checkpoint),
        shapes=input_shapes,
        shape_weights=shape_weights,
        threads=threads,
        min_speedup=min_speedup,
        max_drop=max_drop,
        metric=metric,
        metric_data=None if metric_data is None else str(metric_data),
        labels=labels,
        metric_output=metric_output,
        target_speedup=target_speedup,
        target_size=target_size,
        seed=seed,
    )
    pipeline = resolved.pipeline()  # fails now rather than after the model is read
    if resolved.goal.metric is not None:
        check_metric_name(resolved.goal.metric)
    say = progress or (lambda _line: None)
    asked_limits = {"trials": search_trials, "minutes": search_minutes, "jobs": jobs, "ray": ray}
    limits = {name: value for name, value in asked_limits.items() if value is not None}
    if searching:
        if dry_run or not benchmark:
            raise UsageError("a search measures: leave --dry-run and --no-benchmark out, or give a sparsity")
        from sparse_onnx.search.limits import Limits
        from sparse_onnx.search.run import search_recipe

        return search_recipe(
            Path(model),
            Path(output),
            resolved,
            mask_structure,
            Limits(**limits),  # type: ignore[arg-type]
            overwrite=overwrite,
            command=asked,
            progress=say,
        )
    if limits:
        raise UsageError(f"{next(iter(limits))} is for a search: give a method and goals, and no sparsity")
    if resolved.goal.target_speedup is not None and not benchmark:
        raise UsageError(
            "target_speedup needs timing: leave --no-benchmark (benchmark=False) out, or the goal"
        )
    if timing_table is not None and benchmark:
        raise UsageError(
            "timing_table says what another machine measured: give it with --no-benchmark (benchmark=False)"
        )
    table = None if timing_table is None else read_table(Path(timing_table))
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as scratch:
            job = _Job(Path(model), resolved, benchmark, say, Path(scratch), Path(scratch), asked)
            return OptimizeResult(None, 0, job.plan(pipeline))
    with (
        _note_how_to_resume(resolved),
        model_io.OutputFolder(Path(output), overwrite=overwrite, sources=[Path(model)]) as folder,
    ):
        cache = default_cache_file() if timing_cache is True else Path(timing_cache) if timing_cache else None
        exit_code, report = compile_into(
            folder,
            Path(model),
            resolved,
            command=asked,
            benchmark=benchmark,
            cache=cache,
            table=table,
            progress=say,
        )
    return OptimizeResult(Path(output), exit_code, report)


def _implies_zeros(mask_structure: str | None) -> bool:
    """True for N:M; several patterns with commas leave a choice."""
    if mask_structure is None or "," in mask_structure:
        return False
    return MaskStructure.parse(mask_structure).kind == "n:m"


def compile_into(
    folder: Path,
    source: Path,
    recipe: Recipe,
    *,
    command: str,
    benchmark: bool = True,
    cache: Path | None = None,
    table: TimingTable | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _line: None,
) -> tuple[int, dict[str, Any]]:
    """Compile ``source`` by ``recipe`` into the empty ``folder``, with all that an output folder holds.

    The arguments are as for :func:`optimize`; ``threads`` are those to work with, where these are others than those
    that the recipe decides for. Returns the exit code and the report.
    """
    work = folder / ".work"
    work.mkdir()
    job = _Job(source, recipe, benchmark, progress, folder, work, command, cache, table, threads)
    exit_code, report = job.compile(recipe.pipeline())
    shutil.rmtree(work)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_report(report, folder)
    return exit_code, report


def write_report(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.html."""
    from sparse_onnx.report_html import write_html

    write_json(report, folder / "report.json")
    write_html(report, folder / "report.html")


@contextlib.contextmanager
def _note_how_to_resume(recipe: Recipe) -> Iterator[None]:
    """Add to an interruption what is kept, and which option keeps more."""
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = recipe.calibration
        again = "Run the same command again"
        calibrated = any(modifier.needs_calibration for modifier in recipe.modifiers())
        if calibrated and kept.checkpoint is not None:
            stop.add_note(f"{again} to go on: finished layers are kept in {kept.checkpoint} (--checkpoint).")
        elif calibrated and kept.statistics is not None:
            stop.add_note(f"{again} to go on: statistics are kept in {kept.statistics} (--statistics).")
        elif calibrated:
            stop.add_note(
                f"{again} to start over; with --checkpoint DIR a next interruption keeps finished layers."
            )
        else:
            stop.add_note(f"{again} to start over.")
        raise


class _Job:
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
    ) -> None:
        self.source, self.recipe, self.benchmark = source, recipe, benchmark
        self.folder, self.work, self.command = folder, work, command
        self.clock = StageClock(say)
        self.say = self.clock.say
        self.threads = threads or recipe.target.threads or available_cores()
        self.declined: list[Declined] = []
        self.path = source
        self.targets: list[dict[str, tuple[int, ...]]] = []
        self.cache, self.table = cache, table
        self.calibration: CalibrationData | None = None
        self.held_out: Samples | None = None
        self.metric_samples: Samples | None = None
        self.errors: dict[str, float | None] = {}
        self.held_out_errors: dict[str, float] = {}

    # -- steps ------------------------------------------------------------------------------------------------

    def load(self) -> ir.Model:
        self.path = source_file(self.source, self.work, self.say)
        return model_io.load_model(self.path)

    def prepare(
        self, model: ir.Model, pipeline: Pipeline, context: PassContext
    ) -> tuple[PassResult, PassResult]:
        """Clean up and prune; ``declined`` collects what was left alone."""
        cleaned = Pipeline(PREPARATION_PASSES)(model, context)
        self.before = {name: value.const_value for name, value in model.graph.initializers.items()}
        dense = model.clone() if self.held_out is not None else None
        pruned = pipeline(model, context)
        if dense is not None:
            self.held_out_errors = self.errors_on_held_out(dense, model, pipeline)
        self.declined += [*cleaned.declined, *pruned.declined]
        self.errors = {change.name: change.error for change in pruned.layers}
        return cleaned, pruned

    def errors_on_held_out(self, dense: ir.Model, pruned: ir.Model, pipeline: Pipeline) -> dict[str, float]:
        """Of every pruned layer, on inputs such as its method saw."""
        assert self.held_out is not None
        assert self.calibration is not None
        behind_pruned = any(
            isinstance(modifier, OneShot) and modifier.calibration != "oneshot"
            for modifier in pipeline.passes
        )
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
        nbytes = model_io.weight_bytes(model)
        with model_io.Spool(self.work) as spool, self.clock("prune"):
            context = PassContext(spool.put, self.say)
            self.prepare(model, _planned(pipeline), context)
            candidates = self.fuse(model, context)
            decisions = guard.decide_by_table(candidates)
            layers = self.layers(decisions, None)
        found = gates(self.recipe.goal, drop=None, speedup=None, bytes_before=nbytes, bytes_after=None)
        return self.report(nbytes, None, [], decisions, layers, {}, found)

    def compile(self, pipeline: Pipeline) -> tuple[int, dict[str, Any]]:
        import_onnxruntime()  # what is missing is better known now than after minutes
        sparse_ops.info()
        with self.clock("load"):
            model = self.load()
        self.nbytes = nbytes = model_io.weight_bytes(model)
        self.budget = session_budget(nbytes)
        samples, self.feeds = self.inputs(model, pipeline)
        metric = self.metric(model)
        bench = self.bench()
        with model_io.Spool(self.work) as spool:
            context = PassContext(spool.put, self.say, self.calibration)
            with self.clock("prune"):
                cleaned, pruned = self.prepare(model, pipeline, context)
                candidates = find_candidates(model)[0]
            with self.clock("run dense"):
                reference, shapes = self.run_dense(model, candidates, samples)
            with self.clock("fuse"):
                candidates = self.fuse(model, context)
            packer = Packer(context)
            with self.clock("decide"):
                if self.benchmark:
                    weights = self.recipe.target.weights
                    decisions = guard.decide(
                        model, candidates, shapes, packer, bench, weights=weights, progress=self.say
                    )
                else:
                    decisions = guard.decide_by_table(
                        candidates,
                        self.table,
                        shapes,
                        weights=self.recipe.target.weights,
                        min_speedup=self.recipe.goal.min_speedup,
                    )
            optimized, decisions, timings = self.lower(model, decisions, packer, context, bench)
            if not any(decision.sparse for decision in decisions) and not pruned.modified:
                # Nothing gained: the model as it was, not even cleaned.
                optimized = model_io.load_model(self.path)
                model_io.save_model(optimized, self.folder)
            with self.clock("verify"):
                verification = self.verify(optimized, samples, reference, pruned.modified or cleaned.modified)
            layers = self.layers(decisions, shapes[0])
            profile = self.profile(optimized, [row["name"] for row in layers]) if timings else None
        measured = None
        if metric is not None:
            with self.clock("measure the metric"):
                measured = metric.compare(self.written, threads=self.threads)
        drop = 1 - verification["against_original"]["cosine"] if measured is None else measured.drop
        size = sum(file.stat().st_size for file in self.folder.glob("model.onnx*"))
        found = gates(
            self.recipe.goal,
            drop=drop,
            metric=measured,
            speedup=self.overall(timings).median if timings else None,
            bytes_before=nbytes,
            bytes_after=size,
        )
        if not all(gate.met for gate in found):
            exit_code = GoalNotMetError.exit_code
        else:
            exit_code = 0 if any(decision.sparse for decision in decisions) else NOTHING_FASTER
        report = self.report(nbytes, size, timings, decisions, layers, verification, found, measured)
        return exit_code, report if profile is None else {**report, "profile": profile}

    def profile(self, optimized: ir.Model, weights: Sequence[str]) -> dict[str, Any] | None:
        """Where the time goes before and after, at the first target; None of models too large for one session."""
        if model_io.weight_bytes(optimized) > self.budget or self.nbytes > self.budget:
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
                inputs.input_specs(original),
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

    def bench(self) -> guard.Bench:
        cache = TimingCache(self.cache if self.benchmark else None, self.say)
        return guard.Bench(self.threads, self.work, cache, self.recipe.goal.min_speedup)

    def inputs(self, model: ir.Model, pipeline: Pipeline) -> tuple[list[Feeds], list[Feeds]]:
        """Batches to verify with (real ones if given), and those to time with, one for each target. Where the pipeline
        needs real inputs, most of them are for that, and an eighth is held out to verify with."""
        specs = inputs.input_specs(model)
        calibration = self.recipe.calibration
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
                if sum(map(inputs.sample_count, samples)) >= _MAX_SAMPLES:
                    break
            if self.calibration is not None and held is not known:
                self.held_out = held.part(0, len(samples))
        guessed: dict[str, int] = {}
        for given in self.recipe.target.all_shapes:
            shapes, unknown = inputs.resolve_shapes(specs, given)
            self.targets.append(shapes)
            guessed |= unknown
        for name, size in guessed.items():
            self.say(f"note: dimension {name} is taken as {size}; say --input-shape to decide for another")
        self.generated = not samples
        timed = [inputs.generate(specs, shapes, calibration.seed) for shapes in self.targets]
        return samples or timed, timed

    def run_dense(
        self, model: ir.Model, candidates: Sequence[Candidate], samples: Sequence[Feeds]
    ) -> tuple[list[Feeds], list[dict[str, tuple[int, ...]]]]:
        """Outputs of the pruned dense model on the samples, and the shapes of all layers' inputs at each target."""
        layers = [layer for candidate in candidates for layer in candidate.layers]
        names = {value.name or "" for layer in layers for value in layer.inputs}
        with self.open(with_shape_outputs(model, names), None, library=False) as runner:
            self.say("running the dense model")
            timed = [shapes_in(runner.run(feeds)) for feeds in self.feeds]
            outputs = [] if self.generated else self.run_all(runner, samples, "batch")
            outputs = [shapes_in(output)[0] for output in outputs]
        return outputs or [output for output, _ in timed], [shapes for _, shapes in timed]

    def lower(
        self,
        model: ir.Model,
        decisions: Sequence[Decision],
        packer: Packer,
        context: PassContext,
        bench: guard.Bench,
    ) -> tuple[ir.Model, list[Decision], list[Ratio]]:
        """Write the model with the chosen layers sparse; while the whole is slower, give up the least gainful half.
        Also returns its times at every target, or none without a benchmark."""
        decided = list(decisions)
        declined = self.declined
        while True:
            chosen = [decision.candidate for decision in decided if decision.sparse]
            with self.clock("lower and write"):
                optimized, left = lower_layers(model, chosen, packer, context)
                self.declined = [*declined, *left]
                model_io.save_model(optimized, self.folder)
            if not self.benchmark:
                return optimized, decided, []
            with self.clock("time the whole model"):
                timings = self.time_whole(optimized)
            speedup = self.overall(self.as_before(timings, bench)).median
            if not chosen or speedup >= 1:
                return optimized, decided, timings
            self.say(f"note: the whole model is slower ({speedup:.2f}x): giving up layers")
            sparse = [d for d in decided if d.sparse]
            half = guard.least_gainful([(d.dense_ms or 0) - (d.sparse_ms or 0) for d in sparse])
            dropped = {id(sparse[index]) for index in half}
            decided = [
                dataclasses.replace(d, sparse=False, reason=f"{d.reason}; the whole model was slower with it")
                if id(d) in dropped
                else d
                for d in decided
            ]

    def overall(self, timings: Sequence[Ratio]) -> Ratio:
        """What the targets come to: their weighted mean, or the worst."""
        return guard.overall(timings, self.recipe.target.weights)[0]

    def as_before(self, timings: Sequence[Ratio], bench: guard.Bench) -> list[Ratio]:
        """``timings`` of the whole model. Those that cannot tell faster from slower are replaced by what an earlier run
        measured of the same two models, so that it is not decided otherwise for nothing."""
        models = [file_digest(path) for path in (self.path, self.written)]
        settled = []
        for shapes, timing in zip(self.targets, timings, strict=True):
            key = {"models": models, "inputs": shapes} | bench.environment
            known = bench.cache.get(key)
            if known is not None and (timing.close_to(1) or not timing.quiet):
                settled.append(known)
            else:
                bench.cache.put(key, timing)
                settled.append(timing)
        return settled

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

    def open(
        self, model: ir.Model, path: Path | None, *, library: bool = True
    ) -> AbstractContextManager[Runner]:
        return open_runner(
            model, threads=self.threads, library=library, budget=self.budget, work=self.work, path=path
        )

    def verify(
        self, optimized: ir.Model, samples: Sequence[Feeds], reference: Sequence[Feeds], changed: bool
    ) -> dict[str, Any]:
        """Compiler correctness, with and without the library, and compression loss: two things, never mixed up."""
        heads = find_heads(optimized)
        probe = None if self.generated else make_probe(heads, samples[0])
        with self.open(optimized, self.written) as runner:
            ours = self.run_all(runner, samples, "with the library")
            heads = confirm(heads, probe, ours[0], {} if probe is None else runner.run(probe.feeds))
        compiled = compare(reference, ours, () if changed else heads, samples)
        self.say("on standard operators only")
        with self.open(optimized, self.written, library=False) as runner:
            portable = compare(reference[:1], [runner.run(samples[0])])
        for what, difference in (("with the library", compiled), ("without it", portable)):
            if not difference.relative_error <= MAX_COMPILER_ERROR:
                raise VerificationError(
                    f"the compiled model, run {what}, differs from the pruned dense one: relative error "
                    f"{difference.relative_error:.2e} at output {difference.worst_output}, allowed {MAX_COMPILER_ERROR}"
                )
        if changed:
            original = model_io.load_model(self.path)
            with self.open(original, self.path, library=False) as runner:
                loss = compare(self.run_all(runner, samples, "the original"), ours, heads, samples)
        else:
            loss = compiled
        return {
            "inputs": "generated" if self.generated else str(self.recipe.calibration.data),
            "batches": len(samples),
            "against_pruned_dense": compiled.to_dict(),
            "without_library": portable.to_dict(),
            "against_original": loss.to_dict(),
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

    def layers(
        self, decisions: Sequence[Decision], shapes: Mapping[str, tuple[int, ...]] | None
    ) -> list[dict[str, Any]]:
        rows = []
        isa = sparse_ops.info().isa
        for decision in decisions:
            candidate = decision.candidate
            weight = candidate.weight
            original = self.before.get(weight.name)
            rows.append(
                {
                    "name": weight.name,
                    "module": weight.module,
                    "op_type": weight.nodes[0].op_type,
                    "shape": list(weight.shape),
                    "rows": None
                    if shapes is None
                    else sum(
                        layer.products(shapes[layer.inputs[0].name or ""]) for layer in candidate.layers
                    ),
                    "activations": sorted({layer.activation for layer in candidate.layers}),
                    "sparsity": candidate.sparsity,
                    "non_finite": candidate.non_finite,
                    "mask_structure": weight.value.metadata_props.get(STRUCTURE_KEY, "unstructured"),
                    "decision": "sparse" if decision.sparse else "dense",
                    "reason": decision.reason,
                    "kernel": f"spmm_{isa}" if decision.sparse else "dense",
                    "dense_ms": decision.dense_ms,
                    "sparse_ms": decision.sparse_ms,
                    "speedup_low": decision.low,
                    "speedup_high": decision.high,
                    "close": decision.close,
                    "cached": decision.cached,
                    "quiet": decision.quiet,
                    "output_error": self.errors.get(weight.name),
                    "output_error_held_out": self.held_out_errors.get(weight.name),
                    "relative_error": 0.0
                    if original is weight.tensor
                    else _weight_error(original, weight.tensor),
                }
            )
        return rows

    def report(
        self,
        nbytes: int,
        size: int | None,
        timings: Sequence[Ratio],
        decisions: Sequence[Decision],
        layers: list[dict[str, Any]],
        verification: dict[str, Any],
        found: Sequence[Gate],
        metric: MetricResult | None = None,
    ) -> dict[str, Any]:
        weights = sum(math.prod(row["shape"]) for row in layers)
        zeros = sum(row["sparsity"] * math.prod(row["shape"]) for row in layers)
        work = {row["name"]: math.prod(row["shape"]) * (row["rows"] or 1) for row in layers}
        sparse_work = sum(work[row["name"]] for row in layers if row["decision"] == "sparse")
        loss = verification.get("against_original", {})
        timing = self.overall(timings) if timings else None
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
            "input_shapes": {name: list(shape) for name, shape in next(iter(self.targets), {}).items()},
            "targets": target_rows(self.targets, self.recipe.target.weights, timings),
            "summary": {
                **times(timing),
                "bytes_before": nbytes,
                "bytes_after": size,
                "sparsity": zeros / weights if weights else 0.0,
                "sparse_flops_fraction": sparse_work / sum(work.values()) if work else 0.0,
                "relative_error": loss.get("relative_error"),
                "cosine": loss.get("cosine"),
                "metric": None if metric is None else metric.to_dict(),
            },
            "goal": goal_document(found),
            "verification": verification,
            "layers": layers,
            "declined": [dataclasses.asdict(place) for place in self.declined],
            "stages": self.clock.stages,
        }


def time_models(
    pair: Sequence[tuple[ir.Model, Path]],
    feeds: Sequence[Feeds],
    *,
    threads: int,
    budget: int,
    work: Path,
    progress: Callable[[str], None],
) -> list[Ratio]:
    """Time the original against a compiled model, each with its file, in turn: a ratio for each of ``feeds``."""
    (original, source), (compiled, written) = pair
    options: dict[str, Any] = {"threads": threads, "budget": budget, "work": work}
    with (
        open_runner(original, path=source, library=False, **options) as dense,
        open_runner(compiled, path=written, library=True, **options) as sparse,
    ):
        runs = [
            functools.partial(runner.milliseconds, values) for values in feeds for runner in (dense, sparse)
        ]
        load = OtherLoad()
        if dense.whole and sparse.whole:
            seconds = _WHOLE_SECONDS * len(feeds)
            found = interleave(runs, rounds=_WHOLE_ROUNDS, seconds=seconds, progress=progress)
        else:
            found = [[run()] for run in runs]
    quiet = load.spared(threads)
    return [ratio(first, second, quiet=quiet) for first, second in zip(found[::2], found[1::2], strict=True)]


def times(timing: Ratio | None) -> dict[str, float | None]:
    """The times of a whole model as a report has them; None where it was not timed."""
    return {
        "dense_ms": timing.first_ms if timing else None,
        "optimized_ms": timing.second_ms if timing else None,
        "speedup": timing.median if timing else None,
        "speedup_low": timing.low if timing else None,
        "speedup_high": timing.high if timing else None,
    }


def target_rows(
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    weights: Sequence[float] | None,
    timings: Sequence[Ratio],
) -> list[dict[str, Any]]:
    """The ``targets`` of a report: the whole model at each; ``timings`` are empty where it was not timed."""
    untold = [None] * len(targets)
    return [
        {
            "input_shapes": {name: list(shape) for name, shape in shapes.items()},
            "weight": weight,
            **times(timing),
            "quiet": timing.quiet if timing else None,
        }
        for shapes, weight, timing in zip(targets, weights or untold, timings or untold, strict=True)
    ]


def source_file(source: Path, work: Path, progress: Callable[[str], None] = lambda _line: None) -> Path:
    """The ONNX file that ``source`` is or, as an output folder, holds; or what the Hugging Face folder ``source`` was
    exported to, inside ``work``."""
    if (source / "config.json").is_file() or (source.is_dir() and not any(source.glob("*.onnx"))):
        from sparse_onnx.exporter import export_huggingface

        exported = work / "exported"
        exported.mkdir()
        model_io.save_model(export_huggingface(source, progress=progress).model, exported)
        return exported / "model.onnx"
    inside = source / "model.onnx"
    return inside if inside.is_file() else source


def lower_layers(
    model: ir.Model, chosen: Sequence[Candidate], packer: Packer, context: PassContext
) -> tuple[ir.Model, tuple[Declined, ...]]:
    """A copy of ``model`` with the ``chosen`` candidates sparse and those that share an input merged, and the places
    that could not be merged."""
    lowered = model.clone()
    for lowering in LOWERINGS:
        if names := tuple(c.weight.name for c in chosen if c.lowering is lowering):
            lowering(layers=names, packer=packer)(lowered, context)
    return lowered, MergeLinears()(lowered, context).declined


def _planned(pipeline: Pipeline) -> Pipeline:
    """What stands for the passes in a plan: one-shot pruning takes minutes, and magnitude gives as many zeros. What
    else needs real inputs is left out."""
    stand_ins = [
        Magnitude(
            sparsity=modifier.sparsity,
            mask_structure=modifier.mask_structure,
            targets=modifier.targets,
            ignore=modifier.ignore,
        )
        if isinstance(modifier, OneShot)
        else modifier
        for modifier in pipeline.passes
        if isinstance(modifier, OneShot) or not modifier.needs_calibration
    ]
    return Pipeline(tuple(stand_ins))


def _weight_error(original: ir.TensorProtocol | None, pruned: ir.TensorProtocol) -> float | None:
    """‖W − W′‖ / ‖W‖ (Frobenius): the expected relative error of the layer's output on uncorrelated inputs."""
    if original is None or original.shape != pruned.shape:  # structured pruning took a part of it away
        return None
    before, after = np.array(original.numpy(), np.float64), np.array(pruned.numpy(), np.float64)
    norm = float(np.linalg.norm(before))
    error = float(np.linalg.norm(before - after)) / norm if norm else 0.0
    del before, after
    for tensor in (original, pruned):
        model_io.release_mapping(tensor)
    return error if math.isfinite(error) else None
