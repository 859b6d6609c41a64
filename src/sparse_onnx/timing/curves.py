"""How fast each layer would be with zeros that it does not have yet: measured at a few sparsities, read off between.

A layer is cut out of the dense model, pruned by magnitude to every sparsity and pattern in question, lowered to every
form with the real kernels, and all of these are timed in turn with the dense layer, at the shape that it has in the
model. Layers that differ in nothing that matters to a kernel are measured once.

Forms of few bits are timed with weights that are rounded to nearest: once, where they have no use for zeros; else as
often as those of floats, rounded behind pruning.

Between the measured sparsities the time *relative to dense* is read off straight lines. It cannot rise with the
sparsity, so where noise says it does, neighbours are averaged first (isotonic regression). Below the first point the
first line is continued, beyond the last one nothing more is gained.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.model.bit_packing import stored_bits
from sparse_onnx.model.weights import Weight, find_weights
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.forms import FLOAT_BITS, Form
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.patterns.layer import Layer
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.quantize.by_bits import UsualGrid
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers.masks import MaskStructure, structure_reason
from sparse_onnx.running.machine_load import OtherLoad
from sparse_onnx.timing.layers import cut_layer, time_together
from sparse_onnx.timing.rounds import Ratio, pool, ratio

__all__ = [
    "SPARSITIES",
    "STRUCTURES",
    "UNSTRUCTURED",
    "Curve",
    "LayerCurves",
    "combine",
    "count_points",
    "curve_of",
    "forms_on_grid",
    "measure_curves",
]

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Where a curve is measured by default."""

STRUCTURES = ("unstructured", "2:4", "1:4", "1:8", "block:4x1", "block:8x1")
"""The patterns that are measured by default."""

UNSTRUCTURED = "unstructured"

_STARTS, _MOST_STARTS, _ROUNDS = 3, 5, 5
"""What memory and threads a session happens to get shifts all its times: so sessions are made anew, and more often
while other programs are in the way."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Times of one layer in one form with one pattern. ``sparsities`` rise; ``times`` are in units of the dense
    layer's, between ``low`` and ``high``, the range that repetitions scatter in. N:M has a single point.

    All arrays have one entry a point.
    """

    sparsities: tuple[float, ...]
    times: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def time(self, sparsity: float) -> float:
        """Time at ``sparsity``, dense = 1."""
        return _read_off(self.sparsities, self.times, sparsity)

    def spread(self, sparsity: float) -> tuple[float, float]:
        """What repetitions of :meth:`time` scatter in."""
        return tuple(_read_off(self.sparsities, side, sparsity) for side in (self.low, self.high))  # type: ignore[return-value]

    def break_even(self, min_speedup: float) -> float | None:
        """The least sparsity from which on the layer is ``min_speedup`` times as fast as dense, up to the last point;
        None if it never is."""
        limit, times = 1 / min_speedup, _falling(self.times)
        if times[-1] > limit:
            return None
        if times[0] <= limit:
            if len(times) == 1 or times[0] == times[1]:
                return self.sparsities[0]
            step = (times[0] - times[1]) / (self.sparsities[1] - self.sparsities[0])
            return float(max(0.0, self.sparsities[0] - (limit - times[0]) / step))
        # Times fall, np.interp wants them to rise.
        return float(np.interp(-limit, -times, self.sparsities))


def _falling(times: Sequence[float]) -> np.ndarray:
    """The non-increasing sequence nearest to ``times`` in squares: neighbours that rise become their mean."""
    groups: list[tuple[float, int]] = []
    for value in times:
        mean, count = value, 1
        while groups and groups[-1][0] < mean:
            before, size = groups.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        groups.append((mean, count))
    return np.repeat([mean for mean, _ in groups], [count for _, count in groups])


def _read_off(sparsities: Sequence[float], times: Sequence[float], at: float) -> float:
    smooth = _falling(times)
    if at < sparsities[0] and len(sparsities) > 1:
        slope = (smooth[1] - smooth[0]) / (sparsities[1] - sparsities[0])
        return float(smooth[0] + slope * (at - sparsities[0]))
    return float(np.interp(at, sparsities, smooth))


@dataclasses.dataclass(frozen=True)
class LayerCurves:
    """One kind of layer: its dense time alone in milliseconds, and a curve for each (form, pattern) that it takes; of a
    form that has no use for zeros one for all patterns, see :func:`curve_of`."""

    dense_ms: float
    curves: Mapping[tuple[str, str], Curve]
    quiet: bool = dataclasses.field(default=True, compare=False)
    """Whether no other program was in the way."""
    encoded: tuple[Form, ...] = dataclasses.field(default=(), compare=False)
    """Its forms of few bits."""


def curve_of(curves: Mapping[tuple[str, str], Curve], form: Form, structure: str) -> Curve | None:
    """Of ``form`` with zeros in that pattern, where that was measured; few bits without use for zeros were once."""
    once = form.bits != FLOAT_BITS and not form.least_zeros
    return curves.get((form.name, UNSTRUCTURED if once else structure))


def combine(uses: Sequence[LayerCurves]) -> LayerCurves:
    """All layers that use one weight as one: sums of times. They must have been measured at the same points."""
    total = sum(use.dense_ms for use in uses)
    curves = {}
    for key, first in uses[0].curves.items():
        if any(key not in use.curves for use in uses):
            continue
        sides = [
            tuple(
                sum(use.dense_ms * getattr(use.curves[key], side)[point] for use in uses) / total
                for point in range(len(first.sparsities))
            )
            for side in ("times", "low", "high")
        ]
        curves[key] = Curve(first.sparsities, *sides)
    named = {name for name, _ in curves}
    return LayerCurves(total, curves, encoded=tuple(form for form in uses[0].encoded if form.name in named))


def count_points(weight: Weight, sparsities: Sequence[float], structures: Sequence[str]) -> int:
    """How many points :func:`measure_curves` measures in every form."""
    return sum(1 for _ in _points(weight, sparsities, structures))


def measure_curves(
    model: ir.Model,
    candidate: Candidate,
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
    *,
    sparsities: Sequence[float],
    structures: Sequence[str],
    prunable: bool = True,
    grids: Sequence[UsualGrid] = (),
    encoded_structures: Sequence[str] = (UNSTRUCTURED,),
    threads: int,
    work: Path,
) -> LayerCurves:
    """Time one layer of ``model`` in all forms that keep its numbers, and in those of weights on ``grids``; see the
    module's docstring. Scratch files go to ``work``. Of forms of few bits that depend on zeros only
    ``encoded_structures`` are measured.

    What can be lowered with the zeros that it has, has a point with these: a companion, and a layer that is not
    ``prunable``, which has no other.
    """
    dense, feeds = cut_layer(model, layer.inputs, layer.results, shapes)
    weight, forms = candidate.weight, candidate.allowed_forms()
    as_it_is = [form for form in forms if candidate.companion or not (prunable or candidate.refusal(form))]
    models: dict[tuple[str, str, float], ir.Model] = {}
    for form in as_it_is:
        _add(models, form, (UNSTRUCTURED, candidate.sparsity), dense, weight)
    encoded: dict[str, Form] = {}
    for grid in grids if prunable else ():
        rounded = _on_grid(dense, candidate.names, grid)
        for form in _forms_of(rounded, weight, grid):
            if not form.least_zeros:
                encoded[form.name] = form
                _add(models, form, (UNSTRUCTURED, 0.0), rounded, weight)
    if prunable:
        for structure, sparsity in _points(weight, sparsities, structures):
            pruned, share = _with_zeros(dense, candidate.names, sparsity, structure)
            for form in forms:
                _add(models, form, (structure, share), pruned, weight)
            for grid in grids if structure in encoded_structures else ():
                rounded = _on_grid(pruned, candidate.names, grid)
                for form in _forms_of(rounded, weight, grid):  # some are for one pattern only
                    if form.least_zeros:
                        encoded[form.name] = form
                        _add(models, form, (structure, share), rounded, weight)
    measured: list[list[Ratio]] = [[] for _ in models]
    dense_ms: list[float] = []
    quiet = 0
    for _ in range(_MOST_STARTS):
        load = OtherLoad()
        dense_times, *others = time_together(
            [dense, *models.values()],
            [False, *(True for _ in models)],
            feeds,
            threads=threads,
            work=work,
            rounds=_ROUNDS,
        )
        spared = load.spared(threads)
        dense_ms += dense_times
        for found, times in zip(measured, others, strict=True):
            found.append(ratio(times, dense_times, quiet=spared))
        quiet += spared
        if quiet >= _STARTS:
            break
    pooled = [pool(found) for found in measured]
    curves: dict[tuple[str, str], Curve] = {}
    for key in dict.fromkeys((form, structure) for form, structure, _ in models):
        points = [
            (sparsity, found)
            for (*kind, sparsity), found in zip(models, pooled, strict=True)
            if tuple(kind) == key
        ]
        points.sort(key=lambda point: point[0])
        curves[key] = Curve(
            tuple(sparsity for sparsity, _ in points),
            tuple(found.median for _, found in points),
            tuple(found.low for _, found in points),
            tuple(found.high for _, found in points),
        )
    return LayerCurves(
        statistics.median(dense_ms),
        curves,
        quiet >= _STARTS,
        tuple(encoded.values()),
    )


def forms_on_grid(
    model: ir.Model,
    candidate: Candidate,
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
    zeros: tuple[float, str],
    grid: UsualGrid,
) -> list[Form]:
    """The forms of few bits that a layer of ``model`` would have with ``zeros``, a share and a pattern, on ``grid``."""
    cut, _ = cut_layer(model, layer.inputs, layer.results, shapes)
    rounded = _on_grid(_with_zeros(cut, candidate.names, *zeros)[0], candidate.names, grid)
    return _forms_of(rounded, candidate.weight, grid)


def _with_zeros(
    model: ir.Model, names: Sequence[str], sparsity: float | None, structure: str
) -> tuple[ir.Model, float]:
    """A copy of ``model`` with these weights pruned by magnitude, and their share of zeros; N:M implies it."""
    pruned = model.clone()
    fixed = MaskStructure.parse(structure).kind == "n:m"
    step = Magnitude(
        sparsity=None if fixed else sparsity, mask_structure=structure, targets=tuple(names), ignore=()
    )
    return pruned, float(step(pruned).statistics["sparsity"])


def _on_grid(model: ir.Model, names: Sequence[str], grid: UsualGrid) -> ir.Model:
    """A copy of ``model`` with these weights on the grid, as far as it fits them; those that have few bits stay on
    their own."""
    rounded = model.clone()
    floats = {weight.name for weight in find_weights(model)[0]}
    if targets := tuple(name for name in names if name in floats):
        QuantizeWeights(method="rtn", **grid._asdict(), targets=targets, ignore=())(rounded)
    return rounded


def _forms_of(model: ir.Model, weight: Weight, grid: UsualGrid) -> list[Form]:
    """The forms that are for the bits of ``grid`` and that the weight of that name has in ``model``."""
    bits = stored_bits(grid.bits)
    found = (candidate for candidate in find_candidates(model)[0] if candidate.weight.name == weight.name)
    return [form for candidate in found for form in candidate.forms if form.bits == bits < FLOAT_BITS]


def _add(
    models: dict[tuple[str, str, float], ir.Model],
    form: Form,
    zeros: tuple[str, float],
    pruned: ir.Model,
    weight: Weight,
) -> None:
    """A copy of ``pruned`` in the form, unless there is one: zeros that were there before may make two points one."""
    if (form.name, *zeros) not in models:
        lowered = pruned.clone()
        form.lowering(layers=(weight.name,), packer=Packer(PassContext()))(lowered)
        models[form.name, *zeros] = lowered


def _points(
    weight: Weight, sparsities: Sequence[float], structures: Sequence[str]
) -> Iterator[tuple[str, float | None]]:
    for structure in map(MaskStructure.parse, structures):
        if structure_reason(weight.shape, structure) is None:
            for sparsity in (None,) if structure.kind == "n:m" else sparsities:
                yield str(structure), sparsity
