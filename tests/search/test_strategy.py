"""Which plan is tried next: on families whose drop and speed are known functions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.search.strategy import TOLERANCE, Expected, Goals, Outcome, best, next_points

_FAMILY = [Expected(1 + 0.05 * i, 1000 / (1 + 0.03 * i), (0.01 * i) ** 2) for i in range(60)]


def _search(goals, outcome, count=1, family=_FAMILY, limit=40):
    tried = {}
    while points := next_points(family, tried, goals, count):
        assert len(points) <= count
        assert not tried.keys() & set(points)
        tried |= {index: outcome(index) for index in points}
        assert len(tried) <= limit
    return tried


def _exact(drop=lambda i: (0.01 * i) ** 2, faster=1.0):
    return lambda i: Outcome(_FAMILY[i].speedup * faster, _FAMILY[i].nbytes, drop(i))


def test_a_speed_that_is_forecast_right_takes_one_trial():
    tried = _search(Goals(speedup=2.0), _exact())
    assert list(tried) == [20]


def test_a_wrong_forecast_is_corrected():
    tried = _search(Goals(speedup=2.0), _exact(faster=0.8))
    reached = [index for index, outcome in tried.items() if outcome.speedup >= 2]
    assert min(reached) == 30
    assert len(tried) == 2


def test_a_speed_that_is_met_by_little_is_not_refined():
    """Noise of two per cent must not lead to one neighbour after the other."""
    tried = _search(
        Goals(speedup=2.0), lambda i: Outcome(_FAMILY[i].speedup * (0.99 if i % 2 else 1.01), 1e3, 0.0)
    )
    assert len(tried) <= 2


def test_a_speed_beyond_reach_ends_at_the_sparsest_plan():
    assert list(_search(Goals(speedup=50.0), _exact())) == [59]


def test_a_size_is_met_as_forecast():
    (index,) = _search(Goals(nbytes=500.0), _exact())
    assert _FAMILY[index].nbytes <= 500 < _FAMILY[index - 1].nbytes


@given(st.floats(1e-6, 0.5), st.floats(0.3, 3), st.floats(0.5, 2.5), st.integers(1, 4))
def test_the_fastest_plan_within_the_drop_is_found(allowed, scale, power, count):
    def drop(i):
        return scale * (0.01 * i) ** (2 * power)

    tried = _search(Goals(drop=allowed), _exact(drop), count)
    fits = [i for i in range(60) if drop(i) <= allowed]
    found = best(list(tried.values()), Goals(drop=allowed))
    assert list(tried.values())[found].speedup * (1 + TOLERANCE) ** 2 >= _FAMILY[max(fits)].speedup
    assert len(tried) <= 8 * count


def test_no_plan_within_the_drop_is_shipped_as_the_least_lossy():
    tried = _search(Goals(drop=0.01), _exact(lambda i: 0.5 + i / 100))
    outcomes = list(tried.values())
    assert outcomes[best(outcomes, Goals(drop=0.01))].drop == min(outcome.drop for outcome in outcomes)
    assert 0 in tried


def test_drops_that_are_not_finite_count_as_too_large():
    tried = _search(Goals(drop=0.05), _exact(lambda i: math.inf if i > 10 else 0.001 * i))
    assert max(i for i, outcome in tried.items() if outcome.drop <= 0.05) >= 9


def test_both_goals_met_ends_at_once():
    tried = _search(Goals(speedup=2.0, drop=0.05), _exact())
    assert list(tried) == [20]


def test_speed_out_of_reach_of_the_drop_finds_the_fastest_that_holds_it():
    goals = Goals(speedup=3.0, drop=0.0101)
    tried = _search(goals, _exact())
    outcome = list(tried.values())[best(list(tried.values()), goals)]
    assert outcome.drop <= 0.0101
    assert outcome.speedup * (1 + TOLERANCE) >= _FAMILY[10].speedup
    assert 40 in tried  # the speed was tried, so that the front shows what it would cost


@pytest.mark.parametrize(
    ("goals", "expected"),
    [
        (Goals(drop=0.1), 1),  # the fastest that holds it
        (Goals(speedup=1.4, drop=0.1), 0),  # both are fast enough: the one that loses less
        (Goals(speedup=2.5, drop=0.1), 1),  # the drop is the harder goal, then the nearest to the speed
        (Goals(speedup=2.5), 2),
        (Goals(nbytes=450), 2),
    ],
)
def test_what_is_shipped(goals, expected):
    outcomes = [Outcome(1.5, 600, 0.01), Outcome(2.0, 500, 0.05), Outcome(3.0, 400, 0.3)]
    assert best(outcomes, goals) == expected


def test_parallel_trials_are_different_ones():
    points = next_points(_FAMILY, {}, Goals(speedup=2.0, drop=0.01), 4)
    assert len(points) == len(set(points)) == 4
