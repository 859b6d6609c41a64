"""The guard: time every candidate in all its forms, dense among them, on this machine, and keep the fastest.

Each layer is cut out of the model with the bias, residual and activation that belong to it, and timed at the shapes
that it has in the model, in every form as an ONNX Runtime session, in turn. Between runs a buffer larger than the
private caches is walked over, since in a model the other layers' weights pass through them. Equal layers are timed
once.

What threads and memory a session happens to get shifts all its times, so all sessions are made anew six times, and
more often as long as it cannot be told which form is the fastest: the 95 % interval of its speedup contains
``min_speedup``, or that against another form 1. Where it still does in the end, the median decides and the reason says
``close``: only there may another run decide otherwise, unless it finds the timing in the cache. Measurements that other
programs disturbed are left out if they can be; else the reason says so.

For several target shapes a form wins by its speedup at the worst of them, or in their weighted mean time. Forms that
change a weight's numbers are considered only where they are allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.passes.lower.forms import DENSE, Form
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.patterns.layer import Layer, layer_kind
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing.cache import TimingCache, environment_key
from sparse_onnx.timing.curves import UNSTRUCTURED, LayerCurves, curve_of
from sparse_onnx.timing.forms import Comparison, fastest, pairs, sum_of, time_forms
from sparse_onnx.timing.layers import cut_layer
from sparse_onnx.timing.rounds import Ratio, repeat
from sparse_onnx.timing.table import TimingTable

__all__ = [
    "Bench",
    "Decision",
    "decide",
    "decide_by_table",
    "expected_times",
    "layer_key",
    "least_gainful",
    "lowered",
    "measure",
]

# Of one set of sessions, and of all together. Slow layers get fewer rounds and sessions.
_ROUNDS, _ROUNDS_SECONDS, _SECONDS = 9, 0.3, 3.0


@dataclasses.dataclass(frozen=True)
class Bench:
    """How layers are timed.

    Attributes:
        workbench: What they are run with.
        cache: Timings that are known already; new ones go there.
        min_speedup: A form is measured against dense until its speedup can be told from this one.
    """

    workbench: Workbench
    cache: TimingCache = dataclasses.field(default_factory=TimingCache)
    min_speedup: float = 1.02

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """What all keys of the cache have in common."""
        return environment_key(self.workbench.threads)


@dataclasses.dataclass(frozen=True)
class Decision:
    """The form of one candidate. ``times`` has milliseconds by form, dense among them, per run of the model and summed
    over the weight's layers; it is empty where nothing was measured. ``low`` and ``high`` bound the speedup (95 %) of
    the form over dense; where dense is kept, that of the fastest other one.

    ``target`` is the place of the target shapes that the times hold for, the worst ones; None where they are means over
    the targets. ``close`` says that another measurement could decide otherwise; ``cached`` that an earlier run has
    timed all of it; ``quiet`` that no other program was in the way.
    """

    candidate: Candidate
    form: str
    reason: str
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    target: int | None = None
    close: bool = False
    cached: bool = False
    quiet: bool = True

    @property
    def lowered(self) -> bool:
        """Whether it is another form than dense."""
        return self.form != DENSE

    @property
    def gain(self) -> float:
        """Milliseconds that the form saves; 0 where it was not measured."""
        return self.times.get(DENSE, 0.0) - self.times.get(self.form, 0.0)


def lowered(decisions: Sequence[Decision]) -> list[tuple[Candidate, Form]]:
    """The candidates that do not stay dense, with their forms."""
    return [
        (decision.candidate, form)
        for decision in decisions
        for form in decision.candidate.forms
        if form.name == decision.form
    ]


def decide_by_table(
    candidates: Sequence[Candidate],
    table: TimingTable | None = None,
    targets: Sequence[Mapping[str, tuple[int, ...]]] = (),
    *,
    weights: Sequence[float] | None = None,
    min_speedup: float = 1.02,
    allowed: Collection[str] = (),
) -> list[Decision]:
    """Decide without timing, for a machine that is not this one: by the curves in ``table``, or where it has none by
    the share of zeros from which on a form is sure to win. The others are as in :func:`decide`."""
    decisions: list[Decision] = []
    for c in _companions_last(candidates):
        forms, against = _considered(c, decisions, allowed)
        pattern = c.weight.value.metadata_props.get(STRUCTURE_KEY, UNSTRUCTURED)
        known, zeros = None, f"not timed: {c.sparsity:.1%} zeros"
        if table is not None:
            known = expected_times(c, c.allowed_forms(allowed), table.find, targets, c.sparsity, pattern)
            if known is None:
                zeros = f"not in the timing table: {c.sparsity:.1%} zeros"
        names = {form.name for form in forms}
        judged = [_only(found, names) for found in known or ()]
        if c.companion and not forms:
            decisions.append(Decision(c, DENSE, against))
        elif judged and judged[0]:
            by_times = _judge(c, judged, weights, min_speedup)
            decisions.append(dataclasses.replace(by_times, reason=f"{by_times.reason}, by the timing table"))
        elif c.companion:
            decisions.append(Decision(c, forms[0].name, f"not timed: beside {forms[0].name} layers"))
        else:
            decisions.append(_by_zeros(c, allowed, zeros))
    return decisions


def _by_zeros(candidate: Candidate, allowed: Collection[str], zeros: str) -> Decision:
    """By the share of zeros alone; ``zeros`` says it."""
    sure = [
        (form.sure_from, form.name) for form in candidate.allowed_forms(allowed) if form.sure_from is not None
    ]
    if not sure:
        return Decision(candidate, DENSE, zeros)
    least, name = min(sure)
    if candidate.sparsity >= least:
        return Decision(candidate, name, f"{zeros}, at least {least:.0%}")
    return Decision(candidate, DENSE, f"{zeros}, fewer than {least:.0%}")


def _only(found: Comparison, names: Collection[str]) -> Comparison:
    """Without forms that are not among ``names``."""
    return {pair: timing for pair, timing in found.items() if {*pair} <= {DENSE, *names}}


def expected_times(
    candidate: Candidate,
    forms: Sequence[Form],
    find: Callable[[Layer, Sequence[tuple[int, ...]]], LayerCurves | None],
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    sparsity: float,
    structure: str,
) -> list[Comparison] | None:
    """The candidate at every target with these zeros, by the curves that ``find`` has of a layer with inputs of these
    shapes, in those of ``forms`` that all of them have for this pattern; None if there is no such form."""
    known: list[list[LayerCurves]] = []
    for shapes in targets:
        found = [find(layer, [shapes[v.name or ""] for v in layer.inputs]) for layer in candidate.layers]
        known.append([curves for curves in found if curves is not None])
        if len(known[-1]) < len(found):
            return None
    timed = [
        form
        for form in forms
        if all(curve_of(each.curves, form, structure) is not None for uses in known for each in uses)
    ]
    if not known or not timed:
        return None
    return [
        sum_of([_expected(curves, timed, sparsity, structure) for curves in uses], [1.0] * len(uses))
        for uses in known
    ]


def _expected(curves: LayerCurves, forms: Sequence[Form], sparsity: float, structure: str) -> Comparison:
    """Of one layer; two forms lie at opposite ends of their intervals at once."""
    times, ends = {DENSE: 1.0}, {DENSE: (1.0, 1.0)}
    for form in forms:
        curve = curve_of(curves.curves, form, structure)
        assert curve is not None
        times[form.name], ends[form.name] = curve.time(sparsity), curve.spread(sparsity)
    return {
        (a, b): Ratio(
            curves.dense_ms * times[a],
            curves.dense_ms * times[b],
            times[a] / times[b],
            ends[a][0] / ends[b][1],
            ends[a][1] / ends[b][0],
            quiet=curves.quiet,
        )
        for a, b in pairs([form.name for form in forms])
    }


def _companions_last(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.companion)


def _considered(
    candidate: Candidate, decisions: Sequence[Decision], allowed: Collection[str]
) -> tuple[tuple[Form, ...], str]:
    """The forms that are worth timing, or why there are none. A companion is considered in the forms that other layers
    of its kind have got."""
    forms = candidate.allowed_forms(allowed)
    if candidate.companion:
        around = {decision.form for decision in decisions if decision.candidate.kind == candidate.kind}
        names = " or ".join(form.name for form in candidate.forms)
        return tuple(
            form for form in forms if form.name in around
        ), f"no {candidate.kind} around it is {names}"
    reasons = [candidate.refusal(form) for form in forms]
    reasons += [
        f"{form.name} changes the numbers, which is not allowed"
        for form in candidate.forms
        if form not in forms
    ]
    return (
        tuple(form for form in forms if not candidate.refusal(form)),
        "; ".join(filter(None, reasons)),
    )


def decide(
    model: ir.Model,
    candidates: Sequence[Candidate],
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    packer: Packer,
    bench: Bench,
    *,
    weights: Sequence[float] | None = None,
    allowed: Collection[str] = (),
) -> list[Decision]:
    """Time the candidates. Each of ``targets`` has the shape of every layer's inputs, by the name of the value;
    ``weights`` has a number for each, or is None: the worst target decides. ``allowed`` are the names of forms that may
    change a weight's numbers."""
    start, progress = time.perf_counter(), bench.workbench.progress
    decisions: list[Decision] = []
    for index, candidate in enumerate(_companions_last(candidates)):
        forms, against = _considered(candidate, decisions, allowed)
        if not forms:
            decisions.append(Decision(candidate, DENSE, against))
            continue
        left = (time.perf_counter() - start) / max(1, index) * (len(candidates) - index)
        progress(f"timing {index + 1}/{len(candidates)} {candidate.weight.name} ({left:.0f} s left)")
        timings = []
        for shapes in targets:
            uses = [
                measure(
                    model,
                    candidate,
                    layer,
                    [shapes[v.name or ""] for v in layer.inputs],
                    forms,
                    packer,
                    bench,
                )
                for layer in candidate.layers
            ]
            timings.append(sum_of(uses, [1.0] * len(uses)))
        decisions.append(_judge(candidate, timings, weights, bench.min_speedup))
    if disturbed := sum(not decision.quiet for decision in decisions):
        progress(
            f"warning: other programs took processors while {disturbed} layers were timed: another run may decide "
            "otherwise, and these times are not kept; run again when the machine is idle, or with fewer --threads"
        )
    return decisions


def least_gainful(gains: Sequence[float]) -> set[int]:
    """The places of the smaller half (rounded up) of ``gains``: the layers to give up first where the whole is slower
    than dense."""
    order = sorted(range(len(gains)), key=lambda place: gains[place])
    return set(order[: math.ceil(len(gains) / 2)])


def _judge(
    candidate: Candidate, targets: Sequence[Comparison], weights: Sequence[float] | None, min_speedup: float
) -> Decision:
    coarse = {form.name for form in candidate.forms if form.is_coarse}
    best = fastest(targets, weights, min_speedup, coarse)
    timing = best.timing
    wins, close = timing.median >= min_speedup, timing.close_to(min_speedup)
    reason = f"{timing.median:.2f}x dense ({timing.low:.2f} to {timing.high:.2f})"
    if len(targets) > 1:
        mean = f"in the mean of {len(targets)} targets"
        reason += f" {mean if best.target is None else f'at target {best.target + 1} of {len(targets)}'}"
    if not wins:
        if best.rivals:
            reason = f"{best.form} {reason}"
        reason += f", below min_speedup {min_speedup}" + (" but close" if best.close else "")
    elif close:
        reason += f", close to min_speedup {min_speedup}"
    for name, rival in best.rivals.items() if wins else ():
        reason += f", {rival.median:.2f}x {name} ({rival.low:.2f} to {rival.high:.2f})"
        reason += " but close" if rival.close_to(1) else ""
        reason += ", which rounds coarser" if name in coarse and best.form not in coarse else ""
    if timing.cached:
        reason += ", timed in an earlier run"
    if not timing.quiet:
        reason += ", timed beside other programs"
    return Decision(
        candidate,
        best.form if wins else DENSE,
        reason,
        best.times,
        timing.low,
        timing.high,
        best.target,
        best.close,
        timing.cached,
        timing.quiet,
    )


def layer_key(
    candidate: Candidate,
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
    forms: Sequence[Form],
    packer: Packer,
) -> dict[str, Any]:
    """What the times of a layer depend on, apart from machine and software."""
    return {
        **layer_kind(layer, shapes),
        "forms": {form.name: dict(form.lowering.layout(candidate, form, packer)) for form in forms},
        "sparsity": round(candidate.sparsity, 2),
    }


def measure(
    model: ir.Model,
    candidate: Candidate,
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
    forms: Sequence[Form],
    packer: Packer,
    bench: Bench,
) -> Comparison:
    """One layer of ``model``, dense and in all ``forms``, from the cache if it knows them timed together. ``shapes``
    are those of ``layer.inputs``, in this order.

    Raises:
        HostError: ONNX Runtime or the kernel library is missing.
    """
    common = layer_key(candidate, layer, shapes, forms, packer) | bench.environment
    keys = {pair: common | {"times": list(pair)} for pair in pairs([form.name for form in forms])}
    known = {pair: timing for pair, key in keys.items() if (timing := bench.cache.get(key)) is not None}
    if len(known) == len(keys):
        return known
    dense, feeds = cut_layer(model, layer.inputs, layer.results, shapes)
    models = {DENSE: dense}
    for form in forms:
        models[form.name] = dense.clone()
        form.lowering(layers=(candidate.weight.name,), packer=packer)(models[form.name])

    def once() -> Comparison:
        return time_forms(
            models,
            feeds,
            threads=bench.workbench.threads,
            work=bench.workbench.work,
            rounds=_ROUNDS,
            seconds=_ROUNDS_SECONDS,
        )

    def close(found: Comparison) -> bool:
        return fastest([found], None, bench.min_speedup).close

    timings = repeat(once, close=close, seconds=_SECONDS)
    for pair, timing in timings.items():
        bench.cache.put(keys[pair], timing)
    return timings
