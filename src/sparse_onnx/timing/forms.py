"""One layer in several forms: timed in turn, compared pair by pair, and the fastest of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.passes.lower.forms import DENSE
from sparse_onnx.running.machine_load import OtherLoad
from sparse_onnx.timing.layers import time_together
from sparse_onnx.timing.rounds import Ratio, overall, ratio, together

__all__ = [
    "COARSE_GAIN",
    "Comparison",
    "Fastest",
    "against_dense",
    "fastest",
    "pairs",
    "sum_of",
    "time_forms",
]

Comparison = Mapping[tuple[str, str], Ratio]
"""Forms that were timed in the same rounds, dense first: by the names of two of them, in the order in which they were
timed, how many times faster the second one is."""


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """What a :data:`Comparison` of dense and the forms ``names`` holds."""
    return list(itertools.combinations((DENSE, *names), 2))


def time_forms(
    models: Mapping[str, ir.Model],
    feeds: Feeds,
    *,
    threads: int,
    work: Path,
    rounds: int,
    seconds: float,
) -> Comparison:
    """Models by the name of their form, dense first, in turn on the same ``feeds``; all but dense with the kernel
    library. See :func:`sparse_onnx.timing.layers.time_together`."""
    load = OtherLoad()
    libraries = [name != DENSE for name in models]
    times = time_together(
        list(models.values()), libraries, feeds, threads=threads, work=work, rounds=rounds, seconds=seconds
    )
    quiet = load.spared(threads)
    by_name = dict(zip(models, times, strict=True))
    _, *others = models
    return {(a, b): ratio(by_name[a], by_name[b], quiet=quiet) for a, b in pairs(others)}


def sum_of(parts: Sequence[Comparison], weights: Sequence[float]) -> Comparison:
    """The weighted sums of times, pair by pair, see :func:`sparse_onnx.timing.rounds.together`."""
    return {pair: together([part[pair] for part in parts], weights) for pair in parts[0]}


def against_dense(found: Comparison) -> dict[str, Ratio]:
    """How many times faster than dense every other form is."""
    return {second: timing for (first, second), timing in found.items() if first == DENSE}


@dataclasses.dataclass(frozen=True)
class Fastest:
    """The fastest ``form`` but dense.

    Attributes:
        timing: Against dense.
        target: The place of the target that ``timing`` holds for, its worst one; None: it is the mean over targets.
        times: Milliseconds of every form there, dense first.
        rivals: How many times faster it is than each other form there.
        close: Whether another measurement could decide otherwise: on dense, or on another form.
    """

    form: str
    timing: Ratio
    target: int | None
    times: Mapping[str, float]
    rivals: Mapping[str, Ratio]
    close: bool


COARSE_GAIN = 1.1
"""How much faster a coarse form must be than others."""


def fastest(
    targets: Sequence[Comparison],
    weights: Sequence[float] | None,
    min_speedup: float,
    coarse: Collection[str] = (),
) -> Fastest:
    """The form with the best median against dense: in the mean by ``weights``, or without them at its worst target.
    One that is ``coarse`` must be a tenth faster than those that are not."""
    by_target = [against_dense(found) for found in targets]
    judged = {name: overall([found[name] for found in by_target], weights) for name in by_target[0]}
    best = max(judged, key=lambda name: judged[name][0].median / (COARSE_GAIN if name in coarse else 1))
    timing, worst = judged[best]
    where = targets[worst] if worst is not None else _mean(targets, weights)
    dense = against_dense(where)
    rivals = {
        name: where[name, best] if (name, best) in where else where[best, name].inverse()
        for name in judged
        if name != best
    }
    if timing.median >= min_speedup:
        close = timing.close_to(min_speedup) or any(rival.close_to(1) for rival in rivals.values())
    else:
        close = any(other.close_to(min_speedup) for other, _ in judged.values())
    times = {DENSE: timing.first_ms, **{name: dense[name].second_ms for name in judged}}
    return Fastest(best, timing, worst, times, rivals, close)


def _mean(targets: Sequence[Comparison], weights: Sequence[float] | None) -> Comparison:
    given = weights or [1.0] * len(targets)
    total = sum(given)
    return sum_of(targets, [weight / total for weight in given])
