"""The options of a compilation in groups, each declared once: what can be asked for, and what is said of it.

:class:`Target`, :class:`Calibration` and :class:`Goal` are sections of a recipe, whose keys are their fields.
:class:`Prune` and :class:`Quantize` go to the modifiers of these stages. :class:`Run` is no part of a recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sparse_onnx.options import check_types, holds_numbers, option, require
from sparse_onnx.running.request import Request
from sparse_onnx.units import parse_size
from sparse_onnx.verification.tolerance import MAX_COMPILER_ERROR

__all__ = [
    "AUTO",
    "FLOAT32",
    "INT4",
    "INT8",
    "PRECISIONS",
    "Calibration",
    "Goal",
    "Prune",
    "Quantize",
    "Run",
    "Section",
    "Target",
]

FLOAT32, INT8, INT4, AUTO = "float32", "int8", "int4", "auto"
PRECISIONS = (FLOAT32, INT8, INT4, AUTO)


@dataclasses.dataclass(frozen=True)
class Prune:
    """Options of pruning modifiers: each is set in all that have it, and in no modifier of another stage."""

    method: str | None = option(
        None,
        "Pruning method. With --calibration-data: auto (the most accurate), alps, admm, sparsegpt, wanda, ria, "
        "taylor, iht, omp, lasso. Without: magnitude, random, threshold.",
        about="Pruning method; without it and ``sparsity`` the zeros that are already there are used.",
    )
    sparsity: float | None = option(None, "Share of zeros to reach, in [0, 1).")
    mask_structure: str | None = option(
        None,
        "unstructured, N:M (keep N of M), or block:RxC; several with commas for a search to choose from.",
    )
    scope: str | None = option(
        None, "Where the share of zeros is kept: row, layer or global, as the method has it."
    )
    theta: float | None = option(None, "For method threshold: smaller absolute values become zero.")
    gradients: str | None = option(None, "For method gradient: a file of `export --gradients`.", kind="path")
    targets: tuple[str, ...] | None = option(
        None, "Layers to prune: name, op type, or re:REGEX; repeatable.",
        about="Layers to prune: names, op types, or re:REGEX.",
    )  # fmt: skip
    ignore: tuple[str, ...] | None = option(
        None, "Layers to leave alone: name, op type, or re:REGEX; repeatable.",
        about="Layers to leave alone: names, op types, or re:REGEX.",
    )  # fmt: skip
    calibration: str | None = option(
        None, "oneshot, sequential or asymmetric.", otherwise="as the method has it"
    )
    allocation: str | None = option(
        None, "Zeros over layers: uniform, depth, owl, alpha or error.", otherwise="uniform"
    )
    sparsities: Mapping[str, float] | None = option(
        None,
        "The share of zeros of some weights, by name or re:REGEX; the others make up for it.",
        flag=None,
    )
    bias_correction: bool | None = option(None, "Whether biases change.")
    dampening_frac: float | None = option(None, "Added to the diagonal of the Gram.", otherwise="0.01")


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Options of quantizing modifiers: each is set in all that have it."""

    bits: int | None = option(
        None,
        "Store weights in 2 to 8 bits: of all linears, zeros staying zeros; up to 4 bits with zero points. By method "
        "auto with --calibration-data, which makes up for what --sparsity loses, too; by hqq without.",
        otherwise="as --precision says",
    )
    group_size: int | None = option(
        None, "Inputs that share a scale, 16 to 256; 0: all of an output.", otherwise="64; 0 with 8 bits"
    )


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a recipe: a frozen dataclass whose fields are the keys."""

    def __post_init__(self) -> None:
        check_types(self)
        self.check()

    def check(self) -> None:
        """Raise UsageError if a value is out of range."""


@dataclasses.dataclass(frozen=True)
class Target(Section):
    """What to decide and time for."""

    shapes: Mapping[str, tuple[int, ...]] | tuple[Mapping[str, tuple[int, ...]], ...] = option(
        None,
        "NAME:DIM,DIM,.. to decide and time for; repeatable, also for several shapes.",
        factory=dict,
        about="Shapes to decide and time for, by input name; a sequence of these for several targets: nothing may then "
        "be slower at any of them.",
        keyword="input_shapes",
        flag="--input-shape",
        kind="shapes",
    )
    threads: int | None = option(None, "Threads to decide and time for.", otherwise="all cores", least=1)
    weights: tuple[float, ...] | None = option(
        None,
        "3,1,..: decide by the weighted mean time over several shapes.",
        about="With several targets, how much each counts: their weighted mean time decides, not the worst.",
        keyword="shape_weights",
        otherwise="by the worst",
        kind="numbers",
    )
    input_values: Mapping[str, object] | None = option(
        None,
        "NAME=VALUE for an input that steers the graph: a number, true, or a list (1,0); repeatable.",
        about="Values for inputs that steer the graph, by name: numbers, booleans, lists or arrays of these. A number "
        "alone fills an input of any shape.",
        flag="--input",
        kind="values",
    )
    fixed_inputs: Mapping[str, object] | None = option(
        None,
        "NAME=VALUE, as a constant: the input disappears, with the branches not taken; repeatable.",
        about="The same, but they become constants of the result, which has these inputs no longer; what depends on "
        "them alone is computed now.",
        flag="--fix-input",
        kind="values",
    )
    prompt_tokens: int | None = option(
        None,
        "Of a typical request to a decoder with a cache: without --input-shape it is decided for prefill and decode, "
        "weighted as a request has them.",
        about="Of a typical request to a decoder with a cache: without ``input_shapes`` there are two targets then, "
        "prefill and decode, weighted as a request has them, see :mod:`sparse_onnx.running.requests`.",
        otherwise="512",
        least=1,
    )
    new_tokens: int | None = option(None, "Tokens that such a request generates.", otherwise="128", least=1)
    precision: str = option(
        FLOAT32,
        "Arithmetic that is allowed: float32, int8 or int4 (weights in 8 or 4 bits, or 7 where products of bytes "
        "saturate; activations in 8 where an operator rounds them). The fastest is kept. With goals and no --bits, the "
        "layers that get them are searched for; auto: and how many, with a --method zeros as well.",
        about="What layers may compute in: ``float32``; ``int8`` or ``int4``: weights in 8 or 4 bits, those of all "
        "linears unless the recipe quantizes them itself, and activations in 8 where an operator rounds them. On "
        "processors without VNNI ``int8`` takes 7 bits: their products of bytes saturate. With goals and no ``bits`` "
        "a search finds which layers get them, see :mod:`sparse_onnx.search`; ``auto``: float32, 8, 4 or 3 bits for "
        "every layer.",
    )

    float_inputs: tuple[str, ...] = ()
    """Layers by name, op type or ``re:REGEX`` that get no form that rounds all of its input with one scale, as ONNX
    Runtime's dynamic int8 does."""

    @property
    def all_shapes(self) -> tuple[Mapping[str, tuple[int, ...]], ...]:
        """The input shapes of every target."""
        return (self.shapes,) if isinstance(self.shapes, Mapping) else self.shapes

    @property
    def request(self) -> Request:
        """What a decoder is decided for, where no shapes are given."""
        usual = Request()
        return Request(self.prompt_tokens or usual.prompt, self.new_tokens or usual.new)

    def check(self) -> None:
        require(len(self.all_shapes) > 0, "shapes", self.shapes, "one target or more")
        for index, shapes in enumerate(self.all_shapes):
            where = "shapes" if isinstance(self.shapes, Mapping) else f"shapes[{index}]"
            for name, shape in shapes.items():
                require(
                    all(size >= 1 for size in shape), f"{where}.{name}", list(shape), "sizes of 1 or more"
                )
        for name_of_option in ("input_values", "fixed_inputs"):
            for name, value in (getattr(self, name_of_option) or {}).items():
                require(
                    holds_numbers(value),
                    f"{name_of_option}.{name}",
                    value,
                    "a number, true or false, or a list of these",
                )
        if self.weights is not None:
            count = len(self.all_shapes)
            fits = len(self.weights) == count and min(self.weights) > 0
            allowed = f"numbers above 0, as many as shapes has targets ({count})"
            require(fits, "weights (--shape-weights)", list(self.weights), allowed)
        for name_of_option in ("threads", "prompt_tokens", "new_tokens"):
            count_of = getattr(self, name_of_option)
            require(count_of is None or count_of >= 1, name_of_option, count_of, "1 or more")
        asked = self.prompt_tokens is not None or self.new_tokens is not None
        require(
            not (asked and any(self.all_shapes)),
            "prompt_tokens and new_tokens",
            [self.prompt_tokens, self.new_tokens],
            "left out where shapes (--input-shape) are given: these are decided for",
        )
        require(self.precision in PRECISIONS, "precision", self.precision, ", ".join(PRECISIONS))


@dataclasses.dataclass(frozen=True)
class Calibration(Section):
    """Real inputs, and how to run the model on them. An eighth of them is held out to measure the result.
    ``padding_mask`` is the input [B, S] whose zeros are padding, where the model has it."""

    data: str | tuple[str, ...] | None = option(
        None,
        "Real inputs: an .npz, a folder of .npz, module:function, or a text file (with --tokenizer); repeatable, and "
        "SOURCE:0.5 counts half.",
        about="Real inputs, to prune with and to measure the result on: an .npz, a folder of .npz, "
        "``module:function``, or a text file with ``tokenizer``; a sequence of these is mixed, and ``SOURCE:0.5`` "
        "counts half.",
        keyword="calibration_data",
        kind="sources",
    )
    num_calibration_samples: int | None = option(
        None, "Use so many of every source.", otherwise="all", least=1
    )
    batch_size: int = option(4, "Samples that are run together.", least=1)
    tokenizer: str | None = option(None, "Folder with the tokenizer of a text file.", kind="path")
    padding_mask: str = "attention_mask"
    statistics: str | None = option(
        None,
        "File for the statistics of oneshot calibration.",
        about="A file for the statistics of oneshot calibration: read if it fits, else written.",
        kind="path",
    )
    checkpoint: str | None = option(
        None,
        "Folder for finished layers: run again with it after an interruption.",
        about="A folder for finished layers, from which an interrupted run goes on.",
        kind="path",
    )
    seed: int = option(0, "Of generated inputs and random pruning.")

    @property
    def sources(self) -> tuple[str, ...]:
        """Where real inputs come from."""
        return () if self.data is None else (self.data,) if isinstance(self.data, str) else self.data

    def check(self) -> None:
        number = self.num_calibration_samples
        require(number is None or number >= 1, "num_calibration_samples", number, "1 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class Goal(Section):
    """What the result must reach; what is missed is said, and the best so far is still written."""

    max_drop: float | None = option(
        None,
        "Goal: what the metric may lose; without one, 1 - cosine.",
        about="Goal: what the metric may lose, see :func:`sparse_onnx.verification.quality.drop`; without one "
        "1 − cosine between the outputs of the original and the result.",
    )
    min_speedup: float = option(1.02, "A layer becomes sparse from this speedup on.")
    max_compiler_error: float = option(
        MAX_COMPILER_ERROR,
        "Relative error against the pruned dense model, at most, unless rounding explains more.",
        about="What the outputs may differ by from the pruned dense model's (relative error), unless rounding explains "
        "more, see :mod:`sparse_onnx.verification.yardstick`; else VerificationError.",
    )
    keep_pruned: bool = option(
        False,
        "Whether layers that stay dense keep their zeros, for another runtime.",
        about="True: prune also what no kernel takes or what would be slower, and let layers that stay dense keep "
        "their zeros, for whoever wants them elsewhere.",
        otherwise="they keep or get back their original weights",
    )
    target_speedup: float | None = option(None, "Goal: the whole model so many times faster, at least.")
    target_size: float | str | None = option(
        None, "Goal: files of at most 0.5 (or 50%) of the original files, or of 120MB, say."
    )
    metric: str | None = option(
        None,
        "accuracy, recall, f1, recall@K, perplexity, token_agreement, cosine, or your own module:function.",
        about="A metric of the original and the result, see :mod:`sparse_onnx.verification.metrics`: "
        "``module:function`` or built in.",
    )
    metric_data: str | None = option(
        None, "What it is measured on.", otherwise="the calibration data that is held out"
    )
    labels: str | None = option(None, "The array of that data with the labels.")
    metric_output: str | None = option(None, "The output that the metric is of.")

    @property
    def is_given(self) -> bool:
        """Whether anything is to be reached that a search could choose by."""
        return any(goal is not None for goal in (self.max_drop, self.target_speedup, self.target_size))

    def check(self) -> None:
        require(self.max_drop is None or self.max_drop >= 0, "max_drop", self.max_drop, "0 or more")
        for name in ("metric_data", "labels", "metric_output"):
            given = getattr(self, name)
            require(given is None or self.metric is not None, name, given, "left out, or given with a metric")
        error = self.max_compiler_error
        require(0 <= error < math.inf, "max_compiler_error", error, "0 or more")
        require(self.min_speedup > 0, "min_speedup", self.min_speedup, "above 0")
        speedup, size = self.target_speedup, self.target_size
        require(speedup is None or speedup > 0, "target_speedup", speedup, "above 0")
        require(size is None or _is_size(size), "target_size", size, "a share (0.5 or 50%) or a size (120MB)")


def _is_size(size: float | str) -> bool:
    try:
        parse_size(size, 1)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Run:
    """How one run goes, whatever its recipe."""

    settings: Mapping[str, object] | None = option(
        None,
        "NAME.OPTION=VALUE for any modifier of the recipe, such as prune.magnitude.norm=l1; NAME[0] is the first of "
        "several; repeatable.",
        about="Options of any modifiers of the recipe, which win over all else: values by ``NAME.OPTION``, as in "
        '``{"prune.magnitude.sparsity": 0.8}``; ``NAME[0].OPTION`` is for the first of several of that name only.',
        flag="--set",
        kind="settings",
    )
    benchmark: bool = option(
        True,
        "Decide by timing, or by a table, for another machine.",
        about="False: decide by a table instead of timing, for another machine.",
        otherwise="by timing",
    )
    timing_cache: str | bool = option(
        True,
        "File with timings of earlier runs.",
        about="A file with the timings of earlier runs, see :mod:`sparse_onnx.timing.cache`; True: the one in the "
        "user's cache folder; False: none.",
        otherwise="in the user's cache folder, or $SPARSE_ONNX_CACHE",
        kind="path",
    )
    timing_table: str | None = option(
        None,
        "With --no-benchmark: decide by this file of `analyze --save-table`, made on the target machine.",
        about="With ``benchmark=False``: a file of :func:`sparse_onnx.analyze` with timings of the target machine to "
        "decide by.",
        kind="path",
    )
    dump_after: tuple[str, ...] | None = option(
        None,
        "Write the model as it is after this pass to after-PASS.onnx in the output folder, for debugging; repeatable.",
        about="Passes after which the model is written as it is then, to after-PASS.onnx (with its data file) in "
        "``output``: the last time that each ran. For debugging.",
    )
    bundle: str | None = option(
        None,
        "genai: make the output a complete folder for onnxruntime-genai, with configuration, tokenizer and library.",
        about="``genai``: make ``output`` a complete folder for onnxruntime-genai, with the configuration, the "
        "tokenizer and our library in it.",
        otherwise="genai where MODEL is such a folder",
    )
    dry_run: bool = option(
        False,
        "Show the plan and the resolved recipe; write nothing.",
        about="Plan only; nothing is written and nothing timed.",
    )
    overwrite: bool = option(
        False,
        "Replace the output folder.",
        about="Replace ``output`` if it is an output folder of ours.",
    )
