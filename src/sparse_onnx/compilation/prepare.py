"""What is done to a model before layers are decided on: clean up, remove structures, prune what can pay, quantize."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

import onnx_ir as ir

from sparse_onnx.compilation.give_back import Originals
from sparse_onnx.compilation.groups import FLOAT32
from sparse_onnx.compilation.inputs import Inputs
from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.compilation.runs import run_dense
from sparse_onnx.compilation.worth_pruning import (
    CurvesOf,
    below_break_even,
    measured_curves,
    prunes,
    tabulated_curves,
    without_kernel,
)
from sparse_onnx.errors import UsageError
from sparse_onnx.model.encodings import Dense
from sparse_onnx.model.integer_grid import read_grid
from sparse_onnx.model.quantized_weights import QuantizedWeight, quantized_weights
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.base import Declined, PassContext, PassResult, Pipeline, Stage
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.presets import PREPARATION_PASSES
from sparse_onnx.passes.quantize.by_bits import UsualGrid
from sparse_onnx.passes.quantize.open_blocks import OpenBlocks
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.timing.choose import Bench
from sparse_onnx.verification.layer_errors import layer_errors

__all__ = ["Prepared", "planned", "prepare"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model before layers are decided on.

    Attributes:
        before: Its weights as they were when it was cleaned up, by name.
        cleaned, opened, removed, pruned, quantized, others: What the passes did, by stage; ``opened`` is what let
            weights in packed blocks have other forms.
        originals: The weights as they were before they were pruned, but for those that were quantized.
        few_bits: The weights that are stored as integers, whoever quantized them.
        held_out_errors: Of the outputs of pruned layers on data that nothing was pruned with, by weight.
    """

    before: Mapping[str, ir.TensorProtocol | None]
    cleaned: PassResult
    opened: PassResult
    removed: PassResult
    pruned: PassResult
    quantized: PassResult
    others: PassResult
    originals: Originals
    few_bits: tuple[QuantizedWeight, ...]
    held_out_errors: Mapping[str, float]

    @property
    def declined(self) -> tuple[Declined, ...]:
        """What was left alone."""
        results = (self.cleaned, self.opened, self.removed, self.pruned, self.quantized, self.others)
        return tuple(place for result in results for place in result.declined)

    @property
    def errors(self) -> dict[str, float | None]:
        """Of the outputs of pruned layers on the data that they were pruned with, by weight."""
        return {change.name: change.error for change in self.pruned.layers}


def planned(pipeline: Pipeline) -> Pipeline:
    """What stands for the passes in a plan."""
    stand_ins = (modifier.stand_in() for modifier in pipeline.passes)
    return Pipeline(tuple(step for step in stand_ins if step is not None))


def prepare(
    job: Job,
    source: Source,
    model: ir.Model,
    pipeline: Pipeline,
    context: PassContext,
    inputs: Inputs | None = None,
    bench: Bench | None = None,
) -> Prepared:
    """Change ``model`` by the passes of ``pipeline``. In a plan, which runs nothing, there are neither ``inputs`` nor a
    ``bench``."""
    cleaned = Pipeline(PREPARATION_PASSES)(model, context)
    opened = Pipeline(_opening(job, pipeline))(model, context)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    dense = model.clone() if inputs is not None and inputs.held_out is not None else None
    removing, pruning, quantizing, rest = (
        Pipeline(tuple(step for step in pipeline.passes if first <= step.stage < end))
        for first, end in itertools.pairwise((Stage.CLEAN, Stage.PRUNE, Stage.QUANTIZE, Stage.FUSE, math.inf))
    )
    removed = removing(model, context)
    originals = Originals.of(model)
    spared = _spared(job, source, model, pruning, quantizing, inputs, bench)
    whole = model.clone() if pruning.passes and quantizing.passes else None
    pruned = pruning(model, dataclasses.replace(context, spared=spared))
    exact = Originals.of(model)
    quantized = quantizing(model, dataclasses.replace(context, dense=whole))
    originals = originals.without(state.name for state in exact.changed(model))
    others = rest(model, context)
    errors = {}
    if dense is not None and inputs is not None:
        errors = _errors_on_held_out(job, dense, model, pipeline, inputs)
    few_bits = tuple(quantized_weights(model))
    return Prepared(before, cleaned, opened, removed, pruned, quantized, others, originals, few_bits, errors)


def _opening(job: Job, pipeline: Pipeline) -> tuple[OpenBlocks, ...]:
    """What lets layers in packed blocks have other forms, where other arithmetic than that of floats is allowed; those
    that a step of ``pipeline`` gives other bits become floats first."""
    if job.recipe.target.precision == FLOAT32:
        return ()
    steps = [step for step in pipeline.passes if isinstance(step, QuantizeWeights)]
    return (OpenBlocks(steps[0].bits, steps[0].targets, steps[0].ignore) if steps else OpenBlocks(),)


def _spared(
    job: Job,
    source: Source,
    model: ir.Model,
    pruning: Pipeline,
    quantizing: Pipeline,
    inputs: Inputs | None,
    bench: Bench | None,
) -> dict[str, str]:
    """The weights that are not to be pruned, since it would gain nothing, with the reasons."""
    if job.recipe.goal.keep_pruned or not prunes(pruning.passes):
        return {}
    spared = without_kernel(model)
    curves_of = None if bench is None else _curves(job, model, bench)
    if curves_of is None or inputs is None:
        return spared
    return spared | below_break_even(
        model,
        pruning.passes,
        run_dense(source, inputs, model, find_candidates(model)[0], ()).shapes,
        curves_of,
        weights=inputs.weights,
        min_speedup=job.recipe.goal.min_speedup,
        grid_of=functools.partial(_integer_grid, job, quantizing),
        progress=job.say,
    )


def _integer_grid(job: Job, quantizing: Pipeline, weight: Weight) -> UsualGrid | None:
    """The grid that ``weight`` is or will be on, if it may be multiplied as integers."""
    if job.recipe.target.precision == FLOAT32:
        return None
    if not isinstance(weight.encoding, Dense):
        own = read_grid(weight)
        weight.release()
        if isinstance(own, str):
            return None
        return UsualGrid(own.bits, own.group_size if own.group_size < own.inputs else 0, own.symmetric)
    for step in quantizing.passes:
        if isinstance(step, QuantizeWeights) and step.reason_against(weight) is None:
            grid = step.grid_for(weight)
            return UsualGrid(grid.bits, grid.group_size, grid.symmetric)
    return None


def _curves(job: Job, model: ir.Model, bench: Bench) -> CurvesOf | None:
    if job.benchmark:
        return measured_curves(model, bench)
    return None if job.table is None else tabulated_curves(job.table)


def _errors_on_held_out(
    job: Job, dense: ir.Model, pruned: ir.Model, pipeline: Pipeline, inputs: Inputs
) -> dict[str, float]:
    """Of every pruned layer, on inputs such as its method saw."""
    assert inputs.held_out is not None
    assert inputs.calibration is not None
    behind_pruned = any(modifier.sees_pruned_inputs for modifier in pipeline.passes)
    try:
        return layer_errors(
            dense,
            pruned,
            inputs.held_out,
            inputs.calibration.options,
            work=job.work,
            behind_pruned=behind_pruned,
            progress=job.say,
        )
    except UsageError as error:  # of the data: no reason to lose what was pruned
        job.say(f"warning: no errors on held-out data: {error}")
        return {}
