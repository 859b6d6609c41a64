"""Which plan to try next: one family of plans, from dense to sparse, and what trials of some of them gave.

Along a family speed and smallness rise, and so does the drop. Speed and size are known beforehand up to a factor, which
the trials correct. The drop is not: it is bracketed between a plan that holds ``max_drop`` and one that does not, and
guessed inside the bracket from the loss that was predicted.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

__all__ = ["Expected", "Goals", "Outcome", "best", "next_points"]

TOLERANCE = 0.03
"""A bracket is closed where the plans at its ends differ by less than this share in speed and size."""


@dataclasses.dataclass(frozen=True)
class Goals:
    """What is asked for; None: nothing. ``nbytes`` is the largest size of the files, ``drop`` the largest drop."""

    speedup: float | None = None
    nbytes: float | None = None
    drop: float | None = None


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of a plan: how many times faster than dense, its files in bytes, and a loss that rises with the drop."""

    speedup: float
    nbytes: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trial measured. ``drop`` may be infinite: outputs that are not finite."""

    speedup: float
    nbytes: float
    drop: float

    def misses(self, goals: Goals) -> tuple[float, float]:
        """(how far the drop is above its goal, how far speed and size are off theirs), each 0 if met, relative."""
        over = 0.0
        if goals.drop is not None and not self.drop <= goals.drop:
            over = (self.drop - goals.drop) / max(goals.drop, 1e-9)
        short = 0.0
        if goals.speedup is not None:
            short += max(goals.speedup / self.speedup - 1, 0.0)
        if goals.nbytes is not None:
            short += max(self.nbytes / goals.nbytes - 1, 0.0)
        return over, short


def best(outcomes: Sequence[Outcome], goals: Goals) -> int:
    """Index of the outcome to ship: nothing that holds ``drop`` loses to what does not, then the nearest to speed and
    size, then, where these are met, the one that loses least; without such goals the fastest."""

    def rank(outcome: Outcome) -> tuple[float, float, float]:
        over, short = outcome.misses(goals)
        eager = goals.speedup is None and goals.nbytes is None
        return over, short, -outcome.speedup if eager else outcome.drop

    return min(range(len(outcomes)), key=lambda index: rank(outcomes[index]))


def next_points(
    plans: Sequence[Expected], tried: Mapping[int, Outcome], goals: Goals, count: int = 1
) -> list[int]:
    """Up to ``count`` indices of plans to try next, none of them tried; empty once nothing more is to be learned.

    ``plans`` are in the order of the family.
    """
    wanted = []
    needed = _needed(plans, tried, goals)
    if needed is not None:
        wanted.append(needed)
    met = needed is not None and needed in tried and tried[needed].misses(goals) == (0.0, 0.0)
    if goals.drop is not None and not met:
        ceiling = needed if needed is not None else len(plans) - 1
        wanted += _bracketing(plans, tried, goals.drop, ceiling, count)
    return [index for index in dict.fromkeys(wanted) if index not in tried][:count]


def _needed(plans: Sequence[Expected], tried: Mapping[int, Outcome], goals: Goals) -> int | None:
    """The first plan that is fast and small enough: one that was tried and is that by little, else as expected and
    corrected; the last where none is; None without such goals."""
    if goals.speedup is None and goals.nbytes is None:
        return None
    costs = dataclasses.replace(goals, drop=None)
    stricter = Goals(
        None if goals.speedup is None else goals.speedup * (1 + TOLERANCE),
        None if goals.nbytes is None else goals.nbytes / (1 + TOLERANCE),
    )
    enough = [index for index, outcome in tried.items() if outcome.misses(costs) == (0.0, 0.0)]
    if enough and tried[min(enough)].misses(stricter) != (0.0, 0.0):
        return min(enough)
    faster, larger = _correction(plans, tried)
    for index, known in enumerate(plans):
        outcome = tried.get(index)
        if outcome is None:
            outcome = Outcome(known.speedup * faster, known.nbytes * larger, 0.0)
        if outcome.misses(costs) == (0.0, 0.0):
            return index
    return len(plans) - 1


def _correction(plans: Sequence[Expected], tried: Mapping[int, Outcome]) -> tuple[float, float]:
    """Measured over expected, of speed and of size: geometric means over the trials."""
    if not tried:
        return 1.0, 1.0
    speed = [math.log(outcome.speedup / plans[index].speedup) for index, outcome in tried.items()]
    size = [math.log(outcome.nbytes / plans[index].nbytes) for index, outcome in tried.items()]
    return math.exp(sum(speed) / len(speed)), math.exp(sum(size) / len(size))


def _bracketing(
    plans: Sequence[Expected], tried: Mapping[int, Outcome], drop: float, ceiling: int, count: int
) -> list[int]:
    """Plans up to ``ceiling`` that narrow down where ``drop`` is passed: the best guess first."""
    good = max((index for index, outcome in tried.items() if outcome.drop <= drop), default=0)
    bad = min(
        (index for index, outcome in tried.items() if index > good and not outcome.drop <= drop), default=None
    )
    last = ceiling if bad is None else min(bad, ceiling)
    if good in tried and _alike(plans[good], plans[last]):
        return []
    inside = [i for i in range(good, last + 1) if i not in tried]
    if not inside:
        return []
    guess = min(inside, key=lambda index: abs(index - _guess(plans, tried, drop, good, last)))
    # Others, for those who try several at once: spread evenly over the rest.
    spread = [inside[round((k + 1) * (len(inside) - 1) / (count + 1))] for k in range(count)]
    return [guess, *spread]


def _alike(first: Expected, second: Expected) -> bool:
    return second.speedup <= first.speedup * (1 + TOLERANCE) and first.nbytes <= second.nbytes * (
        1 + TOLERANCE
    )


def _guess(plans: Sequence[Expected], tried: Mapping[int, Outcome], drop: float, good: int, last: int) -> int:
    """The plan between ``good`` and ``last`` whose drop is likely to be ``drop``.

    log(drop) is taken as linear in log(loss): through the two trials whose drops are nearest, or with slope 1 through
    the only one; the middle where there is none. Guesses keep off the ends, so that the bracket always shrinks.
    """
    points = [
        (math.log(plans[index].loss), math.log(outcome.drop))
        for index, outcome in tried.items()
        if plans[index].loss > 0 and 0 < outcome.drop < math.inf
    ]
    if not points or drop <= 0:
        return (good + last) // 2
    aim = math.log(drop)
    (x, y), *others = sorted(points, key=lambda point: abs(point[1] - aim))
    slope = 1.0
    if others and (others[0][0] - x) * (others[0][1] - y) > 0:
        slope = (others[0][1] - y) / (others[0][0] - x)
    loss = math.exp(x + (aim - y) / slope)
    found = bisect.bisect_right([known.loss for known in plans], loss) - 1
    margin = (last - good) // 8
    return min(max(found, good + margin), last - margin)
