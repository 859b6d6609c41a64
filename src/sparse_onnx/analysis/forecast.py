"""What a model would become with zeros that it does not have yet: speed and size of any plan, without measuring again.

A *plan* gives layers, by the name of their weight, a share of zeros, a pattern and bits. :class:`Forecast` decides as
``optimize`` would: a layer gets the form that its curves say is the fastest, if that is at least ``min_speedup`` times
as fast as dense; and while the whole would be slower than dense, the least gainful half of these layers is given up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping

from sparse_onnx.analysis.choice import ROUNDED_BITS, Choice
from sparse_onnx.analysis.sensitivity import Loss
from sparse_onnx.analysis.time_model import Sums, TimeModel
from sparse_onnx.errors import UsageError
from sparse_onnx.options import unknown
from sparse_onnx.passes.lower.forms import DENSE, FLOAT_BITS, Form
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY
from sparse_onnx.passes.solvers.masks import MaskStructure, resolve_sparsity
from sparse_onnx.sparse_ops.formats.base import Outputs
from sparse_onnx.timing.choose import least_gainful
from sparse_onnx.timing.curves import UNSTRUCTURED, Curve, curve_of
from sparse_onnx.timing.forms import COARSE_GAIN

__all__ = ["Choice", "Forecast", "LayerForecast", "Outlook", "Plan"]

Plan = Mapping[str, Choice]

_OTHER_PATTERN = 0.03
"""Relative error that comes on top for patterns and bits that no anchor has."""


@dataclasses.dataclass(frozen=True)
class LayerForecast:
    """A weight that kernels could take, with all the layers that use it.

    Attributes:
        name: Of the weight. ``module`` is the path of the layer in the source model, ``op_type`` its operator.
        shape: (K, N): inputs that are summed over, outputs.
        rows: How many vectors of K elements it multiplies in one run.
        sparsity: The share of zeros that are there already.
        reason: Why pruning leaves it alone; empty if it does not.
        companion: Whether it is lowered beside layers of its ``kind`` in the same form, with the few zeros that it has.
        forms: Those that it can get beside dense, of floats and of few bits.
        outputs: What its operator asks of the order of the stored outputs.
        packed_bytes: Size with the zeros that are there, by the form; without forms that refuse these.
        key: Equal for layers that were measured together.
        dense_ms: Its time alone.
        share: Of the time of the whole dense model, as profiled; None if that was not possible.
        curves: Time relative to dense by (form, pattern).
        loss: What its zeros do to the model's outputs; None if that was not measured.
        encoded: Size in few bits, whatever its zeros, by the bits that it can have.
        others: Names of the weights that are pruned and lowered along with it; they are part of all other numbers
            but the loss.
    """

    name: str
    module: str
    op_type: str
    kind: str
    shape: tuple[int, int]
    rows: int
    sparsity: float
    reason: str
    companion: bool
    forms: tuple[Form, ...]
    outputs: Outputs
    packed_bytes: Mapping[str, int]
    key: int
    dense_ms: float
    share: float | None
    curves: Mapping[tuple[str, str], Curve]
    loss: Loss | None = None
    encoded: Mapping[int, int] = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in dense form (float32)."""
        return 4 * math.prod(self.shape)

    @property
    def products(self) -> int:
        """Multiply-adds in one run, zeros included."""
        return self.rows * math.prod(self.shape)

    def break_even(self, structure: str, min_speedup: float) -> float | None:
        """The share of zeros from which on a form of floats is ``min_speedup`` times as fast as dense; None: never, or
        the weight cannot have that pattern."""
        points = [
            self.form_break_even(form, structure, min_speedup)
            for form in self.forms
            if form.bits == FLOAT_BITS
        ]
        return min((point for point in points if point is not None), default=None)

    def form_break_even(self, form: Form, structure: str, min_speedup: float) -> float | None:
        """The same of one form."""
        curve = curve_of(self.curves, form, structure)
        found = None if curve is None else curve.break_even(min_speedup)
        return None if found is None else max(found, form.least_zeros)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those that there are curves of, in a form of floats."""
        floats = {form.name for form in self.forms if form.bits == FLOAT_BITS}
        return tuple(dict.fromkeys(structure for name, structure in self.curves if name in floats))

    def patterns_of(self, form: Form) -> tuple[str, ...]:
        """Those that there are curves of in that form."""
        return tuple(structure for name, structure in self.curves if name == form.name)

    def form(self, name: str) -> Form:
        """That of ``forms`` with this name."""
        return next(form for form in self.forms if form.name == name)

    def curve(self, form: str, choice: Choice) -> Curve:
        """Of that form, for the pattern of ``choice``."""
        found = curve_of(self.curves, self.form(form), choice.structure)
        assert found is not None
        return found

    def time(self, form: str, choice: Choice) -> float:
        """Of that form with these zeros, dense = 1."""
        return self.curve(form, choice).time(choice.sparsity)

    def best_form(self, choice: Choice, min_speedup: float, among: Collection[str] | None = None) -> str:
        """The fastest form with these zeros and bits, of those ``among`` them if given; dense unless another is
        ``min_speedup`` times as fast. As of the guard: a coarse form must be a tenth faster than others."""
        names = [
            form.name
            for form in self.forms
            if curve_of(self.curves, form, choice.structure) is not None
            and self._fits(form, choice)
            and (among is None or form.name in among)
        ]

        def judged(name: str) -> float:
            return self.time(name, choice) * (COARSE_GAIN if self.form(name).is_coarse else 1)

        best = min(names, key=judged, default=DENSE)
        return best if best != DENSE and self.time(best, choice) * min_speedup <= 1 else DENSE

    def _fits(self, form: Form, choice: Choice) -> bool:
        """Whether the form is worth timing with that choice, and may round what it rounds. As of the guard: a weight of
        few bits must not become larger."""
        if form.activations < choice.activations or not (self.companion or not form.refusal(choice.sparsity)):
            return False
        if form.bits == choice.bits:
            return True
        return form.bits == FLOAT_BITS and self.form_bytes(form.name, choice) <= self.encoded[choice.bits]

    def form_bytes(self, form: str, choice: Choice) -> float:
        """Expected size in that form."""
        if form == DENSE:
            return self.nbytes if choice.bits == FLOAT_BITS else self.encoded[choice.bits]
        chosen = self.form(form)
        if choice.sparsity <= self.sparsity and chosen.bits == FLOAT_BITS:
            return self.packed_bytes[form]
        integers = chosen.expected_nbytes(self.shape, choice.sparsity, choice.structure, self.outputs)
        return integers + chosen.scale_nbytes(self.shape)

    def rounds_tokens(self, min_speedup: float) -> bool:
        """Whether, of the forms that round activations, the one that it would get has a scale for every token."""
        for bits in self.encoded:
            name = self.best_form(Choice(bits=bits, activations=ROUNDED_BITS), min_speedup)
            if name != DENSE and self.form(name).activations != FLOAT_BITS:
                return self.form(name).by_token
        return False

    @property
    def precisions(self) -> tuple[tuple[int, int], ...]:
        """The (bits, activations) that it can have, see :class:`Choice`."""
        found = [(FLOAT_BITS, FLOAT_BITS)]
        for bits in self.encoded:
            rounded = {form.activations for form in self.forms if form.bits == bits}
            found += [(bits, activations) for activations in sorted({FLOAT_BITS} | rounded, reverse=True)]
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a plan leads to.

    Attributes:
        milliseconds: Of the optimized model.
        speedup: Dense / optimized time, expected between ``low`` and ``high``.
        nbytes: Size of the files.
        smaller: Size of the original's files / ``nbytes``.
        forms: Of the layers that do not stay dense, by name.
        given_up: The names of others that were faster alone, but made the whole slower.
        error: The expected relative error of the model's outputs, see :meth:`Forecast.error`; None without
            calibration data.
    """

    milliseconds: float
    speedup: float
    low: float
    high: float
    nbytes: float
    smaller: float
    forms: Mapping[str, str]
    given_up: tuple[str, ...]
    error: float | None


@dataclasses.dataclass(frozen=True)
class Forecast:
    """See the module's docstring.

    Attributes:
        layers: In the order of the graph.
        structures: The patterns that were measured.
        times: From sums over layers to the time of the whole.
        dense_ms: Of the whole dense model.
        dense_bytes: Of its files.
        rest_bytes: What an optimized model takes apart from the weights of ``layers``.
        min_speedup: From which speedup on a layer does not stay dense.
        anchored: The patterns of the models that ``times`` was fitted to.
        bits: Those of few that were measured.
    """

    layers: tuple[LayerForecast, ...]
    structures: tuple[str, ...]
    times: TimeModel
    dense_ms: float
    dense_bytes: int
    rest_bytes: float
    min_speedup: float
    anchored: tuple[str, ...]
    bits: tuple[int, ...] = ()

    @functools.cached_property
    def by_name(self) -> Mapping[str, LayerForecast]:
        return {layer.name: layer for layer in self.layers}

    def uniform(
        self, sparsity: float | None, structure: str = UNSTRUCTURED, bits: int = FLOAT_BITS
    ) -> dict[str, Choice]:
        """The plan that gives every layer that may be pruned and can have the pattern the same share of zeros, and all
        that can have them the same bits, with operators that may round activations. N:M implies the share.

        Raises UsageError for a pattern or bits that were not measured, and a share outside [0, 1) or at odds with the
        pattern.
        """
        self._check(structure, bits)
        share = resolve_sparsity(sparsity, MaskStructure.parse(structure))
        activations = FLOAT_BITS if bits == FLOAT_BITS else ROUNDED_BITS
        asked = Choice(share, structure, bits, activations)
        return {
            layer.name: asked if bits in layer.encoded else Choice(share, structure)
            for layer in self.layers
            if not layer.reason and (structure in layer.patterns or bits in layer.encoded)
        }

    def precisions(self, name: str) -> tuple[tuple[int, int], ...]:
        """The (bits, activations) that the layer ``name`` can have, see :class:`Choice`; floats first."""
        if name not in self.by_name:
            raise UsageError(unknown("layer", name, self.by_name))
        return self.by_name[name].precisions

    def _check(self, structure: str, bits: int) -> None:
        if structure not in self.structures:
            raise UsageError(unknown("mask_structure that was measured", structure, self.structures))
        if bits not in (FLOAT_BITS, *self.bits):
            known = ", ".join(map(str, (*self.bits, FLOAT_BITS)))
            raise UsageError(f"bits must be one that was measured ({known}), not {bits}")

    def outlook(self, plan: Plan) -> Outlook:
        """What ``plan`` leads to. Layers keep their zeros if it does not name them, if they cannot have the pattern, or
        if pruning leaves them alone.

        Raises UsageError for a name that no layer has, and a share of zeros or pattern as :meth:`uniform` does.
        """
        choices, forms = self.decide(plan)
        given_up: list[str] = []
        while forms and self._milliseconds(choices, forms) > self.dense_ms:
            gains = [self._gain(name, form, choices[name]) for name, form in forms.items()]
            dropped = least_gainful(gains)
            given_up += [name for index, name in enumerate(forms) if index in dropped]
            forms = {name: forms[name] for index, name in enumerate(forms) if index not in dropped}
        # Layers that stay dense keep their weights; where all do, in floats, the source is written as it is, not even
        # fused.
        changed = bool(forms) or any(choice.bits != FLOAT_BITS for choice in choices.values())
        ms = self._milliseconds(choices, forms) if changed else self.dense_ms
        error = self._error(choices, forms, ms) if changed else 0.0
        speedup = self.dense_ms / ms
        nbytes = float(self.dense_bytes)
        if changed:
            nbytes = self.rest_bytes + sum(
                layer.form_bytes(forms.get(layer.name, DENSE), choices[layer.name]) for layer in self.layers
            )
        return Outlook(
            ms,
            speedup,
            speedup / (1 + error),
            speedup * (1 + error),
            nbytes,
            self.dense_bytes / nbytes if nbytes else 1.0,
            forms,
            tuple(given_up),
            self.error(self._lossy(plan, choices, forms)),
        )

    def _lossy(
        self, plan: Plan, choices: Mapping[str, Choice], forms: Mapping[str, str]
    ) -> dict[str, Choice]:
        """Of the layers in ``plan`` what changes numbers: floats that stay dense get their zeros back, few bits keep
        theirs, and inputs are rounded where the form does that."""
        found = {}
        for name in plan:
            choice, form = choices[name], forms.get(name, DENSE)
            if form != DENSE:
                rounded = self.by_name[name].form(form).activations
                found[name] = choice._replace(activations=max(choice.activations, rounded))
            elif choice.bits != FLOAT_BITS:
                found[name] = choice._replace(activations=FLOAT_BITS)
        return found

    def error(self, plan: Plan) -> float | None:
        """The expected relative error of the model's worst output after pruning to ``plan`` and rounding by the methods
        ``auto`` with calibration data; None where the loss of a layer in it is not known, and without such data.

        What is left of the errors E of the layers alone adds up in squares, as those of independent causes do. And
        least squares lose no more than everything: E / √(1 + E²). Checked on a sentence encoder at 50 to 80 %, with 8
        and with 4 bits, within 5 %.
        """
        if all(layer.loss is None for layer in self.layers):
            return None
        total = 0.0
        for name, choice in self._choices(plan).items():
            layer = self.by_name[name]
            if choice.sparsity <= layer.sparsity:  # zeros that are there cost nothing
                choice = Choice(bits=choice.bits, activations=choice.activations)
            if choice == Choice():
                continue
            left = None if layer.loss is None else layer.loss.left(choice)
            if left is None:
                return None
            total += left**2
        expected = math.sqrt(total)
        return expected / math.hypot(1, expected)

    def decide(self, plan: Plan) -> tuple[dict[str, Choice], dict[str, str]]:
        """Of every layer the zeros that it has after ``plan``, with the pattern whose curves tell its times; and of the
        layers that are faster in another form than dense the fastest one."""
        choices = self._choices(plan)
        forms = {layer.name: layer.best_form(choices[layer.name], self.min_speedup) for layer in self.layers}
        companions = [
            layer.name
            for layer in self.layers
            if layer.companion and choices[layer.name].sparsity < MIN_SPARSITY
        ]
        around: dict[str, set[str]] = collections.defaultdict(set)
        for layer in self.layers:
            if layer.name not in companions:
                around[layer.kind].add(forms[layer.name])
        for name in companions:
            layer = self.by_name[name]
            forms[name] = layer.best_form(choices[name], self.min_speedup, around[layer.kind])
        return choices, {name: form for name, form in forms.items() if form != DENSE}

    def layer_milliseconds(self, name: str, choice: Choice | None = None) -> float:
        """What the layer adds to the time of the whole, in the form that would be chosen; times of the whole are sums
        of these and a constant, as long as nothing is given up and the sum is no smaller than any anchor's."""
        choice = self._choice(name, choice)
        layer = self.by_name[name]
        form = layer.best_form(choice, self.min_speedup)
        if form == DENSE:
            return self.times.dense_factor * layer.dense_ms
        return self.times.factor(layer.form(form).bits) * layer.dense_ms * layer.time(form, choice)

    def layer_bytes(self, name: str, choice: Choice | None = None) -> float:
        """What the layer adds to the size, in the form that would be chosen."""
        choice = self._choice(name, choice)
        layer = self.by_name[name]
        return layer.form_bytes(layer.best_form(choice, self.min_speedup), choice)

    def _choices(self, plan: Plan) -> dict[str, Choice]:
        asked = {name: self._choice(name, choice) for name, choice in plan.items()}
        return {name: asked[name] if name in asked else self._choice(name, None) for name in self.by_name}

    def _choice(self, name: str, asked: Choice | None) -> Choice:
        """What one layer has: the zeros as ``asked``, if these are more and it can have them, and the bits, if it can
        have those; else as it is."""
        if name not in self.by_name:
            raise UsageError(unknown("layer", name, self.by_name))
        layer = self.by_name[name]
        zeros, numbers = (layer.sparsity, UNSTRUCTURED), (FLOAT_BITS, FLOAT_BITS)
        if asked is not None:
            self._check(asked.structure, asked.bits)
            resolve_sparsity(asked.sparsity, MaskStructure.parse(asked.structure))
            sparser = asked.structure in layer.patterns and asked.sparsity > layer.sparsity
            if sparser and not layer.reason:
                zeros = asked.sparsity, asked.structure
            if asked.bits in layer.encoded and not layer.reason:
                numbers = asked.bits, asked.activations
        return Choice(*zeros, *numbers)

    def _gain(self, name: str, form: str, choice: Choice) -> float:
        layer = self.by_name[name]
        return layer.dense_ms * (1 - layer.time(form, choice))

    def sums(self, choices: Mapping[str, Choice], forms: Mapping[str, str]) -> Sums:
        """Over the layers, with those in ``forms`` in their form and the others dense."""
        total = sum(layer.dense_ms for layer in self.layers)
        floats: list[LayerForecast] = []
        encoded: dict[int, list[LayerForecast]] = collections.defaultdict(list)
        for name, form in forms.items():
            layer = self.by_name[name]
            bits = layer.form(form).bits
            (floats if bits == FLOAT_BITS else encoded[bits]).append(layer)

        def spent(layers: Collection[LayerForecast]) -> float:
            return sum(
                layer.dense_ms * layer.time(forms[layer.name], choices[layer.name]) for layer in layers
            )

        return Sums(
            total - sum(self.by_name[name].dense_ms for name in forms),
            spent(floats),
            sum(layer.dense_ms * choices[layer.name].sparsity for layer in floats) / total if total else 0.0,
            {bits: spent(layers) for bits, layers in encoded.items()},
        )

    def _milliseconds(self, choices: Mapping[str, Choice], forms: Mapping[str, str]) -> float:
        return self.times.milliseconds(self.sums(choices, forms))

    def _error(self, choices: Mapping[str, Choice], forms: Mapping[str, str], ms: float) -> float:
        """Relative error to expect: of the whole, beyond the anchors, and for patterns that no anchor has that of their
        curves (layers measured together err together)."""
        by_key: dict[int, float] = collections.defaultdict(float)
        for name, form in forms.items():
            layer, choice = self.by_name[name], choices[name]
            bits = layer.form(form).bits
            if bits not in self.times.encoded and (
                bits != FLOAT_BITS or choice.structure not in self.anchored
            ):
                low, high = layer.curve(form, choice).spread(choice.sparsity)
                by_key[layer.key] += self.times.factor(bits) * layer.dense_ms * (high - low) / 2
        other = math.hypot(_OTHER_PATTERN, *(spread / ms for spread in by_key.values())) if by_key else 0.0
        return math.hypot(self.times.error, self.times.error_beyond(self.sums(choices, forms)), other)
