"""The guard: time every candidate, dense against sparse, on this machine, and keep the sparse one where it wins.

Each layer is cut out of the model with the bias, residual and activation that belong to it, and timed at the shapes
that it has in the model, as two ONNX Runtime sessions in turn. Between runs a buffer larger than the private caches is
walked over, since in a model the other layers' weights pass through them. Equal layers are timed once.

What threads and memory a session happens to get shifts all its times, so both sessions are made anew six times, and
more often as long as the 95 % interval of the speedup contains ``min_speedup``. Where it still does in the end, the
median decides and the reason says ``close``: only there may another run decide otherwise, unless it finds the timing
in the cache. Measurements that other programs disturbed are left out if they can be; else the reason says so.

For several target shapes a layer is sparse if it wins at the worst of them, or in their weighted mean time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.passes.lower.lowering import Candidate, Packer
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY, Layer, layer_kind
from sparse_onnx.timing.cache import TimingCache, environment_key
from sparse_onnx.timing.curves import UNSTRUCTURED, LayerCurves
from sparse_onnx.timing.layers import cut_layer, time_pair
from sparse_onnx.timing.rounds import Ratio, repeat, together
from sparse_onnx.timing.table import TimingTable

__all__ = [
    "TABLE_SPARSITY",
    "Bench",
    "Decision",
    "decide",
    "decide_by_table",
    "expected_times",
    "layer_key",
    "least_gainful",
    "measure",
    "overall",
]

TABLE_SPARSITY = 0.65
"""Without a benchmark: from this share of zeros on the sparse kernel was faster on every machine measured."""

# Of one pair of sessions, and of all together. Slow layers get fewer rounds and sessions.
_ROUNDS, _ROUNDS_SECONDS, _SECONDS = 9, 0.3, 3.0


@dataclasses.dataclass(frozen=True)
class Bench:
    """How layers are timed.

    Attributes:
        threads: Intra-op threads of the sessions.
        work: Folder for scratch files.
        cache: Timings that are known already; new ones go there.
        min_speedup: A ratio is measured until it can be told from this one.
    """

    threads: int
    work: Path
    cache: TimingCache = dataclasses.field(default_factory=TimingCache)
    min_speedup: float = 1.02

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """What all keys of the cache have in common."""
        return environment_key(self.threads)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Sparse or dense for one candidate. Times are per run of the model, summed over the weight's layers;
    None where they were not measured. ``low`` and ``high`` bound the speedup (95 %).

    ``target`` is the place of the target shapes that the times hold for, the worst ones; None where they are means over
    the targets. ``close`` says that the interval contains what the layer had to gain; ``cached`` that an earlier run
    has timed all of it; ``quiet`` that no other program was in the way.
    """

    candidate: Candidate
    sparse: bool
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None
    low: float | None = None
    high: float | None = None
    target: int | None = None
    close: bool = False
    cached: bool = False
    quiet: bool = True


def decide_by_table(
    candidates: Sequence[Candidate],
    table: TimingTable | None = None,
    targets: Sequence[Mapping[str, tuple[int, ...]]] = (),
    *,
    weights: Sequence[float] | None = None,
    min_speedup: float = 1.02,
) -> list[Decision]:
    """Decide without timing, for a machine that is not this one: by the curves in ``table``, or where it has none by
    :data:`TABLE_SPARSITY`. ``targets`` and ``weights`` are as in :func:`decide`."""
    decisions: list[Decision] = []
    for c in _companions_last(candidates):
        pattern = c.weight.value.metadata_props.get(STRUCTURE_KEY, UNSTRUCTURED)
        known = None if table is None else expected_times(c, table.find, targets, c.sparsity, pattern)
        zeros = f"not timed: {c.sparsity:.1%} zeros"
        if table is not None and known is None:
            zeros = f"not in the timing table: {c.sparsity:.1%} zeros"
        if c.companion and (against := _alone(c, decisions)) is not None:
            decisions.append(against)
        elif known and (c.companion or c.sparsity >= MIN_SPARSITY):
            judged = _judge(c, known, weights, min_speedup)
            decisions.append(dataclasses.replace(judged, reason=f"{judged.reason}, by the timing table"))
        elif c.companion:
            decisions.append(Decision(c, True, "not timed: beside sparse layers"))
        elif c.sparsity >= TABLE_SPARSITY:
            decisions.append(Decision(c, True, f"{zeros}, at least {TABLE_SPARSITY:.0%}"))
        else:
            decisions.append(Decision(c, False, f"{zeros}, fewer than {TABLE_SPARSITY:.0%}"))
    return decisions


def expected_times(
    candidate: Candidate,
    find: Callable[[Layer, Sequence[tuple[int, ...]]], LayerCurves | None],
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    sparsity: float,
    structure: str,
) -> list[Ratio] | None:
    """The candidate at every target with these zeros, by the curves that ``find`` has of a layer with inputs of these
    shapes; None if it has none of a layer, or not of this pattern."""
    timings = []
    for shapes in targets:
        uses = []
        for layer in candidate.layers:
            found = find(layer, [shapes[value.name or ""] for value in layer.inputs])
            curve = None if found is None else found.curves.get(structure)
            if found is None or curve is None:
                return None
            time, (low, high) = curve.time(sparsity), curve.spread(sparsity)
            times = (found.dense_ms, found.dense_ms * time, 1 / time, 1 / high, 1 / low)
            uses.append(Ratio(*times, quiet=found.quiet))
        timings.append(together(uses, [1.0] * len(uses)))
    return timings or None


def _companions_last(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.companion)


def _alone(companion: Candidate, decisions: Sequence[Decision]) -> Decision | None:
    """The decision against a companion where no other layer of its kind is sparse, or None."""
    if any(d.sparse and d.candidate.lowering is companion.lowering for d in decisions):
        return None
    return Decision(companion, False, f"no {companion.lowering.kind} around it is sparse")


def decide(
    model: ir.Model,
    candidates: Sequence[Candidate],
    targets: Sequence[Mapping[str, tuple[int, ...]]],
    packer: Packer,
    bench: Bench,
    *,
    weights: Sequence[float] | None = None,
    progress: Callable[[str], None],
) -> list[Decision]:
    """Time the candidates. Each of ``targets`` has the shape of every layer's inputs, by the name of the value;
    ``weights`` has a number for each, or is None: the worst target decides."""
    start = time.perf_counter()
    decisions: list[Decision] = []
    for index, candidate in enumerate(_companions_last(candidates)):
        if candidate.companion:
            if (against := _alone(candidate, decisions)) is not None:
                decisions.append(against)
                continue
        elif candidate.sparsity < MIN_SPARSITY:
            reason = f"{candidate.sparsity:.1%} zeros: too few for any sparse kernel"
            decisions.append(Decision(candidate, False, reason))
            continue
        left = (time.perf_counter() - start) / max(1, index) * (len(candidates) - index)
        progress(f"timing {index + 1}/{len(candidates)} {candidate.weight.name} ({left:.0f} s left)")
        timings = []
        for shapes in targets:
            uses = [
                measure(model, candidate, layer, [shapes[v.name or ""] for v in layer.inputs], packer, bench)
                for layer in candidate.layers
            ]
            timings.append(together(uses, [1.0] * len(uses)))
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


def overall(targets: Sequence[Ratio], weights: Sequence[float] | None) -> tuple[Ratio, int | None]:
    """The timings at several targets as one: their mean by ``weights``, or without them the worst and its place."""
    if weights is not None:
        total = sum(weights)
        return together(targets, [weight / total for weight in weights]), None
    worst = min(range(len(targets)), key=lambda index: targets[index].median)
    return targets[worst], worst


def _judge(
    candidate: Candidate, targets: Sequence[Ratio], weights: Sequence[float] | None, min_speedup: float
) -> Decision:
    timing, worst = overall(targets, weights)
    wins, close = timing.median >= min_speedup, timing.close_to(min_speedup)
    reason = f"{timing.median:.2f}x dense ({timing.low:.2f} to {timing.high:.2f})"
    if len(targets) > 1:
        mean = f"in the mean of {len(targets)} targets"
        reason += f" {mean if worst is None else f'at target {worst + 1} of {len(targets)}'}"
    if not wins:
        reason += f", below min_speedup {min_speedup}" + (" but close" if close else "")
    elif close:
        reason += f", close to min_speedup {min_speedup}"
    if timing.cached:
        reason += ", timed in an earlier run"
    if not timing.quiet:
        reason += ", timed beside other programs"
    return Decision(
        candidate,
        wins,
        reason,
        timing.first_ms,
        timing.second_ms,
        timing.low,
        timing.high,
        worst,
        close,
        timing.cached,
        timing.quiet,
    )


def layer_key(
    candidate: Candidate, layer: Layer, shapes: Sequence[tuple[int, ...]], packer: Packer
) -> dict[str, Any]:
    """What the time of a layer depends on, apart from machine and software."""
    packed = packer(candidate)
    return {
        **layer_kind(layer, shapes),
        "packed": dict(packed.attributes),
        "sparsity": round(candidate.sparsity, 2),
    }


def measure(
    model: ir.Model,
    candidate: Candidate,
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
    packer: Packer,
    bench: Bench,
) -> Ratio:
    """One layer of ``model``, dense against sparse, from the cache if it knows it. ``shapes`` are those of
    ``layer.inputs``, in this order.

    Raises:
        HostError: ONNX Runtime or the kernel library is missing.
    """
    key = layer_key(candidate, layer, shapes, packer) | bench.environment
    if (known := bench.cache.get(key)) is not None:
        return known
    dense, feeds = cut_layer(model, layer.inputs, layer.results, shapes)
    sparse = dense.clone()
    candidate.lowering(layers=(candidate.weight.name,), packer=packer)(sparse)

    def once() -> Ratio:
        pair, libraries = [dense, sparse], [False, True]
        return time_pair(
            pair,
            libraries,
            feeds,
            threads=bench.threads,
            work=bench.work,
            rounds=_ROUNDS,
            seconds=_ROUNDS_SECONDS,
        )

    timing = repeat(once, threshold=bench.min_speedup, seconds=_SECONDS)
    bench.cache.put(key, timing)
    return timing
