"""Verify an optimized model against its original: same inputs, outputs compared, in bounded memory.

Two differences, never mixed up:

- *against the pruned dense model*, the one that the optimized model stands for, its stored weights unpacked
  (:mod:`.dense_reference`): what the compiler got wrong. Next to nothing, whatever was pruned.
- *against the original*: what was lost altogether, most of it by pruning.

One model is open at a time, and outputs wait on disk: all runs fit into the memory of one.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sparse_onnx.data.inputs import (
    Feeds,
    InputSpec,
    Value,
    generate,
    input_specs,
    plain_values,
    typed_value,
)
from sparse_onnx.data.samples import Samples, open_samples
from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.model.probe import uses_library
from sparse_onnx.options import require
from sparse_onnx.passes.calibration import Options as CalibrationOptions
from sparse_onnx.running.fix_inputs import fix_inputs, fixed_values
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.input_choice import Choice, explaining_guesses
from sparse_onnx.running.outputs import check_outputs, left_out
from sparse_onnx.running.recording import record
from sparse_onnx.running.request import Request
from sparse_onnx.running.requests import choose_targets, phase_of
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.units import format_number
from sparse_onnx.verification.comparison import Difference, compare
from sparse_onnx.verification.compiler_error import CompilerError, judge
from sparse_onnx.verification.dense_reference import dense_reference
from sparse_onnx.verification.layer_trace import LayerTrace, trace_layers
from sparse_onnx.verification.likeness import PROFILE_FILE, Profile, profile_of, unlikeness, warn_of
from sparse_onnx.verification.metrics import Measure, MetricResult, open_metric
from sparse_onnx.verification.predictions import confirm, find_heads, make_probe
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR
from sparse_onnx.verification.yardstick import exceeding

__all__ = ["Miss", "Thresholds", "VerifyResult", "verify"]

_SHORT = 17
"""A second size for generated inputs: odd and prime, so that no vector width or tile divides it."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What passes; None is not judged.

    Attributes:
        max_compiler_error: ‖optimized − pruned dense‖ / ‖pruned dense‖ of an output, at most, unless rounding explains
            more, see :mod:`.compiler_error`.
        max_relative_error: ‖optimized − original‖ / ‖original‖ of an output, at most. If no loss is judged at all it is
            1e-4, too: models that should agree.
        max_abs_error: The largest absolute difference from the original, at most.
        min_cosine: The mean cosine to the original over samples, at least.
        min_top1_agreement: The share of rows with the same largest element as in the original, at least.
        max_kl: The mean KL divergence (in nats) from the original at an output with logits, at most.
        max_drop: What the metric may lose, see :func:`.quality.drop`; without a metric of 1 − cosine.
        by_default: Whether ``max_relative_error`` is the default, which allows what rounding explains, too.
    """

    max_compiler_error: float = MAX_COMPILER_ERROR
    max_relative_error: float | None = None
    max_abs_error: float | None = None
    min_cosine: float | None = None
    min_top1_agreement: float | None = None
    max_kl: float | None = None
    max_drop: float | None = None
    by_default: bool = dataclasses.field(default=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            if value is None:
                continue
            low, high = {"min_cosine": (-1, 1), "min_top1_agreement": (0, 1)}.get(name, (0, math.inf))
            allowed = "0 or more" if high == math.inf else f"in [{low}, {high}]"
            require(low <= value <= high and math.isfinite(value), name, value, allowed)

    def to_dict(self) -> dict[str, float | None]:
        """By name, without ``by_default``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "by_default"}

    def with_default(self) -> Thresholds:
        """With the default for the loss if none is judged."""
        judged = self.to_dict()
        del judged["max_compiler_error"]
        if any(value is not None for value in judged.values()):
            return self
        return dataclasses.replace(self, max_relative_error=MAX_COMPILER_ERROR, by_default=True)


@dataclasses.dataclass(frozen=True)
class Miss:
    """A threshold that was missed: its name in :class:`Thresholds`, what was ``found`` where it is missed by most, and
    what is ``allowed``. ``reference`` is "pruned dense model" or "original"; ``way`` is how the optimized model was
    run, ``output`` which one it is; both are "" for a metric."""

    threshold: str
    reference: str
    way: str
    output: str
    found: float
    allowed: float

    def __str__(self) -> str:
        what = {
            "max_compiler_error": "relative error",
            "max_relative_error": "relative error",
            "max_abs_error": "largest difference",
            "min_cosine": "cosine",
            "min_top1_agreement": "top-1 agreement",
            "max_kl": "KL divergence",
            "max_drop": "1 - cosine" if self.output else "drop of the metric",
        }[self.threshold]
        value = f"{self.found:.6g}" if self.threshold.startswith("min_") else format_number(self.found)
        place = f" at output {self.output!r}" if self.output else ""
        run = f", run {self.way.replace('_', ' ')}" if self.way else ""
        return (
            f"{what} {value}{place}{run}, against the {self.reference}; allowed {self.allowed:g} "
            f"(--{self.threshold.replace('_', '-')})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no Inf and NaN: None there."""
        values = dataclasses.asdict(self)
        return {**values, "found": self.found if math.isfinite(self.found) else None}


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """How far the optimized model lies from the pruned dense one and from the original.

    Attributes:
        against_original: By how the optimized model was run: ``with_library`` (missing if it holds no operator of
            ours, so that nothing would change) and ``without_library``.
        against_pruned_dense: The same; {} if it holds no operator of ours, so that it is its own pruned dense model.
        thresholds: What was judged by.
        metric: Before and after, if one was asked for.
        trace: The errors inside, layer by layer: if asked for, or if a threshold is missed.
        inputs: One line for each set of inputs that was run.
        skipped: Shapes that the original refuses, each with the reason.
        batches: How many times each model was run.
        compiler: :attr:`against_pruned_dense` as it was judged.
        left_out: Outputs that are no tensors and were not compared: what they are by their name.
        unlikeness: How unlike the data is to that which the optimized model was pruned with, see :mod:`.likeness`;
            None without data, or if nothing is known of that.
    """

    against_original: Mapping[str, Difference]
    against_pruned_dense: Mapping[str, Difference]
    thresholds: Thresholds
    metric: MetricResult | None
    trace: LayerTrace | None
    inputs: tuple[str, ...]
    skipped: tuple[str, ...]
    batches: int
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compiler: Mapping[str, CompilerError] = dataclasses.field(default_factory=dict)
    unlikeness: float | None = None

    @property
    def misses(self) -> tuple[Miss, ...]:
        """The thresholds that were missed; NaN misses every one."""
        return tuple(_misses(self.against_original, self.compiler, self.metric, self.thresholds))

    @property
    def passed(self) -> bool:
        """True if no threshold was missed."""
        return not self.misses

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no Inf and NaN: None there."""
        return {
            "passed": self.passed,
            "misses": [miss.to_dict() for miss in self.misses],
            "thresholds": self.thresholds.to_dict(),
            "batches": self.batches,
            "left_out": dict(self.left_out),
            "inputs": list(self.inputs),
            "skipped": list(self.skipped),
            "against_pruned_dense": {k: found.to_dict() for k, found in self.against_pruned_dense.items()},
            "against_original": {k: found.to_dict() for k, found in self.against_original.items()},
            "rounding": {way: error.rounding_document() for way, error in self.compiler.items()},
            "metric": None if self.metric is None else self.metric.to_dict(),
            "trace": None if self.trace is None else self.trace.to_dict(),
            "unlikeness": self.unlikeness,
        }


def verify(
    original: str | Path,
    optimized: str | Path,
    *,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    num_samples: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
    input_values: Mapping[str, Any] | None = None,
    max_compiler_error: float = MAX_COMPILER_ERROR,
    max_relative_error: float | None = None,
    max_abs_error: float | None = None,
    min_cosine: float | None = None,
    min_top1_agreement: float | None = None,
    max_kl: float | None = None,
    metric: str | Measure | None = None,
    labels: str | None = None,
    metric_output: str | None = None,
    max_drop: float | None = None,
    layers: bool | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> VerifyResult:
    """Run both models on the same inputs and compare their outputs, and the optimized model with its pruned dense one.
    Of outputs that hold logits the predictions are compared too; on real text, perplexity as well if the original is a
    causal language model.

    Args:
        original, optimized: ``.onnx`` files.
        data: Real inputs: an .npz (one array an input, samples along the first axis), a folder of .npz,
            ``module:function``, or a text file with ``tokenizer``, a folder. Without it inputs are generated: at the
            target shapes, and again at smaller odd ones where dimensions are symbolic.
        num_samples: Use so many of them; None: all.
        input_shapes: Target shapes of generated inputs, by input name; a sequence of these for several targets.
        input_values: Values for inputs that steer the graph, by name, where the data has none. Those that the optimized
            model has as constants (``fixed_inputs`` of ``optimize``) are known from it.
        max_compiler_error, max_relative_error, max_abs_error, min_cosine, min_top1_agreement, max_kl, max_drop: What
            passes, see :class:`Thresholds`.
        metric: A metric to measure of both on ``data``, see :mod:`.metrics`.
        labels: The array of the data with the labels that the metric needs.
        metric_output: The output that the metric is of.
        layers: Compare the values inside, too, see :mod:`.layer_trace`; None: if a threshold is missed.
        threads: Intra-op threads; None: all cores of this process.
        seed: Of generated inputs.
        progress: Called with one line of text at every step.

    Raises:
        VerificationError: The models differ in their inputs, or in the names or shapes of their outputs.
        UsageError: A wrong argument or data file, or a model that ONNX Runtime refuses.
        HostError: onnxruntime or the kernel library is missing.
    """
    thresholds = Thresholds(
        max_compiler_error,
        max_relative_error,
        max_abs_error,
        min_cosine,
        min_top1_agreement,
        max_kl,
        max_drop,
    ).with_default()
    say = progress or (lambda _line: None)
    paths = (Path(original), Path(optimized))
    models = (model_io.load_model(paths[0]), model_io.load_model(paths[1]))
    check_outputs(models[0], say)
    specs = _specs(models, plain_values(input_values) or {})
    _check_interfaces(models, specs)
    heads = find_heads(models[0])
    if max_kl is not None and not heads:
        raise UsageError("max_kl: no output of the original is known to hold logits")
    if data is not None and input_shapes:
        raise UsageError("give real inputs or input shapes, not both: the shapes are those of the data")
    if data is None and (labels is not None or tokenizer is not None):
        raise UsageError("labels and tokenizer belong to real inputs: give data, too")
    choices: list[Choice] = []
    if data is not None:
        samples = open_samples(data, specs, limit=num_samples, tokenizer=tokenizer, labels=labels)
        batches, required = list(samples), None
        tried = [f"{data}: {len(batches)} batches"]
    else:
        asked = input_shapes or {}
        wanted = [asked] if isinstance(asked, Mapping) else list(asked)
        choices = list(choose_targets(models[0], specs, wanted, None, Request()).choices)
        batches, required = _generated(choices, seed, say)
        tried = [f"generated: {_describe(feeds)}" for feeds in batches]
    opened = None
    if metric is not None:
        say("measuring the metric of the original")
        opened = open_metric(
            metric,
            models[0],
            batches if data is not None else [],
            labels=labels,
            output=metric_output,
            threads=threads,
        )
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as scratch, model_io.Spool(scratch) as spool:
        work = Path(scratch)
        bench = Workbench(threads or available_cores(), work, progress=say)
        probe = make_probe(heads, batches[0]) if data is not None else None
        unlike = None
        if data is not None and (profile := paths[1].parent / PROFILE_FILE).is_file():
            unlike = _unlikeness(Profile.load(profile), paths[0], specs, samples, bench)
        say("running the original")
        with explaining_guesses(choices):
            reference, skipped = record(
                models[0],
                paths[0],
                batches if probe is None else [*batches, probe.feeds],
                work / "original",
                bench,
                library=False,
                required=required,
            )
        heads = confirm(heads, probe, reference[0], {} if probe is None else reference.pop())
        batches = [feeds for index, feeds in enumerate(batches) if index not in skipped]
        dense = dense_reference(models[1], spool.put) if uses_library(models[1]) else None
        if dense is not None:
            say("running the pruned dense model")
            unpacked, _ = record(dense, None, batches, work / "dense", bench, library=False)
        against_original, against_dense = {}, {}
        for way in ("with_library", "without_library") if dense is not None else ("without_library",):
            say(f"running the optimized model {way.replace('_', ' ')}")
            library = way == "with_library"
            outputs, _ = record(models[1], paths[1], batches, work / way, bench, library=library)
            against_original[way] = compare(reference, outputs, heads, batches)
            if dense is not None:
                against_dense[way] = compare(unpacked, outputs)
            del outputs
        measured = None
        if opened is not None:
            say("measuring the metric of the optimized model")
            measured = opened.compare(models[1], threads=threads)
        compiler = {
            way: judge(
                dense,
                models[1],
                batches,
                found,
                bench,
                threshold=max_compiler_error,
                library=way == "with_library",
            )
            for way, found in against_dense.items()
            if dense is not None
        }
        misses = list(_misses(against_original, compiler, measured, thresholds))
        trace = None
        if layers or (layers is None and misses):
            # A fault of the compiler is looked for first: it may be all of the loss.
            fault = next((miss for miss in misses if miss.threshold == "max_compiler_error"), None)
            way = misses[0].way if misses else ""
            try:
                trace = (
                    compiler[fault.way].trace
                    if fault is not None
                    else trace_layers(
                        models[0],
                        models[1],
                        batches,
                        bench,
                        threshold=max_compiler_error,
                        library=dense is not None and way != "without_library",
                        title="original",
                    )
                )
            except UsageError as error:  # of a model that runs as it is, but not with its values given out
                if layers:
                    raise
                say(f"warning: layers could not be compared: {error}")
    ran = tuple(line for index, line in enumerate(tried) if index not in skipped)
    refused = tuple(f"{tried[index]}: {reason}" for index, reason in skipped.items())
    return VerifyResult(
        against_original,
        against_dense,
        thresholds,
        measured,
        trace,
        ran,
        refused,
        len(batches),
        left_out(models[0]),
        compiler,
        unlike,
    )


def _unlikeness(
    known: Profile,
    original: Path,
    specs: Sequence[InputSpec],
    samples: Samples,
    bench: Workbench,
) -> float | None:
    """How unlike ``samples`` are to the data of ``known``, said where they are."""
    model = model_io.load_model(original)
    fix_inputs(model, specs)
    options = CalibrationOptions(threads=bench.threads)
    profile = profile_of(model, samples, options, work=bench.work, like=known, progress=bench.progress)
    found = unlikeness(known, profile)
    warn_of(found, samples.source, bench.progress)
    return found


def _misses(
    against_original: Mapping[str, Difference],
    compiler: Mapping[str, CompilerError],
    metric: MetricResult | None,
    thresholds: Thresholds,
) -> Iterator[Miss]:
    """Of every threshold that is missed the place where it is missed by most. What rounding explains misses neither
    that of the compiler nor the default for models that should agree."""
    faults = {way: error for way, error in compiler.items() if error.at_fault}
    if faults:
        way = max(faults, key=lambda way: _rank(faults[way].worst.relative_error))
        worst = faults[way].worst
        yield Miss(
            "max_compiler_error",
            "pruned dense model",
            way,
            worst.worst_output,
            worst.relative_error,
            thresholds.max_compiler_error,
        )
    figures = _figures(against_original)
    if thresholds.by_default:
        figures["max_relative_error"] = [
            (at.relative_error, way, at.worst_output)
            for way, difference in against_original.items()
            for at in exceeding(
                difference, MAX_COMPILER_ERROR, compiler[way].rounding if way in compiler else {}
            )
        ]
    if metric is not None:
        figures["max_drop"] = [(metric.drop, "", "")]
    for name, places in figures.items():
        yield from _worst(name, "original", places, getattr(thresholds, name))


_Place = tuple[float, str, str]  # a figure, the way and the output


def _figures(differences: Mapping[str, Difference]) -> dict[str, list[_Place]]:
    """What each threshold of the loss is about, in all ways and at all outputs."""
    figures: dict[str, list[_Place]] = {field.name: [] for field in dataclasses.fields(Thresholds)[1:-1]}
    for way, difference in differences.items():
        predictions = {found.output: found for found in difference.predictions}
        for at in difference.outputs:
            name = at.worst_output
            agreement = predictions[name].top1_agreement if name in predictions else at.top1_agreement
            figures["max_relative_error"].append((at.relative_error, way, name))
            figures["max_abs_error"].append((at.max_abs, way, name))
            figures["min_cosine"].append((at.cosine, way, name))
            figures["min_top1_agreement"].append((agreement, way, name))
            figures["max_drop"].append((1 - at.cosine, way, name))
            if name in predictions:
                figures["max_kl"].append((predictions[name].kl_divergence, way, name))
    return figures


def _worst(name: str, reference: str, places: Sequence[_Place], allowed: float | None) -> Iterator[Miss]:
    if allowed is None or not places:
        return
    sign = -1 if name.startswith("min_") else 1
    found, way, output = max(places, key=lambda place: _rank(sign * place[0]))
    if not sign * found <= sign * allowed:
        yield Miss(name, reference, way, output, found, allowed)


def _rank(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure


def _generated(choices: Sequence[Choice], seed: int, say: Callable[[str], None]) -> tuple[list[Feeds], int]:
    """Inputs at every target, then at other shapes than the first, of decoders than any; and how many of them are for
    targets."""
    every: list[dict[str, tuple[int, ...]]] = []
    for choice in choices:
        for line in choice.notes("for another"):
            say(f"note: {line}")
        if choice.shapes not in every:
            every.append(choice.shapes)
    required = len(every)
    for index, choice in enumerate(choices):
        if index and phase_of(choice.specs, choice.shapes) is None:
            continue  # other sizes do the same
        other = choice.others(_SHORT)
        if other is not None and other not in every:
            every.append(other)
    return [generate(choices[0].specs, shapes, seed + i) for i, shapes in enumerate(every)], required


def _specs(models: Sequence[ir.Model], values: Mapping[str, Value]) -> tuple[InputSpec, ...]:
    """The inputs of the original; those that are constants of the optimized model have its values."""
    constants = fixed_values(models[1])
    names = {value.name for value in models[0].graph.inputs}
    specs = input_specs(models[0], {}, {name: v for name, v in constants.items() if name in names})
    for spec in specs:
        if spec.fixed and spec.name in values and typed_value(spec, values[spec.name]) != spec.value:
            raise UsageError(f"--input {spec.name}: the optimized model has it fixed to {spec.value}")
    free = {name: value for name, value in values.items() if name not in constants}
    fixed = {spec.name: spec.value for spec in specs if spec.fixed}
    return input_specs(models[0], free, fixed)


def _check_interfaces(models: Sequence[ir.Model], specs: Sequence[InputSpec]) -> None:
    other = {spec.name: spec for spec in input_specs(models[1])}
    specs = [spec for spec in specs if not spec.fixed]
    names = {spec.name for spec in specs}
    if names != other.keys():
        raise VerificationError(f"the models differ in their inputs: {_only(names, set(other))}")
    for spec in specs:
        same = other[spec.name]
        ranks = {len(shape) for shape in (spec.shape, same.shape) if shape is not None}
        if spec.dtype != same.dtype or len(ranks) > 1:
            raise VerificationError(
                f"the models differ in an input: {spec.describe()} in the original, "
                f"{same.describe()} in the optimized"
            )
    outputs = [{value.name or "" for value in model.graph.outputs} for model in models]
    if outputs[0] != outputs[1]:
        raise VerificationError(f"the models differ in their outputs: {_only(*outputs)}")


def _only(first: set[str], second: set[str]) -> str:
    parts = [
        f"{', '.join(sorted(names))} only in the {where}"
        for names, where in ((first - second, "original"), (second - first, "optimized"))
        if names
    ]
    return "; ".join(parts)


def _describe(feeds: Feeds) -> str:
    return ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
