"""The whole model against dense: timed until it can be told, and given up layer by layer only where that is sure.

One measurement of a whole model, however many rounds it has, shares one pair of sessions and one moment of the machine.
So a single one is believed only where it says, undisturbed, that the model is faster by more than sessions differ.
Otherwise the model is timed in new sessions, as layers are: six times undisturbed, and more often while the 95 %
interval of the median contains 1, up to fifteen times; past a budget of seconds three times are enough. Disturbed
measurements are left out where six others are there.

Where the median says slower, variants with more layers left dense are tried. A variant takes the place of one with more
layers only if their intervals do not overlap, so that what noise gave up comes back.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from sparse_onnx.passes.lower.forms import DENSE
from sparse_onnx.timing.choose import Decision, least_gainful
from sparse_onnx.timing.rounds import FEWEST_STARTS, MOST_STARTS, STARTS, Ratio, median_interval

__all__ = [
    "NOT_PROVEN_FASTER",
    "Variant",
    "choose_variant",
    "exit_code",
    "is_proven",
    "is_refuted",
    "settle",
    "speed_sentence",
]

NOT_PROVEN_FASTER = 5
"""Exit code where the result is not proven faster than the original: the interval of its speedup contains 1, or no
layer is sparse, in which case the dense model was written."""

_SECONDS = 60.0
"""For all measurements of one variant together."""

_BETWEEN_SESSIONS = 0.05
"""What memory and threads a session happens to get shifts all its times by a few hundredths; its rounds cannot tell."""


def is_proven(timing: Ratio) -> bool:
    """Whether the model is faster, as far as its interval can tell."""
    return timing.low > 1


def is_refuted(timing: Ratio) -> bool:
    """Whether the model is slower, as far as its interval can tell."""
    return timing.high < 1


def exit_code(timing: Ratio | None, *, gained: bool) -> int:
    """0 if the model is proven faster, or where it was not timed if it ``gained`` anything that should make it so."""
    faster = gained if timing is None else is_proven(timing)
    return 0 if faster else NOT_PROVEN_FASTER


def speed_sentence(speedup: float, low: float, high: float) -> str:
    """What can be said of a measured speedup that is not proven to be one."""
    interval = f"{speedup:.2f}x with a 95 % interval from {low:.2f} to {high:.2f}"
    return f"slower: {interval}" if high < 1 else f"not proven faster: {interval}, which contains 1"


def settle(
    measure: Callable[[], Sequence[Ratio]],
    overall: Callable[[Sequence[Ratio]], Ratio],
    *,
    progress: Callable[[str], None] = lambda _line: None,
    seconds: float = _SECONDS,
) -> list[Ratio]:
    """Times of the whole model at every target, measured as often as the module's docstring says.

    ``measure`` times the original against the model once, in new sessions, at every target; ``overall`` is what these
    come to, see :func:`sparse_onnx.timing.rounds.overall`.
    """
    start = time.perf_counter()
    runs = [list(measure())]
    first = overall(runs[0])
    if first.quiet and first.low > 1 + _BETWEEN_SESSIONS:
        return runs[0]
    pooled = runs[0]
    while len(runs) < MOST_STARTS:
        if len(runs) >= FEWEST_STARTS and time.perf_counter() - start > seconds:
            break
        progress(f"timing the whole model again, {len(runs) + 1} of at most {MOST_STARTS} times")
        runs.append(list(measure()))
        quiet = [run for run in runs if overall(run).quiet]
        counted = quiet if len(quiet) >= STARTS else runs
        pooled = [_pool(of_target) for of_target in zip(*counted, strict=True)]
        if len(quiet) >= STARTS and not overall(pooled).close_to(1):
            break
    return pooled


def _pool(ratios: Sequence[Ratio]) -> Ratio:
    """Several measurements as one; the interval is no narrower than theirs are at the median."""
    medians = [ratio.median for ratio in ratios]
    low, high = median_interval(medians)
    return Ratio(
        statistics.median(ratio.first_ms for ratio in ratios),
        statistics.median(ratio.second_ms for ratio in ratios),
        statistics.median(medians),
        min(low, statistics.median(ratio.low for ratio in ratios)),
        max(high, statistics.median(ratio.high for ratio in ratios)),
        quiet=all(ratio.quiet for ratio in ratios),
    )


@dataclasses.dataclass(frozen=True)
class Variant:
    """A set of decisions for the layers, the times of the whole model with them at every target, and ``overall``, by
    which the variant is judged. Where all layers are dense nothing is timed."""

    decisions: tuple[Decision, ...]
    timings: tuple[Ratio, ...] = ()
    overall: Ratio | None = None

    @property
    def lowered(self) -> bool:
        """Whether a layer does not stay dense."""
        return any(decision.lowered for decision in self.decisions)


def choose_variant(
    decisions: Sequence[Decision],
    attempt: Callable[[Sequence[Decision]], Variant],
    *,
    progress: Callable[[str], None] = lambda _line: None,
) -> Variant:
    """The variant to ship: all layers in the forms that ``decisions`` say, or fewer where that is surely better.

    ``attempt`` compiles and times a variant. While the last one's median is below 1, the least gainful half of its
    layers that are not dense is given up and the rest tried. If the best is surely slower than dense, all are dense.
    """
    best = tried = attempt(decisions)
    while tried.overall is not None and tried.overall.median < 1:
        fewer = _give_up_half(tried.decisions)
        if not any(decision.lowered for decision in fewer):
            break
        timing = tried.overall
        progress(
            f"note: the whole model is slower ({timing.median:.2f}x, {timing.low:.2f} to {timing.high:.2f}): "
            "trying without the layers that gain least"
        )
        tried = attempt(fewer)
        assert tried.overall is not None
        assert best.overall is not None
        if tried.overall.low > best.overall.high:
            best = tried
        else:
            progress("note: without these layers it is not surely faster: they are kept")
    if best.lowered and best.overall is not None and is_refuted(best.overall):
        progress("note: the whole model is slower than dense with any of its layers sparse")
        dense = tuple(_given_up(d) if d.lowered else d for d in best.decisions)
        return attempt(dense)
    return best


def _give_up_half(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    lowered = [decision for decision in decisions if decision.lowered]
    half = least_gainful([decision.gain for decision in lowered])
    dropped = {id(lowered[index]) for index in half}
    return tuple(_given_up(d) if id(d) in dropped else d for d in decisions)


def _given_up(decision: Decision) -> Decision:
    return dataclasses.replace(
        decision, form=DENSE, reason=f"{decision.reason}; the whole model was slower with it"
    )
