"""The statistics of timing: runs in turn, ratios of medians, their intervals."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from sparse_onnx.progress import format_duration

__all__ = [
    "FEWEST_STARTS",
    "MOST_STARTS",
    "STARTS",
    "Ratio",
    "evict_caches",
    "interleave",
    "median_interval",
    "overall",
    "pool",
    "ratio",
    "repeat",
    "together",
]

STARTS, MOST_STARTS = 6, 15
"""How often a measurement is repeated: six are the fewest whose range is a 95 % interval of their median."""

FEWEST_STARTS, _FEWEST_ROUNDS = 3, 5


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster the second thing is: the median of first / second, with its 95 % confidence interval
    ``low`` to ``high``, see :func:`median_interval`. ``first_ms`` and ``second_ms`` are medians in milliseconds.
    ``cached`` says that it was measured in an earlier run, ``quiet`` that no other program was in the way.
    """

    first_ms: float
    second_ms: float
    median: float
    low: float
    high: float
    cached: bool = False
    quiet: bool = True

    def close_to(self, value: float) -> bool:
        """Whether ``value`` lies in the interval, so that another measurement could come out on its other side."""
        return self.low <= value <= self.high

    def inverse(self) -> Ratio:
        """How many times faster the first thing is."""
        sides = (1 / self.median, 1 / self.high, 1 / self.low)
        return Ratio(self.second_ms, self.first_ms, *sides, self.cached, self.quiet)


def interleave(
    runs: Sequence[Callable[[], float]],
    *,
    rounds: int,
    seconds: float,
    progress: Callable[[str], None] = lambda _line: None,
) -> list[list[float]]:
    """Call every run once a round, in turn, so that drift of the machine hits all alike.

    Each run returns its own milliseconds. Two warm-up rounds are not counted. Stops after ``rounds``, or earlier
    once ``seconds`` have passed and at least five rounds are in. Between rounds, about once a second, ``progress`` is
    told how long it still takes.
    """
    for _ in range(2):
        for run in runs:
            run()
    times: list[list[float]] = [[] for _ in runs]
    start = said = time.perf_counter()
    for done in range(rounds):
        now = time.perf_counter()
        spent = now - start
        if done >= _FEWEST_ROUNDS and spent > seconds:
            break
        if done and now - said >= 1:
            each = spent / done
            left = min(each * (rounds - done), max(seconds - spent, each * (_FEWEST_ROUNDS - done)))
            progress(f"round {done + 1} of at most {rounds}, {format_duration(left)} left")
            said = now
        for run, record in zip(runs, times, strict=True):
            record.append(run())
    return times


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A confidence interval of the median, at least 95 %, that assumes no distribution: from the k-th smallest value to
    the k-th largest, k as large as P(Binomial(n, 1/2) < k) <= 2.5 % allows. Of fewer than six values their whole range,
    which holds the median with probability 1 - 2^(1-n) only.
    """
    ordered, n = sorted(values), len(values)
    k, outcomes = 0, 1  # of 2^n, those with at most k successes
    while 40 * outcomes <= 2**n:
        k += 1
        outcomes += math.comb(n, k)
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def ratio(first: Sequence[float], second: Sequence[float], *, quiet: bool = True) -> Ratio:
    """The ratio first / second of interleaved times, round by round."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return Ratio(
        statistics.median(first),
        statistics.median(second),
        statistics.median(ratios),
        *median_interval(ratios),
        quiet=quiet,
    )


def pool(ratios: Sequence[Ratio]) -> Ratio:
    """Measurements that were made independently of each other as one: the median of their medians, and the interval of
    it. Those that were not quiet are left out if three others are there."""
    quiet = [found for found in ratios if found.quiet]
    if len(quiet) >= FEWEST_STARTS:
        ratios = quiet
    medians = [found.median for found in ratios]
    return Ratio(
        statistics.median(found.first_ms for found in ratios),
        statistics.median(found.second_ms for found in ratios),
        statistics.median(medians),
        *median_interval(medians),
        quiet=all(found.quiet for found in ratios),
    )


def together(ratios: Sequence[Ratio], weights: Sequence[float]) -> Ratio:
    """The ratio of the weighted sums of times, as if all lay at the same end of their intervals at once."""
    seconds = [weight * found.second_ms for weight, found in zip(weights, ratios, strict=True)]

    def mean(values: Iterable[float]) -> float:
        return sum(value * each for value, each in zip(values, seconds, strict=True)) / sum(seconds)

    return Ratio(
        sum(weight * found.first_ms for weight, found in zip(weights, ratios, strict=True)),
        sum(seconds),
        mean(found.median for found in ratios),
        mean(found.low for found in ratios),
        mean(found.high for found in ratios),
        all(found.cached for found in ratios),
        all(found.quiet for found in ratios),
    )


def overall(targets: Sequence[Ratio], weights: Sequence[float] | None) -> tuple[Ratio, int | None]:
    """The timings at several targets as one: their mean by ``weights``, or without them the worst and its place."""
    if weights is not None:
        total = sum(weights)
        return together(targets, [weight / total for weight in weights]), None
    worst = min(range(len(targets)), key=lambda index: targets[index].median)
    return targets[worst], worst


_Key = TypeVar("_Key")


def repeat(
    measure: Callable[[], Mapping[_Key, Ratio]],
    *,
    close: Callable[[Mapping[_Key, Ratio]], bool],
    seconds: float,
) -> Mapping[_Key, Ratio]:
    """Measure anew, each time the same ratios in the same rounds, until :data:`STARTS` measurements were quiet and what
    they come to is no longer ``close``, at most :data:`MOST_STARTS` times. Past ``seconds`` three times are enough.
    """
    runs: list[Mapping[_Key, Ratio]] = []
    start = time.perf_counter()

    def pooled() -> Mapping[_Key, Ratio]:
        return {key: pool([run[key] for run in runs]) for key in runs[0]}

    while len(runs) < MOST_STARTS:
        runs.append(measure())
        quiet = sum(all(found.quiet for found in run.values()) for run in runs)
        if quiet >= STARTS and not close(pooled()):
            break
        if len(runs) >= FEWEST_STARTS and time.perf_counter() - start > seconds:
            break
    return pooled()


def evict_caches() -> None:
    """Walk over a buffer larger than the private caches, so that the next run starts as inside a whole model."""
    np.add.reduce(_eviction_buffer())


@functools.cache
def _eviction_buffer() -> np.ndarray:
    # Not zeros: pages that were never written are all the same page in memory, which evicts nothing.
    return np.ones((16 << 20) // 8)
