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

from sparse_onnx.compilation.bundle import bundle_genai, check_bundle
from sparse_onnx.compilation.compile import OptimizeResult, compile_into, plan
from sparse_onnx.compilation.dumps import check_dumps
from sparse_onnx.compilation.groups import AUTO, FLOAT32, Calibration, Goal, Prune, Quantize, Run, Target
from sparse_onnx.compilation.recipe import SECTIONS, Recipe
from sparse_onnx.compilation.recipe_flags import override, settings_of
from sparse_onnx.compilation.recipe_reader import load_recipe
from sparse_onnx.compilation.report_rows import write_report
from sparse_onnx.data.inputs import plain_values
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.options import documented, keywords
from sparse_onnx.passes.base import Stage
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.report.environment import describe_call
from sparse_onnx.search.limits import Limits
from sparse_onnx.timing.cache import default_cache_file
from sparse_onnx.timing.table import read_table
from sparse_onnx.verification.metrics import check_metric_name

__all__ = ["optimize"]

PLACEHOLDER = 0.5
"""The share of zeros of a method whose shares are searched for."""


@documented(Prune, Quantize, Calibration, Target, Goal, Run, Limits)
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
    bits: int | None = None,
    group_size: int | None = None,
    precision: str | None = None,
    calibration_data: str | Path | Sequence[str | Path] | None = None,
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
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
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
    settings: Mapping[str, object] | None = None,
    benchmark: bool = True,
    timing_cache: str | Path | bool = True,
    timing_table: str | Path | None = None,
    search_trials: int | None = None,
    search_minutes: float | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    bundle: str | None = None,
    dump_after: Sequence[str] | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> OptimizeResult:
    """Compile ``model`` into the folder ``output``.

    Args:
        model: An ``.onnx`` file or a Hugging Face model folder.
        output: The folder to write: model.onnx, model.onnx.data, recipe.yaml, report.json, report.html; of a
            calibrated model also calibration.npz, by which ``verify`` knows data of another kind.
        recipe: A recipe file or object; the other arguments override it.
        {options}
        command: What was asked for, as the report is to say it; None: this call.
        progress: Called with one line of text at every step.

    Raises:
        SparseOnnxError: With one clear message and its exit code; nothing is written then.
    """
    given = dict(locals())
    asked = command or describe_call(optimize, given)
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe)) if recipe else Recipe()
    patterns = [mask_structure, *settings_of(settings or {}, "mask_structure")]
    shares = [sparsity, sparsities, *settings_of(settings or {}, "sparsity", "sparsities")]
    fixed = any(share is not None for share in shares) or any(map(_implies_zeros, patterns))
    bits_are_fixed = (
        bits is not None
        or bool(settings_of(settings or {}, "bits", "bits_of"))
        or _has_stage(resolved, Stage.QUANTIZE)
    )
    arithmetic = precision or resolved.target.precision
    zeros_wanted = method is not None and not fixed
    bits_wanted = (
        arithmetic != FLOAT32
        and not (bits_are_fixed or fixed)
        and (zeros_wanted or not _has_stage(resolved, Stage.PRUNE))
        # Without measuring, int8 and int4 are for all layers.
        and (zeros_wanted or arithmetic == AUTO or (benchmark and not dry_run))
    )
    goals = (max_drop, target_speedup, target_size)
    has_goal = resolved.goal.is_given or any(goal is not None for goal in goals)
    searching = has_goal and (zeros_wanted or bits_wanted)
    if arithmetic == AUTO and not (searching and bits_wanted):
        raise UsageError(
            "precision auto needs a goal to choose by: give --target-speedup, --target-size or --max-drop"
            if not has_goal
            else "precision auto chooses zeros and bits itself: leave those that are given out, or say which precision"
        )
    flags = {
        keyword: _plain(keyword, given[keyword]) for keyword in keywords(Prune, Quantize, *SECTIONS.values())
    }
    if searching:
        if method is None and mask_structure is not None:
            raise UsageError(
                "mask_structure is for zeros, and no method makes any: give one, or leave it out"
            )
        flags |= {"sparsity": PLACEHOLDER if zeros_wanted else None, "mask_structure": None}
    resolved = override(resolved, settings=settings, **flags)
    if resolved.goal.metric is not None:
        check_metric_name(resolved.goal.metric)
    say = progress or (lambda _line: None)
    limits = {
        name: given[keyword] for keyword, name in keywords(Limits).items() if given[keyword] is not None
    }
    check_dumps(dump_after or ())
    bundling = check_bundle(bundle, Path(model))
    if searching:
        if dry_run or not benchmark:
            raise UsageError("a search measures: leave --dry-run and --no-benchmark out, or give a sparsity")
        if bundle is not None:
            raise UsageError(
                "a search makes no bundle: leave it out, then compile by the recipe that it writes"
            )
        if dump_after:
            raise UsageError("a search compiles many times: leave --dump-after out, or give a sparsity")
        if bits_are_fixed:
            raise UsageError(
                "a search chooses bits itself: give --precision int8, int4 or auto in place of bits, or give a sparsity"
            )
        if len(patterns) > 1:
            raise UsageError("a search chooses the pattern: give --mask-structure in place of --set")
        from sparse_onnx.search.run import search_recipe

        return search_recipe(
            Path(model),
            Path(output),
            resolved,
            mask_structure,
            Limits(**limits),
            overwrite=overwrite,
            command=asked,
            progress=say,
        )
    if limits:
        raise UsageError(
            f"{next(iter(limits))} is for a search: give a method or a precision, goals, and no sparsity"
        )
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
        if dump_after:
            raise UsageError("a dry run writes nothing: leave --dump-after out")
        with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as scratch:
            report = plan(Path(model), resolved, Path(scratch), command=asked, progress=say)
        return OptimizeResult(None, 0, report)
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
            dump_after=dump_after or (),
            progress=say,
        )
        if bundling:
            tokenizer = resolved.calibration.tokenizer
            bundle_genai(folder, Path(model), [] if tokenizer is None else [Path(tokenizer)], say)
        write_report(report, folder)
    return OptimizeResult(Path(output), exit_code, report)


def _plain(keyword: str, value: Any) -> Any:
    """An argument as a recipe has it: paths are text, and arrays numbers."""
    if keyword in ("input_values", "fixed_inputs"):
        return plain_values(value)
    if keyword == "calibration_data" and isinstance(value, list | tuple):
        return tuple(str(source) for source in value)
    return str(value) if isinstance(value, Path) else value


def _has_stage(recipe: Recipe, stage: Stage) -> bool:
    return any(modifier.stage is stage for modifier in recipe.modifiers())


def _implies_zeros(mask_structure: object) -> bool:
    """True for N:M; several patterns with commas leave a choice."""
    if not isinstance(mask_structure, str) or "," in mask_structure:
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
