"""What pruning would gain nothing from: known before a single weight is changed.

A weight that no sparse kernel can take stays dense whatever its zeros (float16, inside an If or a Loop, a shape that
the kernels do not have), and so does one whose every other form is slower at the share of zeros that it would get. One
that will have few bits has forms that make no use of zeros, too: these may be faster than all that do. Such zeros would
cost accuracy and buy no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.model.weights import Weight, find_weights
from sparse_onnx.passes.base import Pass, Stage
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.lowering import Candidate
from sparse_onnx.passes.patterns.layer import Layer, layer_kind
from sparse_onnx.passes.quantize.by_bits import UsualGrid
from sparse_onnx.passes.solvers.masks import MaskStructure
from sparse_onnx.progress import Progress
from sparse_onnx.timing.choose import Bench, expected_times
from sparse_onnx.timing.curves import LayerCurves, forms_on_grid, measure_curves
from sparse_onnx.timing.forms import fastest
from sparse_onnx.timing.table import TimingTable

__all__ = [
    "NO_KERNEL",
    "NO_USE",
    "CurvesOf",
    "below_break_even",
    "measured_curves",
    "prunes",
    "tabulated_curves",
    "without_kernel",
]

NO_KERNEL = "not pruned: no sparse kernel could take it"
NO_USE = "which makes no use of them"
"""Ends the reason of a layer that is faster in a form without use for its zeros."""

CurvesOf = Callable[
    [Candidate, Layer, Sequence[tuple[int, ...]], float, str, UsualGrid | None], LayerCurves | None
]
"""How fast one layer of a candidate is with inputs of these shapes, a share of zeros, a pattern, and floats or integers
on a grid; None: not known."""


def prunes(modifiers: Iterable[Pass]) -> bool:
    """Whether any of these passes makes zeros."""
    return any(modifier.stage is Stage.PRUNE for modifier in modifiers)


def without_kernel(model: ir.Model) -> dict[str, str]:
    """The weights that pruning could take and no kernel could, by name, with the reason."""
    candidates, declined = find_candidates(model)
    takable = {id(part.weight.value) for candidate in candidates for part in candidate.parts}
    why = {place.place: place.reason for place in declined}
    return {
        weight.name: f"{NO_KERNEL} ({why.get(weight.name, 'no lowering does')})"
        for weight in find_weights(model, encoded=True)[0]
        if id(weight.value) not in takable
    }


def below_break_even(
    model: ir.Model,
    modifiers: Iterable[Pass],
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    curves_of: CurvesOf,
    *,
    weights: Sequence[float] | None,
    min_speedup: float,
    grid_of: Callable[[Weight], UsualGrid | None] = lambda _weight: None,
    progress: Callable[[str], None] = lambda _line: None,
) -> dict[str, str]:
    """The weights that would surely miss ``min_speedup`` in every form with the zeros that ``modifiers`` give them, by
    name, with the reason.

    Surely: even the fastest repetition at the target that decides, or in the mean by ``weights``, is too slow.
    ``targets`` has the shape of every layer's inputs by the name of the value. A weight whose share of zeros is not
    known beforehand is not judged. ``grid_of`` says which weights get few bits afterwards and may be multiplied as
    integers; with them, also those that would surely be faster in a form that makes no use of zeros.
    """
    modifiers = tuple(modifiers)
    candidates, _ = find_candidates(model)
    against: dict[str, str] = {}
    steps = Progress(progress, "what can pay: layer", len(candidates))
    for candidate in candidates:
        steps.step()
        asked = _asked(modifiers, candidate.weight)
        if asked is None or candidate.companion or candidate.sparsity >= asked[0]:
            continue
        share, structure = asked
        zeros = f"{share:.1%} zeros"
        grid = grid_of(candidate.weight) if len(candidate.names) == 1 else None
        forms = [form for form in candidate.allowed_forms() if not form.refusal(share)]
        if grid is not None and (shapes := targets[0]):
            layer = candidate.layers[0]
            at = [shapes[value.name or ""] for value in layer.inputs]
            few = forms_on_grid(model, candidate, layer, at, asked, grid)
            forms += [form for form in few if not form.refusal(share)]
        if not forms:
            against |= dict.fromkeys(
                candidate.names, f"not pruned: {zeros} are too few for any sparse kernel"
            )
            continue

        def find(
            layer: Layer,
            shapes: Sequence[tuple[int, ...]],
            candidate: Candidate = candidate,
            asked: tuple[float, str] = asked,
            grid: UsualGrid | None = grid,
        ) -> LayerCurves | None:
            return curves_of(candidate, layer, shapes, *asked, grid)

        times = expected_times(candidate, forms, find, targets, share, structure)
        if times is None:
            continue
        coarse = {form.name for form in forms if form.is_coarse}
        best = fastest(times, weights, min_speedup, coarse)
        timing = best.timing
        using = {form.name for form in forms if form.least_zeros}
        rivals = [rival for name, rival in best.rivals.items() if name in using]
        if best.form not in using and timing.quiet and all(rival.low > 1 for rival in rivals):
            reason = f"not pruned: with {zeros} its fastest form would be {best.form}, {NO_USE}"
            against |= dict.fromkeys(candidate.names, reason)
            continue
        if timing.quiet and not best.close and timing.high < min_speedup:
            reason = (
                f"not pruned: with {zeros} its {best.form} form would be {timing.median:.2f}x dense "
                f"(at most {timing.high:.2f}), below min_speedup {min_speedup}"
            )
            against |= dict.fromkeys(candidate.names, reason)
    return against


def _asked(modifiers: Sequence[Pass], weight: Weight) -> tuple[float, str] | None:
    """The zeros that ``weight`` will have, and their pattern; None if that is not known, or nothing prunes it."""
    asked = [zeros for modifier in modifiers if (zeros := modifier.zeros_of(weight)) is not None]
    known = [(zeros.share, zeros.structure) for zeros in asked if zeros.share is not None]
    if not asked or len(known) < len(asked):
        return None
    return max(known, key=lambda zeros: zeros[0])


def tabulated_curves(table: TimingTable) -> CurvesOf:
    """Curves as ``table`` has them."""
    return lambda _candidate, layer, shapes, _share, _structure, _grid: table.find(layer, shapes)


def measured_curves(model: ir.Model, bench: Bench) -> CurvesOf:
    """Curves of ``model``'s layers, pruned by magnitude for it, as measured here; equal layers are measured once."""
    known: dict[str, LayerCurves] = {}

    def curves_of(
        candidate: Candidate,
        layer: Layer,
        shapes: Sequence[tuple[int, ...]],
        share: float,
        structure: str,
        grid: UsualGrid | None,
    ) -> LayerCurves | None:
        key = repr((layer_kind(layer, shapes), round(share, 2), structure, grid))
        if key not in known:
            parsed = MaskStructure.parse(structure)
            known[key] = measure_curves(
                model,
                candidate,
                layer,
                shapes,
                sparsities=() if parsed.kind == "n:m" else (share,),
                structures=(structure,),
                grids=() if grid is None else (grid,),
                encoded_structures=(structure,),
                threads=bench.workbench.threads,
                work=bench.workbench.work,
            )
        return known[key]

    return curves_of
