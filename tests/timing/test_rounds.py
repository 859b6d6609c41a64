"""The arithmetic of timing. No time itself is judged."""

import math

import numpy as np
import pytest

from sparse_onnx.timing import rounds
from sparse_onnx.timing.rounds import (
    MOST_STARTS,
    Ratio,
    interleave,
    median_interval,
    pool,
    ratio,
    repeat,
    together,
)


def recorder(calls, name, times):
    values = iter(times)

    def measure():
        calls.append(name)
        return next(values)

    return measure


def test_interleave_goes_round_by_round_after_two_warm_ups():
    calls = []
    first, second = recorder(calls, "a", range(10)), recorder(calls, "b", range(100, 110))
    times = interleave([first, second], rounds=3, seconds=60)
    assert "".join(calls) == "ab" * 5
    assert times == [[2, 3, 4], [102, 103, 104]]


def test_interleave_stops_when_the_time_is_up_but_not_before_five_rounds():
    calls = []
    times = interleave([recorder(calls, "a", range(100))], rounds=50, seconds=-1)
    assert times == [[2, 3, 4, 5, 6]]
    assert len(calls) == 7


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_interleave_does_no_more_rounds_than_asked_for(rounds):
    assert len(interleave([recorder([], "a", range(100))], rounds=rounds, seconds=-1)[0]) == rounds


def test_ratio_of_known_times():
    found = ratio([2, 4, 6, 8], [1, 1, 1, 1])
    assert (found.first_ms, found.second_ms, found.median) == (5, 1, 5)
    assert (found.low, found.high) == (2, 8)


def test_ratio_is_taken_round_by_round():
    """A disturbance that hits both runs of a round changes no ratio."""
    found = ratio([2, 20, 2, 200, 2], [1, 10, 1, 100, 1])
    assert (found.low, found.median, found.high) == (2, 2, 2)
    assert (found.first_ms, found.second_ms) == (2, 1)


def test_ratio_of_one_round():
    found = ratio([3], [2])
    assert (found.low, found.median, found.high) == (1.5, 1.5, 1.5)


def test_ratio_of_unequal_numbers_of_rounds():
    with pytest.raises(ValueError, match="zip"):
        ratio([1, 2], [1])


@pytest.mark.parametrize(
    ("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (25, 8), (50, 18), (100, 40)]
)
def test_interval_of_the_median_has_the_ranks_of_published_tables(n, rank):
    values = np.random.default_rng(n).permutation(n) + 1.0
    assert median_interval(list(values)) == (rank, n + 1 - rank)


@pytest.mark.parametrize("n", [6, 11, 15, 40, 1500])
def test_interval_holds_the_median_often_enough_and_not_too_often(n):
    """Against the binomial distribution by brute force: one rank further in would be too narrow."""
    low, high = median_interval(range(1, n + 1))
    inside = np.array([math.comb(n, k) / 2**n for k in range(n + 1)])
    assert (
        inside[low:high].sum() >= 0.95
    )  # k values lie below the median: the low-th one does, the high-th does not
    assert inside[low + 1 : high - 1].sum() < 0.95


def test_interval_covers_the_true_median_of_a_skewed_distribution():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(list(rng.exponential(size=15)))
        hits += low <= math.log(2) <= high
    assert 0.95 <= hits / 2000 <= 0.98  # exactly 0.9648


def of(median, *, spread=0.0, first=2.0, cached=False):
    return Ratio(first, first / median, median, median - spread, median + spread, cached)


def test_pooled_measurements_scatter_by_their_medians():
    found = pool([of(1.0, spread=0.5), of(3.0), of(2.0), of(2.0), of(2.0), of(7.0)])
    assert (found.low, found.median, found.high) == (1.0, 2.0, 7.0)
    assert found.first_ms == 2.0
    assert found.second_ms == pytest.approx(1.0)


def test_close_means_inside_the_interval():
    assert of(1.02, spread=0.01).close_to(1.03)
    assert of(1.02, spread=0.01).close_to(1.01)
    assert not of(1.02, spread=0.01).close_to(1.04)
    assert not of(1.02, spread=0.01).close_to(1.0)


def test_sum_of_measurements_weighs_their_times():
    """2 ms and 10 ms against 1 ms and 20 ms."""
    found = together([of(2.0), of(0.5, first=10.0)], [1, 1])
    assert (found.first_ms, found.second_ms) == (12, 21)
    assert found.median == pytest.approx(12 / 21)
    found = together([of(2.0), of(0.5, first=10.0)], [0.75, 0.25])
    assert (found.first_ms, found.second_ms) == (4, 5.75)
    assert found.median == pytest.approx(4 / 5.75)


def test_sum_of_measurements_is_as_unsure_as_they_are_and_cached_if_all_are():
    found = together([of(2.0, spread=0.5, cached=True), of(2.0, spread=0.5)], [1, 3])
    assert (found.low, found.median, found.high, found.cached) == (1.5, 2.0, 2.5, False)
    assert together([of(2.0, cached=True)], [1]).cached


def test_the_inverse_says_the_same_of_the_first_thing():
    found = Ratio(6.0, 2.0, 3.0, 2.0, 4.0, cached=True, quiet=False)
    assert found.inverse() == Ratio(2.0, 6.0, 1 / 3, 1 / 4, 1 / 2, cached=True, quiet=False)
    assert found.inverse().inverse() == found


def measuring(medians, clock=None, step=0.0):
    """A stand-in for a measurement that gives these medians, one after the other."""
    values = iter(medians)

    def once():
        if clock is not None:
            clock[0] += step
        return of(next(values))

    return once


def repeated(measure):
    return repeat(lambda: {0: measure()}, close=lambda found: found[0].close_to(1.02), seconds=60)[0]


def test_six_measurements_that_agree_are_enough():
    found = repeated(measuring([1.5, 1.4, 1.6, 1.5, 1.5, 1.5]))
    assert (found.low, found.median, found.high) == (1.4, 1.5, 1.6)


def test_what_cannot_be_told_from_the_threshold_is_measured_more_often():
    """One of the first eight on the other side; ranks 2 to 8 of nine leave it out."""
    medians = [1.5, 1.0, *[1.5] * 6, 1.4]
    values = iter([*medians, None])
    found = repeated(lambda: of(next(values)))
    assert next(values) is None, "all nine were taken, and no tenth"
    assert (found.low, found.high) == (1.4, 1.5)


def test_break_even_is_given_up_on_after_the_most_measurements():
    medians = [1.0, 1.04] * 20
    values = iter(medians)
    found = repeated(lambda: of(next(values)))
    assert len(list(values)) == len(medians) - MOST_STARTS
    assert found.close_to(1.02)


def test_all_things_of_a_round_are_measured_until_none_is_close():
    first, second = iter([1.5] * 20), iter([1.0, *[2.0] * 19])
    found = repeat(
        lambda: {"a": of(next(first)), "b": of(next(second))},
        close=lambda known: any(each.close_to(1.02) for each in known.values()),
        seconds=60,
    )
    assert len(list(first)) == len(list(second)) == 20 - 9  # ranks 2 to 8 of nine leave the first of "b" out
    assert (found["a"].low, found["a"].high, found["b"].low) == (1.5, 1.5, 2.0)


@pytest.mark.parametrize(("step", "taken"), [(30.0, 3), (25.0, 3), (14.0, 5), (1.0, 6)])
def test_slow_measurements_are_fewer_but_never_below_three(monkeypatch, step, taken):
    clock = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])
    calls = []
    once = measuring([1.5] * 40, clock, step)
    repeated(lambda: calls.append(1) or once())
    assert len(calls) == taken


def test_eviction_reads_memory_that_is_really_there():
    """Pages that were never written are all one page of zeros, which evicts nothing."""
    rounds.evict_caches()
    assert rounds._eviction_buffer().nbytes >= 16 << 20
    assert rounds._eviction_buffer().all()
