"""What a report says, key by key: the types that whoever writes a part of it is checked by, and of which its JSON
schema is made (:mod:`sparse_onnx.report.schema`).

Every key has a description in its annotation, and :class:`Limits` where its type allows more than is meant.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, NotRequired, TypedDict

__all__ = [
    "SCHEMA_VERSION",
    "SPARSE_FORMS",
    "Budget",
    "CurvePoint",
    "CurveRow",
    "DeclinedRow",
    "DifferenceDocument",
    "Environment",
    "GateRow",
    "GoalDocument",
    "LayerRow",
    "Level",
    "Limits",
    "MetricRow",
    "Nothing",
    "OperatorTime",
    "ParetoPoint",
    "PhaseName",
    "PredictionRow",
    "ProfileDocument",
    "QuantizedRow",
    "Report",
    "SearchDocument",
    "StageRow",
    "Summary",
    "TargetRow",
    "TimeShares",
    "UntouchedRow",
    "VerificationDocument",
    "WholeTimes",
    "Written",
    "finite",
]

SCHEMA_VERSION: Literal[2] = 2

SPARSE_FORMS = ("sparse", "int8-quads", "int8-given-quads", "int8-bitmap", "int4-bitmap", "int4-of-16")
"""The decisions by which a layer's zeros are neither stored nor multiplied by."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a value is held to beside its type, by the words of JSON Schema: numbers are at least ``minimum``, at most
    ``maximum``, above ``exclusive_minimum``; lists have ``min_items``, texts ``min_length`` characters."""

    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    min_items: int | None = None
    min_length: int | None = None


Count = Annotated[int, Limits(minimum=0)]
FromOne = Annotated[int, Limits(minimum=1)]
CountOrNone = Annotated[int | None, Limits(minimum=0)]
Number = float | None
Positive = Annotated[float, Limits(minimum=0)]
PositiveOrNone = Annotated[float | None, Limits(minimum=0)]
Share = Annotated[float, Limits(minimum=0, maximum=1)]
ShareOrNone = Annotated[float | None, Limits(minimum=0, maximum=1)]
Shape = list[Count]
Level = Literal["all", "basic", "disabled"]
Written = Literal["compiled", "pruned", "original"]
PhaseName = Literal["prefill", "decode"]
Shapes = dict[str, Shape]


def finite(figure: float | None) -> float | None:
    """A figure as JSON can hold it: None if it is no finite number."""
    return None if figure is None or not math.isfinite(figure) else figure


class Nothing(TypedDict):
    """An empty object."""


class WholeTimes(TypedDict):
    """Times of a whole model, as a summary and each of its targets have them; see there."""

    dense_ms: float | None
    optimized_ms: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None


class Environment(TypedDict):
    """The machine and the software that the numbers hold for."""

    cpu: Annotated[str, "The processor's name, as the system gives it."]
    cores: Annotated[FromOne, "Cores that the process could use."]
    isa: Annotated[str, "Instruction set of the active kernels."]
    threads: Annotated[FromOne, "Threads that were decided and timed for."]
    system: Annotated[str, "Operating system and architecture."]
    python: Annotated[str, "Version of Python."]
    versions: Annotated[dict[str, str], "Version of every package that matters, by name."]
    seed: Annotated[Count, "Of generated inputs and of random pruning."]


class MetricRow(TypedDict):
    """A metric, measured before and after."""

    name: Annotated[str, "Built in, or module:function."]
    before: Annotated[Number, "Of the original."]
    after: Annotated[Number, "Of the result; null if it is infinite."]
    drop: Annotated[
        Number,
        "before - after, or (after - before) / before where lower is better; null if it is infinite.",
    ]
    lower_is_better: Annotated[bool, "Whether the metric is better where it is lower."]
    samples: Annotated[Count, "How many it was measured on."]


class Summary(TypedDict):
    """The whole model before and after."""

    dense_ms: Annotated[PositiveOrNone, "Median time of the original."]
    optimized_ms: Annotated[PositiveOrNone, "Median time of the result."]
    speedup: Annotated[
        PositiveOrNone, "Median over interleaved rounds of the original's time / the result's."
    ]
    speedup_low: Annotated[PositiveOrNone, "Lower end of its 95 % interval."]
    speedup_high: Annotated[PositiveOrNone, "Upper end of its 95 % interval."]
    bytes_before: Annotated[Count, "What the original's files take, as far as it uses them."]
    bytes_after: Annotated[CountOrNone, "The same of the result; null after a plan."]
    sparsity: Annotated[Share, "Share of zeros in the weights of 'layers'."]
    sparse_flops_fraction: Annotated[
        Share,
        "Share of all dense multiplications of the model, as far as they could be counted, that "
        "layers do which are not dense.",
    ]
    relative_error: Annotated[
        PositiveOrNone, "verification.against_original.relative_error, the loss of the whole."
    ]
    cosine: Annotated[Number, "verification.against_original.cosine."]
    written: NotRequired[
        Annotated[
            Written,
            "What was written: a compiled model (sparse layers, or smaller ones), a pruned one that is "
            "no faster and no smaller (keep_pruned), or the original as it was. Left out after a plan.",
        ]
    ]
    metric: Annotated[MetricRow | None, "The metric of the goal; null without one, and after a plan."]


class TargetRow(TypedDict):
    """The whole model at one set of input shapes."""

    input_shapes: Annotated[Shapes, "Shape of every input, by name."]
    weight: Annotated[PositiveOrNone, "Its weight among the targets; null: the worst target decides."]
    dense_ms: Annotated[PositiveOrNone, "Median time of the original."]
    optimized_ms: Annotated[PositiveOrNone, "Median time of the result."]
    speedup: Annotated[PositiveOrNone, "Median over rounds of the original's time / the result's."]
    speedup_low: Annotated[PositiveOrNone, "Lower end of its 95 % interval."]
    speedup_high: Annotated[PositiveOrNone, "Upper end of its 95 % interval."]
    quiet: Annotated[bool | None, "Whether no other program was in the way; null if it was not timed."]
    phase: NotRequired[
        Annotated[PhaseName, "Of a decoder with a cache: the prompt, or one more token behind it."]
    ]
    tokens: NotRequired[
        Annotated[Count, "Of a decoder with a cache: how many a run takes in, of all samples."]
    ]
    dense_tokens_per_second: NotRequired[Annotated[PositiveOrNone, "Of the original, at its median time."]]
    optimized_tokens_per_second: NotRequired[Annotated[PositiveOrNone, "Of the result."]]


class GateRow(TypedDict):
    """One goal, and whether it was reached."""

    name: Annotated[str, "Its key in the recipe's goal."]
    asked: Annotated[float, "What was asked for, in the unit of the goal."]
    reached: Annotated[Number, "What was reached, in the same unit."]
    met: Annotated[bool | None, "Whether that is enough; null if it was not measured."]
    text: Annotated[str, "The same as words."]


class GoalDocument(TypedDict):
    """What was to be kept or reached."""

    met: Annotated[bool | None, "Whether all gates are met; true without any, null if one was not measured."]
    gates: Annotated[list[GateRow], "Every goal that the recipe asks for."]


class PredictionRow(TypedDict):
    """How far the predictions at one output lie apart."""

    output: Annotated[str, "Name of the output."]
    rows: Annotated[Count, "Distributions that were compared, padding left out."]
    kl_divergence: Annotated[Number, "Mean of KL(reference || candidate) over rows, in nats."]
    top1_agreement: Annotated[ShareOrNone, "Share of rows with the same most probable class."]
    reference_perplexity: Annotated[
        PositiveOrNone,
        "Of the next token; null where the model is no causal language model.",
    ]
    candidate_perplexity: Annotated[PositiveOrNone, "The same of the candidate."]
    tokens: Annotated[Count, "Next tokens that the perplexities are over."]


class DifferenceDocument(TypedDict):
    """How far the outputs of two models lie apart, over all batches; of each figure that of the worst
    output."""

    max_abs: Annotated[PositiveOrNone, "Largest absolute difference, worst output."]
    max_relative: Annotated[
        PositiveOrNone, "The same / the largest absolute value of the reference, worst output."
    ]
    relative_error: Annotated[
        PositiveOrNone,
        "Euclidean norm of the difference / norm of the reference, worst output.",
    ]
    cosine: Annotated[Number, "Mean over samples of the cosine, worst output."]
    top1_agreement: Annotated[
        ShareOrNone,
        "Share of rows (last axis) whose largest element is the same one, worst output.",
    ]
    worst_output: Annotated[str, "The output with the largest relative error."]
    predictions: Annotated[
        list[PredictionRow],
        "Of each output that holds logits, how far the predictions lie apart.",
    ]
    outputs: Annotated[list[dict[str, Any]], "The figures of each output alone."]


class VerificationDocument(TypedDict):
    """The result run on the same inputs as others."""

    inputs: Annotated[str, "'generated', or where the real inputs came from."]
    batches: Annotated[Count, "How many times each model was run."]
    against_pruned_dense: Annotated[
        DifferenceDocument,
        "The compiler alone: the result with the kernel library against the pruned dense model.",
    ]
    without_library: Annotated[
        DifferenceDocument,
        "The compiler alone: the result on standard operators against the pruned dense model.",
    ]
    rounding: NotRequired[
        Annotated[
            dict[str, PositiveOrNone],
            "By output: the relative error of stock ONNX Runtime against itself on the pruned dense "
            "model. Left out unless the compiler's error was above max_compiler_error.",
        ]
    ]
    against_original: Annotated[
        DifferenceDocument,
        "The loss from compression: the result with the kernel library against the original.",
    ]
    rounded_activations: NotRequired[
        Annotated[
            DifferenceDocument,
            "Outputs against those of the same model with activations that are not rounded: what forms "
            "that compute in 8 bits lose by that.",
        ]
    ]
    unlikeness: NotRequired[
        Annotated[
            Positive,
            "How unlike the data is to the calibration data, by the energy of its layers' inputs in "
            "directions that the calibration data hardly has: 1 is alike, from 1.25 on unlike.",
        ]
    ]
    left_out: NotRequired[
        Annotated[
            dict[str, str],
            "Outputs that were not compared, as they are no tensors: what they are by their name.",
        ]
    ]
    optimization_levels: NotRequired[
        Annotated[
            dict[str, Level],
            "Graph optimizations of ONNX Runtime with which each model ran, if one of them did not run "
            "with all.",
        ]
    ]


class QuantizedRow(TypedDict):
    """A weight or a table that is stored as integers of few bits, or whose values were rounded to such."""

    name: Annotated[str, "The initializer."]
    module: Annotated[str, "Path of its module in the framework; empty if not known."]
    op_type: Annotated[str, "What multiplies by it; empty: nothing, it is a table, or it holds floats."]
    elements: Annotated[Count, "How many values it has."]
    bits: Annotated[CountOrNone, "Of an integer."]
    group_size: Annotated[CountOrNone, "Inputs that share a scale; 0: all of an output, or all."]
    encoding: Annotated[str, "How it is stored, in words; empty: as floats, or by rows."]
    bytes: Annotated[
        CountOrNone, "What it takes in the file: with scales and zero points, if it was rounded now."
    ]
    sparsity: Annotated[Share, "Share of zeros."]
    rounded: Annotated[bool, "Whether this run rounded it; otherwise it was so before."]
    pruned: Annotated[bool, "Whether this run made zeros in it."]
    output_error: Annotated[
        PositiveOrNone,
        "||X(W - W')|| / ||XW|| on the inputs that it was rounded or pruned with; null: not known.",
    ]
    output_error_held_out: Annotated[PositiveOrNone, "The same on inputs that nothing was rounded with."]


class LayerRow(TypedDict):
    """One weight that a kernel of the library could take."""

    name: Annotated[str, "Name of the weight."]
    module: Annotated[str, "Path of its module in the framework; empty if not known."]
    op_type: Annotated[str, "Operator that used it in the original."]
    shape: Annotated[Shape, "As stored: [K, N] of a linear."]
    rows: Annotated[CountOrNone, "Vectors that it multiplies in one run; null after a plan."]
    activations: Annotated[list[str], "Activations computed together with it."]
    sparsity: Annotated[Share, "Share of zeros."]
    non_finite: Annotated[Count, "Weights that are NaN or Inf."]
    mask_structure: Annotated[str, "Pattern of the zeros: unstructured, N:M or block:RxC."]
    decision: Annotated[
        Annotated[str, Limits(min_length=1)],
        "The form that it ships in, by name: dense or sparse.",
    ]
    reason: Annotated[str, "Why, with the numbers that decided."]
    pruning: NotRequired[
        Annotated[
            Literal["pruned", "given back", "never"],
            "What became of the weight: it ships with zeros that were made now, it has its original "
            "weights again, or it was never pruned.",
        ]
    ]
    pruning_reason: NotRequired[
        Annotated[
            str,
            "Why it was given back or never pruned; empty if it ships pruned.",
        ]
    ]
    kernel: Annotated[
        str,
        "What computes it: a kernel of the library by its name, 'dense', or the name of its form in"
        " a plan, which does not know the rows that decide which one.",
    ]
    times: Annotated[
        dict[str, Positive],
        "Median of the layer alone by form, dense among them, summed over its uses in one run; "
        "empty where it was not timed.",
    ]
    speedup_low: Annotated[
        PositiveOrNone,
        "Lower end of the 95 % interval of dense / its form; where dense is kept, of dense / the "
        "fastest other form.",
    ]
    speedup_high: Annotated[PositiveOrNone, "Upper end of the same."]
    close: Annotated[
        bool,
        "Whether an interval contains what the layer had to gain, over dense or another form: "
        "another run may decide otherwise.",
    ]
    cached: Annotated[bool, "Whether its times were measured in an earlier run."]
    quiet: Annotated[bool, "Whether no other program was in the way."]
    output_error: Annotated[PositiveOrNone, "||X(W - W')|| / ||XW|| on the inputs X that it was pruned with."]
    output_error_held_out: Annotated[PositiveOrNone, "The same on inputs that nothing was pruned with."]
    relative_error: Annotated[PositiveOrNone, "||W - W'|| / ||W||, Frobenius."]


class UntouchedRow(TypedDict):
    """Operators with matrix-like work that are no layer, of one kind and for one reason."""

    op_type: Annotated[str, "The operator, with its domain unless it is ONNX's own."]
    count: Annotated[Count, "How many there are."]
    share: Annotated[
        ShareOrNone,
        "Of all multiplications of the model; null where they could not be counted.",
    ]
    reason: Annotated[str, "Why no sparse kernel takes them."]


class DeclinedRow(TypedDict):
    """A place that a pass left as it was."""

    pass_name: Annotated[str, "The pass that left it."]
    place: Annotated[str, "Node or weight."]
    reason: Annotated[str, "Why it was left."]


class StageRow(TypedDict):
    """A step of the compilation."""

    name: Annotated[str, "Name of the step."]
    seconds: Annotated[Positive, "Wall-clock time."]
    peak_rss_mb: Annotated[Count, "Peak resident memory of the process so far, in MiB."]


class OperatorTime(TypedDict):
    """What all nodes of one operator take."""

    op_type: Annotated[str, "Operator, without its domain."]
    ms: Annotated[Positive, "Time of all of its nodes in one run."]


class TimeShares(TypedDict):
    """Where one run of a model spends its time."""

    wall_ms: Annotated[
        Annotated[float, Limits(exclusive_minimum=0)],
        "Time of one run, while it was profiled.",
    ]
    layers_ms: Annotated[Positive, "Of that, in the weights of 'layers'."]
    others: Annotated[list[OperatorTime], "Of that, in all other operators."]


class ProfileDocument(TypedDict):
    """Where the time goes before and after."""

    before: Annotated[TimeShares | None, "Of the original; null if it was not profiled."]
    after: Annotated[TimeShares | None, "Of the result; null if it was not profiled."]


class CurvePoint(TypedDict):
    """One measured point of a curve."""

    sparsity: Annotated[Share, "Share of zeros."]
    speedup: Annotated[Positive, "Dense time / time in that form, median."]
    speedup_low: NotRequired[Annotated[PositiveOrNone, "Lower end of its 95 % interval."]]
    speedup_high: NotRequired[Annotated[PositiveOrNone, "Upper end of its 95 % interval."]]


class CurveRow(TypedDict):
    """Speed over sparsity, of a layer in one form and pattern."""

    layer: Annotated[str | None, "As layers[].name; null: the whole model."]
    form: Annotated[Annotated[str, Limits(min_length=1)], "The form that was timed, as in layers[].decision."]
    mask_structure: Annotated[str, "Pattern of the zeros."]
    points: Annotated[
        Annotated[list[CurvePoint], Limits(min_items=1)], "Measured points, by rising sparsity."
    ]
    break_even: Annotated[
        ShareOrNone,
        "Share of zeros from which on the form is faster than dense; null: at no point measured.",
    ]
    chosen: Annotated[
        ShareOrNone,
        "Share of zeros that the layer ships with in this form and pattern; null: in none.",
    ]


class ParetoPoint(TypedDict):
    """A plan that no other one beats in speed, loss and size at once."""

    speedup: Annotated[Positive, "Of the whole model against the original."]
    speedup_low: NotRequired[Annotated[PositiveOrNone, "Lower end of its 95 % interval."]]
    speedup_high: NotRequired[Annotated[PositiveOrNone, "Upper end of its 95 % interval."]]
    drop: Annotated[Number, "What is lost, in the search's metric; null: no finite number."]
    bytes: Annotated[CountOrNone, "Size; null if not known."]
    sparsity: Annotated[Share, "Share of zeros in the weights of 'layers'."]
    bits: NotRequired[
        Annotated[
            Positive, "Of a weight in the mean, without scales; left out where bits were not searched for."
        ]
    ]
    chosen: Annotated[bool, "Whether this one was written."]


class Budget(TypedDict):
    """What a search was asked for."""

    target_speedup: NotRequired[Annotated[PositiveOrNone, "At least so many times faster; null: any."]]
    target_bytes: NotRequired[Annotated[CountOrNone, "At most so large; null: any."]]
    max_drop: NotRequired[Annotated[PositiveOrNone, "At most so much lost; null: any."]]


class SearchDocument(TypedDict):
    """The search for a budget."""

    metric: Annotated[str, "What 'drop' means, such as '1 - cosine' or 'accuracy lost'."]
    budget: Annotated[Budget, "What was asked for."]
    met: Annotated[bool, "Whether the chosen point meets the budget."]
    evaluated: Annotated[Count, "Plans that were measured."]
    pareto: Annotated[
        list[ParetoPoint],
        "Plans that no other one beats in speed, loss and size at once, the slowest first.",
    ]


class Report(TypedDict):
    """What one compilation found, decided and measured. Times are in milliseconds unless a key says seconds,
    sizes in bytes of 8 bits, shares in [0, 1]. null: not measured, or no finite number. A key that is not
    required is left out where its subject did not come up."""

    schema_version: Annotated[Literal[2], "Version of this schema; raised when a key changes its meaning."]
    environment: Annotated[Environment, "The machine and the software that the numbers hold for."]
    command: Annotated[str, "What was typed, or called from Python."]
    recipe: Annotated[dict[str, Any], "The resolved recipe: the content of recipe.yaml."]
    source: Annotated[str, "Name of the model's file or folder."]
    converted_from_opset: NotRequired[
        Annotated[
            FromOne,
            "Opset of the model's file, if it was converted inside.",
        ]
    ]
    input_shapes: Annotated[Shapes, "Shape of every input at the first target, by name."]
    targets: Annotated[
        list[TargetRow],
        "The whole model by target: one for each set of input shapes that was decided for, or none "
        "in a plan.",
    ]
    summary: Annotated[Summary, "The whole model before and after."]
    goal: Annotated[GoalDocument, "What was to be kept or reached, and whether it was."]
    verification: Annotated[
        Nothing | VerificationDocument,
        "The result run on the same inputs as others; empty after a plan, which runs nothing.",
    ]
    layers: Annotated[list[LayerRow], "Every weight that a kernel of the library could take."]
    declined: Annotated[list[DeclinedRow], "Places that passes left as they were."]
    untouched: NotRequired[
        Annotated[
            list[UntouchedRow],
            "Operators with matrix-like work that are no layer, by operator and reason, the most work first.",
        ]
    ]
    quantized: NotRequired[
        Annotated[
            list[QuantizedRow],
            "Weights of layers that are stored as integers, in the order of the graph.",
        ]
    ]
    stages: Annotated[list[StageRow], "Steps of the compilation, in order."]
    profile: NotRequired[Annotated[ProfileDocument, "Where the model's time goes."]]
    curves: NotRequired[Annotated[list[CurveRow], "Speed over sparsity, by layer and pattern."]]
    search: NotRequired[Annotated[SearchDocument, "The search for a budget."]]
