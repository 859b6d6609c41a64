"""The main job: from a model to a folder with a faster, verified model and a report.

The road: load, clean up, prune, decide layer by layer (the guard), lower, write, time the whole model, fall back
until it is not slower, verify, report. The source is never touched; the output folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.compilation.compile import OptimizeResult, compile_into
from sparse_onnx.compilation.recipe import Recipe, load_recipe, override
from sparse_onnx.compilation.report_rows import write_report
from sparse_onnx.compilation.steps import Compilation
from sparse_onnx.data.inputs import plain_values
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.report.environment import describe_call
from sparse_onnx.timing.cache import default_cache_file
from sparse_onnx.timing.table import read_table
from sparse_onnx.verification.metrics import check_metric_name

__all__ = ["optimize"]

PLACEHOLDER = 0.5
"""The share of zeros of a method whose shares are searched for."""


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
    input_values: Mapping[str, Any] | None = None,
    fixed_inputs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    min_speedup: float | None = None,
    keep_pruned: bool | None = None,
    max_compiler_error: float | None = None,
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
            :class:`sparse_onnx.passes.prune.oneshot.OneShot`.
        statistics: A file for the statistics of one-shot calibration: read if it fits, else written.
        checkpoint: A folder for finished layers, from which an interrupted run goes on.
        input_shapes: Shapes to decide and time for, by input name; a sequence of these for several targets: nothing may
            then be slower at any of them.
        shape_weights: With several targets, how much each counts: their weighted mean time decides, not the worst.
        input_values: Values for inputs that steer the graph, by name: numbers, booleans, lists or arrays of these.
            A number alone fills an input of any shape.
        fixed_inputs: The same, but they become constants of the result, which has these inputs no longer; what depends
            on them alone is computed now.
        threads: Intra-op threads to decide and time for; None: all cores of this process.
        min_speedup: A layer becomes sparse only if that is at least this many times faster (1.02).
        keep_pruned: True: prune also what no kernel takes or what would be slower, and let layers that stay dense keep
            their zeros, for whoever wants them elsewhere. Else such layers keep or get back their original weights.
        max_compiler_error: What the outputs may differ by from the pruned dense model's (relative error, 1e-4), unless
            rounding explains more, see :mod:`sparse_onnx.verification.yardstick`; else VerificationError.
        max_drop: Goal: what the metric may lose, see :func:`sparse_onnx.verification.quality.drop`; without one 1 −
            cosine between the outputs of the original and the result.
        metric: A metric of the original and the result, see :mod:`sparse_onnx.verification.metrics`:
            ``module:function`` or built in.
        metric_data: What it is measured on, as ``calibration_data``; None: the calibration data that is held out.
        labels: The array of the metric's data with the labels.
        metric_output: The output that the metric is of.
        target_speedup: Goal: how many times faster the whole model becomes, at least.
        target_size: Goal: what its files take, at most: a share of the original files (0.5 or "50%") or "120MB".
        seed: Of generated inputs and of random pruning.
        benchmark: False: decide by a table instead of timing, for another machine.
        timing_cache: A file with the timings of earlier runs, see :mod:`sparse_onnx.timing.cache`; True: the one in the
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
        input_values=plain_values(input_values),
        fixed_inputs=plain_values(fixed_inputs),
        threads=threads,
        min_speedup=min_speedup,
        keep_pruned=keep_pruned,
        max_compiler_error=max_compiler_error,
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
            job = Compilation(Path(model), resolved, benchmark, say, Path(scratch), Path(scratch), asked)
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
        write_report(report, folder)
    return OptimizeResult(Path(output), exit_code, report)


def _implies_zeros(mask_structure: str | None) -> bool:
    """True for N:M; several patterns with commas leave a choice."""
    if mask_structure is None or "," in mask_structure:
        return False
    return MaskStructure.parse(mask_structure).kind == "n:m"


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
