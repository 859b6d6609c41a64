"""The inputs of a compilation: what passes are calibrated with, what the result is verified and timed with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.compilation.job import Job
from sparse_onnx.compilation.load import Source
from sparse_onnx.data.inputs import Feeds, InputSpec, sample_count
from sparse_onnx.data.samples import Samples, open_samples
from sparse_onnx.passes.base import CalibrationData, Pipeline
from sparse_onnx.passes.calibration import Options as CalibrationOptions
from sparse_onnx.running.input_choice import Choice
from sparse_onnx.running.requests import Phase, choose_targets, phase_of
from sparse_onnx.verification.metrics import Metric, open_metric

__all__ = ["Inputs", "measure_original", "open_inputs"]

_MAX_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the models of a compilation are run on.

    Attributes:
        samples: Batches to verify with: real ones if there are any, that nothing is calibrated with.
        timed: Generated ones to time with, one for each target.
        choices: The inputs of every target.
        weights: How much each target counts; None: the worst decides.
        generated: Whether there is no real data, so that ``samples`` are ``timed``.
        calibration: Real inputs for the passes; None if none needs them.
        held_out: The real samples, as far as passes were calibrated with others.
        labelled: What a metric can be measured on, labels included; None without real data.
    """

    samples: tuple[Feeds, ...]
    timed: tuple[Feeds, ...]
    choices: tuple[Choice, ...]
    weights: tuple[float, ...] | None
    generated: bool
    calibration: CalibrationData | None
    held_out: Samples | None
    labelled: Samples | None

    @property
    def targets(self) -> list[dict[str, tuple[int, ...]]]:
        """The shape of every input at every target."""
        return [choice.shapes for choice in self.choices]

    @property
    def phases(self) -> list[Phase | None]:
        """What is done at every target; None of models that are no decoder with a cache."""
        return [phase_of(choice.specs, choice.shapes) for choice in self.choices]


@dataclasses.dataclass(frozen=True)
class _Data:
    """Real inputs; ``held`` and ``labelled`` are those that nothing is calibrated with, as far as there are any."""

    known: Samples
    held: Samples
    labelled: Samples
    calibration: CalibrationData | None

    @property
    def is_split(self) -> bool:
        return self.calibration is not None and self.held is not self.known


def open_inputs(job: Job, source: Source, model: ir.Model, pipeline: Pipeline) -> Inputs:
    """Where ``pipeline`` needs real inputs, most of those that are given are for that, and an eighth is held out."""
    data = None if job.recipe.calibration.data is None else _open_data(job, source, pipeline)
    samples = () if data is None else tuple(_first(data.held, source.specs))
    held_out = data.held.part(0, len(samples)) if data is not None and data.is_split else None
    seen = [next(iter(data.known))] if data is not None and samples else []
    target = job.recipe.target
    found = choose_targets(model, source.specs, target.all_shapes, target.weights, target.request, seen)
    choices = found.choices
    lines = [line for choice in choices for line in choice.notes("to decide for another")]
    for line in dict.fromkeys([*lines, found.note] if found.note else lines):
        job.say(f"note: {line}")
    timed = tuple(choice.feeds(job.recipe.calibration.seed) for choice in choices)
    return Inputs(
        samples or timed,
        timed,
        choices,
        found.weights,
        not samples,
        None if data is None else data.calibration,
        held_out,
        None if data is None else data.labelled,
    )


def _open_data(job: Job, source: Source, pipeline: Pipeline) -> _Data:
    given, goal = job.recipe.calibration, job.recipe.goal
    assert given.data is not None
    labels = goal.labels if goal.metric_data is None else None
    labelled = open_samples(
        given.data,
        source.specs,
        limit=given.num_calibration_samples,
        batch=given.batch_size,
        tokenizer=given.tokenizer,
        labels=labels,
    )
    known = labelled if labels is None else labelled.without(labels)
    if not any(modifier.needs_calibration for modifier in pipeline.passes):
        return _Data(known, known, labelled, None)
    count = len(known)
    kept = count - max(1, count // 8) if count > 1 else 1
    statistics = None if known.weighted else job.statistics  # which no file holds of sources with weights
    calibration = CalibrationData(
        known.part(0, kept),
        job.work,
        CalibrationOptions(mask=given.padding_mask, threads=job.threads),
        statistics if given.statistics is None else Path(given.statistics),
        None if given.checkpoint is None else Path(given.checkpoint),
    )
    if count > 1:
        return _Data(known, known.part(kept, count), labelled.part(kept, count), calibration)
    job.say("warning: one batch only: the result is measured on the data that it was made with")
    return _Data(known, known, labelled, calibration)


def _first(batches: Samples, specs: Sequence[InputSpec]) -> Iterator[Feeds]:
    """As many batches as have ``_MAX_SAMPLES`` samples together."""
    count = 0
    for feeds in batches:
        yield feeds
        count += sample_count(feeds, specs)
        if count >= _MAX_SAMPLES:
            return


def measure_original(job: Job, source: Source, inputs: Inputs, model: ir.Model) -> Metric | None:
    """The metric that the goal names, measured of the original; None if it names none."""
    goal, given = job.recipe.goal, job.recipe.calibration
    if goal.metric is None:
        return None
    samples = inputs.labelled
    if goal.metric_data is not None:
        samples = open_samples(
            goal.metric_data,
            source.specs,
            batch=given.batch_size,
            tokenizer=given.tokenizer,
            labels=goal.labels,
        )
    with job.clock("measure the metric of the original"):
        return open_metric(
            goal.metric,
            model,
            list(samples or ()),
            labels=goal.labels,
            output=goal.metric_output,
            threads=job.threads,
        )
