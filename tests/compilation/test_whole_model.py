"""Timing the whole until it can be told, and giving layers up only where that is surely better. Times are made up."""

import itertools

import numpy as np
import pytest

from sparse_onnx.compilation.whole_model import (
    NOT_PROVEN_FASTER,
    Variant,
    choose_variant,
    exit_code,
    settle,
    speed_sentence,
)
from sparse_onnx.timing.choose import Decision
from sparse_onnx.timing.rounds import MOST_STARTS, STARTS, Ratio, overall


def speedup(median, spread=0.02, *, quiet=True):
    return Ratio(2.0, 2.0 / median, median, median - spread, median + spread, quiet=quiet)


def measured(*runs, seconds=60.0):
    """What ``settle`` makes of ``runs``, the last of which goes on for ever, and how many it took."""
    taken = []
    rest = itertools.chain(runs, itertools.repeat(runs[-1]))

    def measure():
        taken.append(next(rest))
        return [taken[-1]]

    (found,) = settle(measure, lambda ratios: overall(ratios, None)[0], seconds=seconds)
    return found, len(taken)


# Timing


def test_what_is_surely_faster_is_measured_once():
    assert measured(speedup(1.5)) == (speedup(1.5), 1)
    assert measured(speedup(1.05))[1] == STARTS, "sessions may differ by as much"


def test_what_seems_slower_is_measured_as_often_as_a_layer():
    found, count = measured(speedup(0.9))
    assert (found.low, found.median, found.high, count) == (0.88, 0.9, 0.92, STARTS)


def test_what_cannot_be_told_is_measured_until_the_budget_is_spent():
    found, count = measured(speedup(1.01))
    assert (found.close_to(1), count) == (True, MOST_STARTS)
    assert measured(speedup(1.01), seconds=0)[1] == 3


@pytest.mark.parametrize("first", [speedup(0.98, 0.15), speedup(0.5, 0.01), speedup(1.02, 0.01)])
def test_disturbed_measurements_at_first_are_outvoted(first):
    for many in (1, 2, 3):
        found, _ = measured(*[first] * many, speedup(1.4))
        assert found.low > 1
        assert found.median > 1.2


def test_beside_other_programs_it_is_measured_again_even_if_it_seems_faster():
    found, count = measured(speedup(1.5, quiet=False), speedup(1.2))
    assert (found.median, found.quiet, count) == (1.2, True, STARTS + 1)


def test_on_a_machine_that_is_never_quiet_all_count_and_it_is_said():
    found, count = measured(*[speedup(0.9)] * 3, speedup(1.5, quiet=False))
    assert (found.median, found.quiet, count) == (1.5, False, MOST_STARTS)


def test_the_pooled_interval_is_no_narrower_than_what_was_pooled():
    found, _ = measured(speedup(0.98, 0.15))
    assert (found.low, found.high) == (pytest.approx(0.83), pytest.approx(1.13))


def test_targets_are_pooled_each_for_itself():
    runs = itertools.cycle([[speedup(0.9), speedup(2.0)], [speedup(0.8), speedup(2.2)]])
    found = settle(lambda: next(runs), lambda ratios: overall(ratios, None)[0])
    assert [ratio.median for ratio in found] == [pytest.approx(0.85), pytest.approx(2.1)]


def test_claims_of_speed_are_seldom_wrong_where_there_is_none():
    """At a true ratio of 1, with sessions that differ by 2 % and rounds that differ by 3 %."""
    rng = np.random.default_rng(0)

    def measure():
        rounds = np.exp(0.02 * rng.standard_normal() + 0.03 * rng.standard_normal(15))
        low, high = np.sort(rounds)[[3, 11]]
        return [Ratio(1.0, 1.0, float(np.median(rounds)), float(low), float(high))]

    found = [settle(measure, lambda ratios: ratios[0])[0] for _ in range(400)]
    assert np.mean([ratio.low > 1 for ratio in found]) < 0.05
    assert np.mean([ratio.high < 1 for ratio in found]) < 0.05


# Giving up


class Candidate:
    companion = False


def decisions(count):
    return [
        Decision(Candidate(), "sparse", "2.00x dense", {"dense": 2.0, "sparse": 1.0 + 0.1 * place})
        for place in range(count)
    ]


def chosen(count, timing):
    """Of ``count`` sparse layers how many are kept if ``timing`` tells the time of so many; the tried; the choice."""
    tried = []

    def attempt(decided):
        sparse = sum(decision.lowered for decision in decided)
        tried.append(sparse)
        if not sparse:
            return Variant(tuple(decided))
        return Variant(tuple(decided), (timing[sparse],), timing[sparse])

    found = choose_variant(decisions(count), attempt)
    return sum(decision.lowered for decision in found.decisions), tried, found


def test_what_is_faster_is_kept():
    assert chosen(4, {4: speedup(1.3)})[:2] == (4, [4])


def test_fewer_layers_are_tried_while_the_whole_is_slower():
    kept, tried, found = chosen(4, {4: speedup(0.5), 2: speedup(0.8), 1: speedup(1.2)})
    assert (kept, tried) == (1, [4, 2, 1])
    assert [d.reason.count("slower with it") for d in found.decisions] == [0, 1, 1, 1], (
        "the least gainful first"
    )


def test_layers_that_noise_gave_up_come_back():
    kept, tried, found = chosen(4, {4: speedup(0.98, 0.15), 2: speedup(1.05)})
    assert (kept, tried) == (4, [4, 2])
    assert all(decision.reason == "2.00x dense" for decision in found.decisions)


def test_a_variant_that_is_surely_better_than_one_that_cannot_be_told_takes_its_place():
    assert chosen(4, {4: speedup(0.98, 0.04), 2: speedup(1.2)})[0] == 2


def test_what_is_surely_slower_with_any_layer_is_dense():
    kept, tried, found = chosen(2, {2: speedup(0.9), 1: speedup(0.91)})
    assert (kept, tried) == (0, [2, 1, 0])
    assert all("slower with it" in decision.reason for decision in found.decisions)


def test_what_cannot_be_told_is_kept():
    assert chosen(2, {2: speedup(1.01)})[0] == 2
    assert chosen(2, {2: speedup(0.99), 1: speedup(1.0)})[0] == 2


def test_nothing_sparse_is_not_tried_again():
    dense = [Decision(Candidate(), "dense", "too few")]
    found = choose_variant(dense, lambda decided: Variant(tuple(decided)))
    assert not found.lowered


# What is said


@pytest.mark.parametrize(
    ("timing", "gained", "code"),
    [
        (speedup(1.5), True, 0),
        (speedup(1.01), True, NOT_PROVEN_FASTER),
        (Ratio(1, 1, 1, 1, 1), True, NOT_PROVEN_FASTER),
        (speedup(0.9), True, NOT_PROVEN_FASTER),
        (None, True, 0),
        (None, False, NOT_PROVEN_FASTER),
    ],
)
def test_exit_code(timing, gained, code):
    assert exit_code(timing, gained=gained) == code


def test_words():
    assert speed_sentence(1.01, 0.98, 1.05).startswith("not proven faster: 1.01x")
    assert speed_sentence(0.9, 0.88, 0.92).startswith("slower: 0.90x")
