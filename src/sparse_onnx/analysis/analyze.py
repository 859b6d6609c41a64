"""Know before pruning and quantizing: how fast and small a model would become here, and which layers that comes from.

The model is cleaned and fused as ``optimize`` would do it, but its weights stay. Then three things are measured: where
the dense model's time goes (:mod:`sparse_onnx.timing.profile`), how fast every layer is with zeros and bits that it
does not have yet (:mod:`sparse_onnx.timing.curves`), and, as a whole, a few models compiled for the occasion, the
*anchors*, which turn sums over layers into times of models (:mod:`.time_model`). Any plan can be asked about afterwards
(:mod:`.forecast`).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sparse_onnx import sparse_ops
from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Forecast, LayerForecast, Outlook, Plan
from sparse_onnx.analysis.sensitivity import measure_losses
from sparse_onnx.analysis.time_model import ROUGH, Anchor, Sums, TimeModel, fit, make_anchor, scatter
from sparse_onnx.data import inputs
from sparse_onnx.data.inputs import InputSpec, Value, plain_values
from sparse_onnx.data.samples import Samples, open_samples
from sparse_onnx.exporter.source import source_file
from sparse_onnx.model import model_io
from sparse_onnx.model.bit_packing import STORED_BITS
from sparse_onnx.model.encodings import Dense
from sparse_onnx.model.opset_conversion import converted_from
from sparse_onnx.model.probe import shapes_in, with_shape_outputs
from sparse_onnx.model.quantized_weights import QuantizedWeight, describe, quantized_weights
from sparse_onnx.model.weights import DEFAULT_IGNORE, Selection, find_weights
from sparse_onnx.model.work import NodeWork, Untouched, Work, untouched
from sparse_onnx.options import require
from sparse_onnx.passes.base import Declined, PassContext, Pipeline
from sparse_onnx.passes.calibration import Options as CalibrationOptions
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.encoded_linear import EncodedForm
from sparse_onnx.passes.lower.forms import FLOAT_BITS, Form
from sparse_onnx.passes.lower.layers import lower_layers
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.patterns.layer import Layer, layer_kind
from sparse_onnx.passes.presets import FUSION_PASSES, PREPARATION_PASSES
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.pruning import choose_weights
from sparse_onnx.passes.quantize.by_bits import UsualGrid, usual_grid
from sparse_onnx.passes.quantize.layers import resolved_bits
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers.masks import MaskStructure, resolve_sparsity
from sparse_onnx.progress import Progress, format_duration
from sparse_onnx.report.environment import environment
from sparse_onnx.running.fix_inputs import fix_inputs
from sparse_onnx.running.host import available_cores
from sparse_onnx.running.input_choice import choose_inputs, explaining_guesses
from sparse_onnx.running.runtime import open_runner, session_budget
from sparse_onnx.running.stages import StageClock
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing.curves import (
    SPARSITIES,
    STRUCTURES,
    UNSTRUCTURED,
    LayerCurves,
    combine,
    count_points,
    measure_curves,
)
from sparse_onnx.timing.models import time_models
from sparse_onnx.timing.profile import NodeProfile, profile_model
from sparse_onnx.timing.rounds import FEWEST_STARTS, Ratio
from sparse_onnx.timing.table import TimingTable

__all__ = ["Analysis", "analyze"]

SCHEMA_VERSION = 1

BITS = (8, 4)
"""Of weights, that are looked at by default."""

SHOWN = (0.5, 0.7, 0.8, 0.9)
"""Shares of zeros in a table of predictions."""

ALONG = 0.5
"""The share of zeros that is shown along with few bits."""

ANCHORS = (0.5, 0.7, 0.8, 0.9)
"""Shares of zeros at which models are compiled and timed as a whole."""

DISTURBED = (
    "other programs took processors, so predictions are rough: run again when the machine is idle, or with fewer "
    "--threads"
)

_BYTE = 8
_LEAST_SHARE = 0.2
"""Of the dense time of all layers: where those in forms of few bits have less, a whole model tells nothing of them."""
_FORMS_OF_BITS = 2

_MOST_WHOLE_STARTS, _WHOLE_ROUNDS, _WHOLE_SECONDS = 5, 9, 5.0
_POINT_SECONDS, _POINT_RUNS, _WHOLE_RUNS, _BYTES_A_SECOND = 0.15, 20, 60, 150e6  # to guess how long it takes


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` found. ``forecast`` answers for any plan; the methods here for what people ask first.

    Attributes:
        source: The name of the model file or folder.
        environment: Machine and software that the numbers hold for, as in ``report.json``.
        input_shapes: What was timed for.
        forecast: Layers, their curves, and the time of the whole.
        profile: Where the dense model's time goes; None for a model too large for one session.
        anchors: The models of floats that were timed as a whole, by their share of zeros (None: not pruned).
        encoded_anchors: Those with weights of few bits, by their bits.
        declined: (place, reason) of what no kernel can take.
        untouched: Operators with matrix-like work that are no layer, see :func:`sparse_onnx.model.work.untouched`.
        seconds: What the analysis took, by step.
        kinds: The curves by kind of layer, see :func:`sparse_onnx.passes.patterns.layer.layer_kind`.
        quiet: False if other programs took processors in the meantime: then the predictions are rough.
        quantized: Weights of layers that are no floats, which no kernel can take.
    """

    source: str
    environment: Mapping[str, Any]
    input_shapes: Mapping[str, tuple[int, ...]]
    forecast: Forecast
    profile: NodeProfile | None
    anchors: tuple[tuple[float | None, Anchor], ...]
    declined: tuple[tuple[str, str], ...]
    untouched: tuple[Untouched, ...]
    seconds: Mapping[str, float]
    kinds: tuple[tuple[Mapping[str, Any], LayerCurves], ...] = dataclasses.field(repr=False)
    quiet: bool = True
    quantized: tuple[QuantizedWeight, ...] = ()
    encoded_anchors: tuple[tuple[int, Anchor], ...] = ()

    def predict(
        self, sparsity: float | None = None, mask_structure: str = UNSTRUCTURED, bits: int = FLOAT_BITS
    ) -> Outlook:
        """With the same share of zeros, in [0, 1), in all layers that may be pruned; N:M implies it. With the same
        ``bits`` in all weights that can have them.

        Raises UsageError for a pattern or bits that were not measured, and a share of zeros at odds with the pattern.
        """
        return self.forecast.outlook(self.forecast.uniform(sparsity, mask_structure, bits))

    def sentence(self, sparsity: float | None = None, mask_structure: str = UNSTRUCTURED) -> str:
        """The answer in words, see :meth:`predict`."""
        found = self.predict(sparsity, mask_structure)
        share = resolve_sparsity(sparsity, MaskStructure.parse(mask_structure))
        where = f"at {100 * share:.0f} % {mask_structure}"
        if found.forms:
            speed = f"{found.speedup:.2f}x faster ({found.low:.2f} to {found.high:.2f})"
            text = f"{where} this model would run {speed} and be {found.smaller:.2f}x smaller"
        else:
            text = f"{where} no layer of this model would be faster in sparse form"
        if self.quantized and not self.forecast.layers:
            return f"{text}; {self.quantized_text}"
        if not self.forecast.uniform(sparsity, mask_structure):
            return f"{text}; nothing in it can be pruned like this"
        if found.error is None:
            return f"{text}; for the error to expect, give --calibration-data"
        return f"{text}; expected relative error {found.error:.2g} (method auto, calibrated)"

    def bits_sentences(self) -> list[str]:
        """What few bits would bring, a line for each number of them; none for a model without layers."""
        return [self._bits_sentence(bits) for bits in self.forecast.bits if self.forecast.layers]

    def _bits_sentence(self, bits: int) -> str:
        if not any(bits in layer.encoded for layer in self.forecast.layers):
            return f"int{bits}: no weight of this model can have {bits} bits"
        alone, zeros = self.predict(0.0, bits=bits), self.predict(ALONG, bits=bits)
        speed = f"{alone.speedup:.2f}x faster ({alone.low:.2f} to {alone.high:.2f})"
        faster = alone.forms or alone.speedup > self.forecast.min_speedup  # fused, if nothing else
        parts = [speed if faster else "no layer faster", f"{alone.smaller:.2f}x smaller"]
        others = [f"with {100 * ALONG:.0f} % zeros {zeros.speedup:.2f}x", f"{zeros.smaller:.2f}x"]
        if alone.error is not None and zeros.error is not None:
            parts.append(f"expected error {alone.error:.2g}")
            others.append(f"{zeros.error:.2g}")
        return f"int{bits}: {', '.join(parts)}; {', '.join(others)}"

    @property
    def quantized_text(self) -> str:
        """What is quantized already, in a line; empty if nothing is."""
        if not self.quantized:
            return ""
        zeros = sum(row.zeros for row in self.quantized) / sum(row.size for row in self.quantized)
        return describe([row.bits for row in self.quantized], zeros)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON. Times are in milliseconds; ``break_even`` and ``curves`` are those of single layers.

        ``predictions`` are for floats; ``precisions`` are the same with weights of so many ``bits``, and ``forms`` says
        how many layers get which. Of a layer, ``encoded_bytes`` has its size by bits, and ``loss`` by bits what they
        add (``encoded``, at ``encoded_sparsities``). ``anchors`` with ``bits`` are models of such weights. A curve of a
        form of few bits without use for zeros has one point.
        """
        forecast = self.forecast
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "environment": dict(self.environment),
            "input_shapes": {name: list(shape) for name, shape in self.input_shapes.items()},
            "dense_ms": forecast.dense_ms,
            "dense_bytes": forecast.dense_bytes,
            "min_speedup": forecast.min_speedup,
            "predictions": [self._prediction(*case) for case in self.cases()],
            "precisions": [
                {
                    "bits": bits,
                    **self._prediction(share, structure, bits),
                    "forms": self._forms(share, structure, bits),
                }
                for share, structure, bits in self.bits_cases()
            ],
            "layers": [self._layer(layer) for layer in forecast.layers],
            "curves": [
                _curve_row(layer, form, structure, forecast.min_speedup)
                for layer in forecast.layers
                for form in layer.forms
                for structure in layer.patterns_of(form)
            ],
            "time_model": dataclasses.asdict(forecast.times),
            "anchors": [
                *({"sparsity": share, **dataclasses.asdict(anchor)} for share, anchor in self.anchors),
                *(
                    {"sparsity": None, "bits": bits, **dataclasses.asdict(anchor)}
                    for bits, anchor in self.encoded_anchors
                ),
            ],
            "profile": None
            if self.profile is None
            else {
                "wall_ms": self.profile.wall_ms,
                "covered": self.profile.covered,
                "others": [{"op_type": name, "ms": ms} for name, ms in self.profile.others.items()],
            },
            "declined": [{"place": place, "reason": reason} for place, reason in self.declined],
            "untouched": [dataclasses.asdict(row) for row in self.untouched],
            **({"quantized": [dataclasses.asdict(row) for row in self.quantized]} if self.quantized else {}),
            "quiet": self.quiet,
            "seconds": dict(self.seconds),
        }

    def cases(self) -> list[tuple[float | None, str]]:
        """What a table of predictions shows: (share of zeros, pattern) for all that was measured."""
        found: list[tuple[float | None, str]] = []
        for structure in self.forecast.structures:
            fixed = MaskStructure.parse(structure).kind == "n:m"
            found += [(None, structure)] if fixed else [(share, structure) for share in SHOWN]
        return found

    def bits_cases(self) -> list[tuple[float, str, int]]:
        """The same with few bits, alone and along with zeros: (share of zeros, pattern, bits)."""
        able = {bits for layer in self.forecast.layers for bits in layer.encoded}
        return [
            (share, UNSTRUCTURED, bits)
            for bits in self.forecast.bits
            for share in (0.0, ALONG)
            if bits in able
        ]

    def _forms(self, sparsity: float, structure: str, bits: int) -> dict[str, int]:
        """How many layers get which form."""
        return dict(collections.Counter(self.predict(sparsity, structure, bits).forms.values()))

    def _prediction(self, sparsity: float | None, structure: str, bits: int = FLOAT_BITS) -> dict[str, Any]:
        found = self.predict(sparsity, structure, bits)
        return {
            "mask_structure": structure,
            "sparsity": resolve_sparsity(sparsity, MaskStructure.parse(structure)),
            "ms": found.milliseconds,
            "speedup": found.speedup,
            "speedup_low": found.low,
            "speedup_high": found.high,
            "bytes": found.nbytes,
            "smaller": found.smaller,
            "sparse_layers": len(found.forms),
            "given_up": list(found.given_up),
            "relative_error": found.error,
        }

    def _layer(self, layer: LayerForecast) -> dict[str, Any]:
        limit = self.forecast.min_speedup
        return {
            "name": layer.name,
            "module": layer.module,
            "op_type": layer.op_type,
            "shape": list(layer.shape),
            "rows": layer.rows,
            "products": layer.products,
            "bytes": layer.nbytes,
            "sparsity": layer.sparsity,
            "companion": layer.companion,
            "left_alone": layer.reason or None,
            "dense_ms": layer.dense_ms,
            "share": layer.share,
            "break_even": {structure: layer.break_even(structure, limit) for structure in layer.patterns},
            "encoded_bytes": {str(bits): nbytes for bits, nbytes in layer.encoded.items()},
            "loss": None if layer.loss is None else dataclasses.asdict(layer.loss),
        }

    def table(self) -> TimingTable:
        """The curves, to decide by on another machine, see :mod:`sparse_onnx.timing.table`."""
        return TimingTable(self.environment, self.kinds)

    def speedup(self, plan: Mapping[str, Choice | tuple[float, str]]) -> float:
        """Dense / optimized time with what ``plan`` makes of layers, by the name of their weight: a :class:`Choice`, or
        (share of zeros, pattern) alone. Raises UsageError for what was not measured."""
        return self.forecast.outlook(_choices(plan)).speedup

    def size(self, plan: Mapping[str, Choice | tuple[float, str]]) -> float:
        """Bytes of the optimized model's files with ``plan``, see :meth:`speedup`."""
        return self.forecast.outlook(_choices(plan)).nbytes


def _choices(plan: Mapping[str, Choice | tuple[float, str]]) -> Plan:
    return {name: Choice(*choice) for name, choice in plan.items()}


def _curve_row(layer: LayerForecast, form: Form, structure: str, min_speedup: float) -> dict[str, Any]:
    curve = layer.curves[form.name, structure]
    points = zip(curve.sparsities, curve.times, curve.low, curve.high, strict=True)
    return {
        "layer": layer.name,
        "form": form.name,
        "mask_structure": structure,
        "points": [
            {"sparsity": share, "speedup": 1 / time, "speedup_low": 1 / high, "speedup_high": 1 / low}
            for share, time, low, high in points
        ],
        "break_even": layer.form_break_even(form, structure, min_speedup),
    }


def analyze(
    model: str | Path,
    *,
    mask_structures: Sequence[str] = STRUCTURES,
    sparsities: Sequence[float] = SPARSITIES,
    bits: Sequence[int] = BITS,
    group_size: int | Mapping[int, int] | None = None,
    encoded_structures: Sequence[str] = (UNSTRUCTURED,),
    targets: Sequence[str] = (),
    ignore: Sequence[str] = DEFAULT_IGNORE,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    input_values: Mapping[str, Any] | None = None,
    fixed_inputs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    min_speedup: float = 1.02,
    anchors: bool | Sequence[float] = True,
    calibration_data: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str | Path | None = None,
    num_calibration_samples: int | None = 64,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Analysis:
    """Measure what zeros and bits would be worth in ``model`` on this machine; nothing is changed for good, nothing
    written.

    Args:
        model: An ``.onnx`` file or a Hugging Face model folder.
        mask_structures: The patterns to measure.
        sparsities: The shares of zeros to measure at, each in (0, 1).
        bits: Of weights, to measure with: any of 8, 4, 3 and 2; none: only zeros are looked at.
        group_size: Inputs that share a scale, 16 to 256, 0: all; or that by bits. None, and bits that it does not have:
            as ``optimize`` has it for these.
        encoded_structures: The patterns to measure forms of few bits with, where these depend on zeros.
        targets, ignore: The layers that may be touched, see :class:`sparse_onnx.model.weights.Selection`.
        input_shapes: Shapes to time for, by input name.
        input_values, fixed_inputs: Values for inputs that steer the graph, as ``optimize`` takes them.
        threads: Intra-op threads to time for; None: all cores of this process.
        min_speedup: From which speedup on a layer counts as faster.
        anchors: Compile and time whole models, some with zeros, or with these shares of them; without whole models the
            prediction is rough, and says so.
        calibration_data: Real inputs, to tell what zeros do to the outputs: as ``optimize`` takes them.
        tokenizer: A folder, for a text file.
        num_calibration_samples, batch_size: How many of them to use, and at a time.
        seed: Of generated inputs.
        progress: Called with one line of text at every step.

    Raises:
        SparseOnnxError: With one clear message and its exit code.
    """
    for share in sparsities:
        require(0 < share < 1, "sparsities", share, "above 0 and below 1")
    for count in bits:
        require(count in STORED_BITS, "bits", count, "8, 4, 3 or 2")
    sizes = group_size if isinstance(group_size, Mapping) else dict.fromkeys(bits, group_size)
    grids = {count: _grid(count, sizes.get(count)) for count in dict.fromkeys(bits)}
    for grid in grids.values():
        QuantizeWeights(method="rtn", **grid._asdict())  # fails now rather than after a minute
    require(len(sparsities) > 0, "sparsities", sparsities, "at least one share of zeros")
    require(threads is None or threads > 0, "threads", threads, "1 or more")
    require(min_speedup > 0, "min_speedup", min_speedup, "above 0")
    selection = Selection(tuple(targets), tuple(ignore))
    structures = tuple(
        dict.fromkeys(str(MaskStructure.parse(text)) for text in (UNSTRUCTURED, *mask_structures))
    )
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as work:
        job = _Job(
            Path(model),
            structures,
            tuple(sorted(sparsities)),
            grids,
            tuple(str(MaskStructure.parse(text)) for text in encoded_structures),
            selection,
            min_speedup,
            Workbench(threads or available_cores(), Path(work), progress=progress or (lambda _line: None)),
        )
        given = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}

        def samples(specs: Sequence[InputSpec]) -> Samples | None:
            if calibration_data is None:
                return None
            return open_samples(
                calibration_data,
                specs,
                limit=num_calibration_samples,
                batch=batch_size,
                tokenizer=tokenizer,
            )

        values, fixed = plain_values(input_values) or {}, plain_values(fixed_inputs) or {}
        shares = () if anchors is False else ANCHORS if anchors is True else tuple(anchors)
        return job.run(given, values, fixed, shares, seed, samples)


class _Job:
    """One analysis: the state that its steps share."""

    def __init__(
        self,
        source: Path,
        structures: tuple[str, ...],
        sparsities: tuple[float, ...],
        grids: Mapping[int, UsualGrid],
        encoded_structures: tuple[str, ...],
        selection: Selection,
        min_speedup: float,
        bench: Workbench,
    ) -> None:
        self.source, self.structures, self.sparsities = source, structures, sparsities
        self.grids, self.encoded_structures = grids, encoded_structures
        self.selection, self.min_speedup = selection, min_speedup
        self.clock = StageClock(bench.progress)
        self.say = self.clock.say
        self.bench = dataclasses.replace(bench, progress=self.say)
        self.disturbed = False
        self.node_work: tuple[NodeWork, ...] = ()

    def run(
        self,
        given: Mapping[str, tuple[int, ...]],
        values: Mapping[str, Value],
        fixed: Mapping[str, Value],
        wanted: Sequence[float],
        seed: int,
        open_data: Callable[[Sequence[InputSpec]], Samples | None],
    ) -> Analysis:
        with self.clock("load"):
            self.path = source_file(self.source, self.bench.work)
            original = model_io.load_model(self.path)
            converted_from(original, self.say)
            self.nbytes = model_io.file_bytes(self.path, original)
            self.budget = session_budget(model_io.weight_bytes(original))
            self.bench = dataclasses.replace(self.bench, budget=self.budget)
            specs = inputs.input_specs(original, values, fixed)
            steered = original.clone()
            fix_inputs(steered, specs)
            samples = open_data(specs)
            first = [] if samples is None else [next(iter(samples))]
            self.choice = choose_inputs(steered, specs, given, first)
            self.feeds = self.choice.feeds(seed)
        for line in self.choice.notes("to measure for another"):
            self.say(f"note: {line}")
        with model_io.Spool(self.bench.work) as spool:
            context = PassContext(spool.put)
            with self.clock("clean up"):
                cleaned = steered.clone()
                Pipeline(PREPARATION_PASSES)(cleaned, context)
                fused = cleaned.clone()
                changed = Pipeline(FUSION_PASSES)(fused, context).modified or bool(fixed)
                candidates, declined = _candidates(fused)
                _, left = choose_weights(fused, self.selection, MaskStructure())
                self.reasons = {candidate.weight.name: "" for candidate in candidates} | dict(left)
            with self.clock("run dense"):
                known = _candidates(cleaned)[0]
                values, dense_ms = self.run_dense(cleaned, known)
            kinds = self.kinds(candidates, values)
            self.say(f"note: this takes about {format_duration(self.seconds(kinds, dense_ms, wanted))}")
            with self.clock("profile"):
                profile = self.profile(cleaned, known)
            with self.clock("time layers"):
                curves = self.measure(fused, kinds)
            forecast = self.forecast(candidates, values, curves, profile)
            with self.clock("time whole models"):
                forecast, anchors, few = self.fit(original, fused, forecast, wanted, changed, spool)
            if samples is not None:
                with self.clock("losses"):
                    forecast = self.with_losses(cleaned, forecast, samples)
        if self.disturbed:
            self.say(f"warning: {DISTURBED}")
            times = dataclasses.replace(forecast.times, error=max(forecast.times.error, ROUGH))
            forecast = dataclasses.replace(forecast, times=times)
        return Analysis(
            self.source.name,
            environment(threads=self.bench.threads, seed=seed, isa=sparse_ops.info().isa),
            self.choice.shapes,
            forecast,
            profile,
            tuple(anchors),
            tuple((place.place, place.reason) for place in declined),
            tuple(
                untouched(
                    self.node_work,
                    {name for layer in forecast.layers for name in (layer.name, *layer.others)},
                    {place.place: place.reason for place in declined},
                )
            ),
            {stage["name"]: stage["seconds"] for stage in self.clock.stages},
            tuple((layer_kind(kinds[kind][1], kinds[kind][2]), found) for kind, found in curves.items()),
            not self.disturbed,
            tuple(quantized_weights(fused)),
            tuple(few),
        )

    def run_dense(
        self, model: ir.Model, candidates: Sequence[Candidate]
    ) -> tuple[dict[str, tuple[int, ...]], float]:
        """The shape of every layer's inputs by the name of the value, and the time of a run."""
        names = {value.name or "" for c in candidates for layer in c.layers for value in layer.inputs}
        work = Work(model, {name: array.shape for name, array in self.feeds.items()})
        names |= work.unknown()
        with open_runner(with_shape_outputs(model, names), self.bench, library=False, timed=True) as runner:
            with explaining_guesses([self.choice]):
                values = shapes_in(runner.run(self.feeds))[1]
            self.node_work = work.count(values)
            return values, runner.milliseconds(self.feeds)

    def kinds(self, candidates: Sequence[Candidate], values: Mapping[str, tuple[int, ...]]) -> _Kinds:
        """One candidate and layer of every kind that has to be timed."""
        kinds: _Kinds = {}
        for candidate in candidates:
            for layer in candidate.layers:
                inputs = [values[value.name or ""] for value in layer.inputs]
                kinds.setdefault(self.kind(candidate, layer, inputs), (candidate, layer, inputs))
        return kinds

    def kind(self, candidate: Candidate, layer: Layer, shapes: Sequence[tuple[int, ...]]) -> str:
        """Equal for layers with equal curves."""
        zeros, reason = round(candidate.sparsity, 2), self.reasons[candidate.weight.name]
        return json.dumps([layer_kind(layer, shapes), candidate.companion, zeros, reason], sort_keys=True)

    def seconds(self, kinds: _Kinds, dense_ms: float, wanted: Sequence[float]) -> float:
        """A guess at how long the rest takes."""
        points = sum(
            len(candidate.allowed_forms())
            * (
                1
                if self.reasons[candidate.weight.name]
                else count_points(candidate.weight, self.sparsities, self.structures)
            )
            + _FORMS_OF_BITS * len(self.grids)
            for candidate, _, _ in kinds.values()
        )
        run = dense_ms / 1e3
        layers = (points + len(kinds)) * (_POINT_SECONDS + _POINT_RUNS * run / max(len(kinds), 1) / 2)
        models = 1 + len(wanted) + (len(self.grids) if wanted else 0)
        whole = models * (self.nbytes / _BYTES_A_SECOND + _WHOLE_RUNS * run)
        return layers + whole

    def profile(self, model: ir.Model, candidates: Sequence[Candidate]) -> NodeProfile | None:
        """Of a model that one session can hold."""
        if model_io.weight_bytes(model) > self.budget:
            self.say("note: too large for one session: no profile, and no model is timed as a whole")
            return None
        nodes = {c.weight.name: [node for layer in c.layers for node in layer.nodes] for c in candidates}
        return profile_model(model, nodes, self.feeds, threads=self.bench.threads, work=self.bench.work)

    def measure(self, model: ir.Model, kinds: _Kinds) -> dict[str, LayerCurves]:
        told = Progress(self.say, "kinds of layers", len(kinds), interval=0)
        curves = {}
        for kind, (candidate, layer, shapes) in kinds.items():
            curves[kind] = measure_curves(
                model,
                candidate,
                layer,
                shapes,
                sparsities=self.sparsities,
                structures=self.structures,
                prunable=not self.reasons[candidate.weight.name],
                grids=tuple(self.grids.values()),
                encoded_structures=self.encoded_structures,
                threads=self.bench.threads,
                work=self.bench.work,
            )
            self.disturbed |= not curves[kind].quiet
            told.step()
        return curves

    def forecast(
        self,
        candidates: Sequence[Candidate],
        values: Mapping[str, tuple[int, ...]],
        curves: Mapping[str, LayerCurves],
        profile: NodeProfile | None,
    ) -> Forecast:
        """All but the time and the size of the whole."""
        places = {kind: place for place, kind in enumerate(curves)}
        layers = []
        for candidate in candidates:
            weight = candidate.weight
            shapes = [[values[v.name or ""] for v in layer.inputs] for layer in candidate.layers]
            kinds = [
                self.kind(candidate, layer, given)
                for layer, given in zip(candidate.layers, shapes, strict=True)
            ]
            measured = combine([curves[kind] for kind in kinds])
            layers.append(
                LayerForecast(
                    name=weight.name,
                    module=weight.module,
                    op_type=weight.nodes[0].op_type,
                    kind=candidate.kind,
                    shape=candidate.shape,
                    rows=sum(
                        layer.products(given[0])
                        for layer, given in zip(candidate.layers, shapes, strict=True)
                    ),
                    sparsity=candidate.sparsity,
                    reason=self.reasons[weight.name],
                    companion=candidate.companion,
                    forms=(*candidate.allowed_forms(), *measured.encoded),
                    outputs=candidate.layers[0].stored_outputs,
                    packed_bytes=_packed_bytes(candidate),
                    key=places[kinds[0]],
                    dense_ms=measured.dense_ms,
                    share=None if profile is None else profile.share(weight.name),
                    curves=measured.curves,
                    encoded=self.encoded_bytes(candidate),
                    others=candidate.names[1:],
                )
            )
            for part in candidate.parts:
                part.weight.release()
        rest = self.nbytes - sum(layer.nbytes for layer in layers)
        sums = sum(layer.dense_ms for layer in layers)
        times = TimeModel(0.0, 1.0, 1.0, (0.0,), (1.0,), 0.0)
        return Forecast(
            tuple(layers),
            self.structures,
            times,
            sums,
            self.nbytes,
            max(0, rest),
            self.min_speedup,
            (),
            tuple(self.grids),
        )

    def encoded_bytes(self, candidate: Candidate) -> dict[int, int]:
        """What its weights take by the bits that they can have."""
        if self.reasons[candidate.weight.name] or any(non_finite for _, non_finite in candidate.counts):
            return {}
        shapes = [part.weight.shape for part in candidate.parts]
        return {
            bits: sum(grid.nbytes(shape) for shape in shapes)
            for bits, grid in self.grids.items()
            if grid.group_size <= min(inputs for inputs, _ in shapes)
        }

    def fit(
        self,
        original: ir.Model,
        fused: ir.Model,
        forecast: Forecast,
        wanted: Sequence[float],
        changed: bool,
        spool: model_io.Spool,
    ) -> tuple[Forecast, list[tuple[float | None, Anchor]], list[tuple[int, Anchor]]]:
        """Compile and time models as a whole: those of floats, and with ``wanted`` ones one for each number of bits.
        ``changed`` says whether ``fused`` differs from the original without any zeros."""
        few = [(bits, forecast.uniform(0.0, bits=bits)) for bits in self.grids if wanted]
        plans: list[tuple[float | None, int, Plan]] = [
            *((share, FLOAT_BITS, forecast.uniform(share)) for share in wanted),
            *((None, bits, plan) for bits, plan in few),
        ]
        plans = [(share, bits, plan) for share, bits, plan in plans if _is_timed(forecast, bits, plan)]
        if changed:
            plans.insert(0, (None, FLOAT_BITS, {}))
        timed: list[tuple[float | None, int, Sums, list[Ratio]]] = []
        rest = forecast.rest_bytes
        told = Progress(self.say, "models", len(plans), interval=0)
        with open_runner(original, self.bench, self.path, library=False, timed=True) as dense:
            whole = dense.whole
            first = [dense.milliseconds(self.feeds) for _ in range(3 if whole else 1)]
        for share, bits, plan in plans if whole else ():
            choices, forms = forecast.decide(plan)
            path = self.compile(fused, share, bits, forms, PassContext(spool.put))
            spool.release()  # what was written is not looked at again
            found = self.time_whole(original, fused, path)
            timed.append((share, bits, forecast.sums(choices, forms), found))
            told.step()
            if bits != FLOAT_BITS:
                continue
            kept = sum(forecast.layer_bytes(layer.name, choices[layer.name]) for layer in forecast.layers)
            rest = sum(file.stat().st_size for file in path.parent.iterdir()) - kept
        self.disturbed |= any(not ratio.quiet for *_, found in timed for ratio in found)
        dense_ms = statistics.median([ratio.first_ms for *_, found in timed for ratio in found] or first)
        speedups = [[ratio.median for ratio in found] for *_, found in timed]
        noise = scatter(speedups)
        made = [
            (share, bits, make_anchor(sums, dense_ms, medians, noise))
            for (share, bits, sums, _), medians in zip(timed, speedups, strict=True)
        ]
        anchors = [(share, anchor) for share, bits, anchor in made if bits == FLOAT_BITS]
        encoded = [(bits, anchor) for _, bits, anchor in made if bits != FLOAT_BITS]
        if not changed or not whole:
            anchors.insert(0, (None, Anchor(forecast.sums(*forecast.decide({})), dense_ms, 0.0)))
        fitted = dataclasses.replace(
            forecast,
            times=fit([anchor for _, anchor in (*anchors, *encoded)], noise),
            dense_ms=dense_ms,
            rest_bytes=rest,
            anchored=(UNSTRUCTURED,) if any(bits == FLOAT_BITS for _, bits, _ in made) else (),
        )
        return fitted, anchors, encoded

    def time_whole(self, original: ir.Model, fused: ir.Model, path: Path) -> list[Ratio]:
        """The original against the model at ``path``, made of ``fused``, in new sessions several times; more often if
        other programs were in the way, whose times are left out where enough others are there."""
        found: list[Ratio] = []
        quiet: list[Ratio] = []
        while len(quiet) < FEWEST_STARTS and len(found) < _MOST_WHOLE_STARTS:
            found += time_models(
                [(original, self.path), (fused, path)],
                [self.feeds],
                self.bench,
                rounds=_WHOLE_ROUNDS,
                seconds=_WHOLE_SECONDS,
            )
            quiet = [ratio for ratio in found if ratio.quiet]
        return quiet if len(quiet) >= FEWEST_STARTS else found

    def with_losses(self, model: ir.Model, forecast: Forecast, samples: Samples) -> Forecast:
        """With what zeros and bits in each layer that may be changed do to the outputs."""
        wanted = {layer.name for layer in forecast.layers if not layer.reason}
        found = measure_losses(
            model,
            [weight for weight in find_weights(model)[0] if weight.name in wanted],
            samples,
            CalibrationOptions(threads=self.bench.threads),
            sparsities=self.sparsities,
            structures=self.structures,
            grids=self.grids,
            blocks={
                form.bits: form.block
                for layer in forecast.layers
                for form in layer.forms
                if isinstance(form, EncodedForm) and form.block
            },
            by_token=[layer.name for layer in forecast.layers if layer.rounds_tokens(self.min_speedup)],
            work=self.bench.work,
            progress=self.say,
        )
        layers = [dataclasses.replace(layer, loss=found.get(layer.name)) for layer in forecast.layers]
        return dataclasses.replace(forecast, layers=tuple(layers))

    def compile(
        self, fused: ir.Model, share: float | None, bits: int, forms: Mapping[str, str], context: PassContext
    ) -> Path:
        """Write ``fused`` with this share of zeros and these bits in all its layers and the chosen ones in their
        ``forms``."""
        pruned = fused.clone()
        if share is not None:
            Magnitude(sparsity=share, targets=self.selection.targets, ignore=self.selection.ignore)(
                pruned, context
            )
        if bits != FLOAT_BITS:
            grid = self.grids[bits]._asdict()
            targets, ignore = self.selection.targets, self.selection.ignore
            QuantizeWeights(method="rtn", **grid, targets=targets, ignore=ignore)(pruned, context)
        chosen = [
            (candidate, form)
            for candidate in find_candidates(pruned)[0]
            for form in candidate.forms
            if forms.get(candidate.weight.name) == form.name
        ]
        lowered, _ = lower_layers(pruned, chosen, Packer(context), context)
        folder = self.bench.work / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return model_io.save_model(lowered, folder)


def _grid(bits: int, group_size: int | None) -> UsualGrid:
    """That of weights that take so many bits in a file: in a byte as many as products of integers are exact with."""
    return usual_grid(resolved_bits(None) if bits == _BYTE else bits, group_size)


def _is_timed(forecast: Forecast, bits: int, plan: Plan) -> bool:
    """Whether a model with ``plan`` tells the times of layers in forms for so many bits: it has some, and if these are
    few, enough of the dense time to show in that of the whole."""
    forms = forecast.decide(plan)[1]
    layers = [forecast.by_name[name] for name, form in forms.items()]
    own = sum(layer.dense_ms for layer in layers if layer.form(forms[layer.name]).bits == bits)
    least = 0.0 if bits == FLOAT_BITS else _LEAST_SHARE * sum(layer.dense_ms for layer in forecast.layers)
    return own > least


def _candidates(model: ir.Model) -> tuple[list[Candidate], list[Declined]]:
    """Those whose weights are floats: what zeros would bring in others is not told yet."""
    candidates, declined = find_candidates(model)
    return [found for found in candidates if isinstance(found.weight.encoding, Dense)], declined


_Kinds = dict[str, tuple[Candidate, Layer, list[tuple[int, ...]]]]


def _packed_bytes(candidate: Candidate) -> dict[str, int]:
    """Its size as it is, in the forms in which this may be asked for."""
    packer = Packer(PassContext())
    return {
        form.name: packer(candidate, form).nbytes
        for form in candidate.allowed_forms()
        if candidate.companion or not candidate.refusal(form)
    }
