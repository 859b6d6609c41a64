"""Plans of least loss: against brute force, and against the definition of a Pareto front."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.search.frontier import Option, frontier, lower_hull, pareto

_NUMBERS = st.integers(0, 12).map(float)
_OPTIONS = st.lists(st.tuples(_NUMBERS, _NUMBERS), min_size=1, max_size=4)


def _options(pairs):
    return [Option(index, cost, loss) for index, (cost, loss) in enumerate(pairs)]


def _total(plan):
    return sum(o.cost for o in plan.values()), sum(o.loss for o in plan.values())


@given(st.lists(_OPTIONS, min_size=1, max_size=3))
def test_every_plan_loses_least_of_all_plans_that_cost_no_more(layers):
    named = {f"layer{index}": _options(pairs) for index, pairs in enumerate(layers)}
    every = [_total(dict(zip(named, choice, strict=True))) for choice in itertools.product(*named.values())]
    plans = frontier(named)
    for plan in plans:
        cost, loss = _total(plan)
        assert loss == min(other for spent, other in every if spent <= cost)
    assert _total(plans[0])[1] == min(loss for _, loss in every)
    assert _total(plans[-1])[0] == min(cost for cost, _ in every)


@given(_OPTIONS)
def test_the_hull_is_convex_and_below_all_options(pairs):
    hull = lower_hull(_options(pairs))
    costs, losses = [o.cost for o in hull], [o.loss for o in hull]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    assert losses == sorted(losses)
    assert len(set(losses)) == len(losses)
    slopes = [(b.loss - a.loss) / (a.cost - b.cost) for a, b in itertools.pairwise(hull)]
    assert all(
        first < second or first == pytest.approx(second) for first, second in itertools.pairwise(slopes)
    )


def test_each_plan_changes_one_layer():
    plans = frontier({"a": _options([(10, 0), (5, 1), (2, 6)]), "b": _options([(8, 0), (6, 4)])})
    changed = [
        [name for name in first if first[name] != second[name]] for first, second in itertools.pairwise(plans)
    ]
    assert changed == [["a"], ["a"], ["b"]]


def test_a_layer_that_only_loses_time_stays_dense():
    (plan,) = frontier({"a": _options([(5, 0), (6, 1), (5, 2)])})
    assert plan["a"].choice == 0


@given(st.lists(st.tuples(_NUMBERS, _NUMBERS), max_size=8))
def test_the_front_is_what_nothing_beats(points):
    front = pareto(points)
    for index, point in enumerate(points):
        beaten = any(b[0] >= point[0] and b[1] >= point[1] and b != point for b in points)
        assert (index in front) != beaten
