"""The choice of units and the fit, against brute force and least squares."""

import itertools

import numpy as np
import pytest

from sparse_onnx.passes.calibration.moments import Layout, Moments
from sparse_onnx.passes.solvers import InputStatistics
from sparse_onnx.passes.structured.groups import Reader, choose, fit, kept_units, rows_of

RNG = np.random.default_rng(5)


def inputs(tokens, K, mean=0.0, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, K)) @ rng.standard_normal((K, K))
    return mixed + mean * rng.standard_normal(K)


def reader(X, W, size=1, biased=False):
    return Reader(W, InputStatistics(X.T @ X, X.mean(axis=0), len(X)), size, biased)


def weights(K, N, seed=1):
    return np.random.default_rng(seed).standard_normal((K, N)).astype(np.float32)


def least_error(X, W, kept, biased):
    """Squared error of the best weights on the inputs ``kept``, by least squares on the data."""
    Y = X @ W
    if biased:
        X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    V = np.linalg.lstsq(X[:, kept], Y, rcond=None)[0]
    return float(((Y - X[:, kept] @ V) ** 2).sum())


@pytest.mark.parametrize(
    ("units", "sparsity", "multiple_of", "kept"),
    [
        (1536, 0.25, 8, 1152),
        (12, 2 / 12, 1, 10),
        (100, 0.5, 8, 48),
        (20, 0.25, 8, 16),
        (20, 0.0, 8, 20),
        (6, 0.5, 8, 6),
        (8, 0.9, 8, 8),
        (12, 0.99, 1, 1),
    ],
)
def test_what_stays_is_the_nearest_multiple(units, sparsity, multiple_of, kept):
    assert kept_units(units, sparsity, multiple_of) == kept


def test_rows_of_units_are_consecutive():
    assert rows_of(np.array([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("whole", [True, False])
def test_constant_units_go_first_where_the_bias_takes_them_up(whole):
    X = inputs(400, 12, mean=2.0)
    still = np.array([1, 4, 5, 9])
    X[:, still] = [3.0, -70.0, 1e-3, 0.3]
    X = X.astype(np.float32)
    X[:, 7] = np.float32(50) + np.float32(1e-3) * X[:, 7]  # varies little: it stays as long as it matters
    moments = Moments(12, Layout.FULL if whole else Layout.DIAGONAL)
    for part in np.split(X, [9, 200]):
        moments.add(part)
    W = weights(12, 5)
    W[7] *= 1000
    biased = Reader(W, moments.statistics("X"), 1, biased=True)
    assert choose([biased], 4, 0.01).tolist() == still.tolist()
    unbiased = Reader(W, biased.statistics, 1)
    assert choose([unbiased], 4, 0.01).tolist() != still.tolist()


def test_of_equal_tokens_all_is_known_but_what_varies():
    """Then the weights are fitted to the tokens themselves: the bias would do for any."""
    token = np.random.default_rng(0).standard_normal(8)
    X = np.repeat(token[None], 50, axis=0)
    chosen = choose([reader(X, weights(8, 4), biased=True)], 4, 0.01)
    assert chosen.tolist() == choose([reader(X, weights(8, 4))], 4, 0.01).tolist()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_the_first_unit_to_go_is_that_of_brute_force(size, biased):
    for seed in range(5):
        X, W = inputs(200, 5 * size, mean=2.0, seed=seed), weights(5 * size, 4, seed)
        errors = [
            least_error(X, W, np.delete(np.arange(5 * size), rows_of(np.array([u]), size)), biased)
            for u in range(5)
        ]
        assert choose([reader(X, W, size, biased)], 1, 0.0).tolist() == [int(np.argmin(errors))]


def test_greedy_removal_equals_greedy_brute_force():
    X, W = inputs(300, 12, seed=3), weights(12, 5)
    left = list(range(12))
    for _ in range(6):
        left.remove(min(left, key=lambda u: least_error(X, W, [v for v in left if v != u], False)))
    assert np.delete(np.arange(12), choose([reader(X, W)], 6, 0.0)).tolist() == left


def test_the_choice_is_close_to_the_best_of_all():
    X, W = inputs(300, 10, seed=4), weights(10, 6)
    best = min(least_error(X, W, list(kept), False) for kept in itertools.combinations(range(10), 6))
    kept = np.delete(np.arange(10), choose([reader(X, W)], 4, 0.0))
    assert best <= least_error(X, W, kept, False) <= 1.3 * best


def test_rounds_are_nearly_as_good_as_one_by_one():
    X, W = inputs(900, 200, seed=6), weights(200, 20)
    one_by_one, left = reader(X, W), list(range(200))
    for _ in range(100):  # exact: a round of its own for each
        gone = choose([reader(X[:, left], W_left(X, W, left))], 1, 0.0)
        left.pop(int(gone[0]))
    rounds = np.delete(np.arange(200), choose([one_by_one], 100, 0.0))
    assert len(rounds) == 100
    assert least_error(X, W, rounds, False) <= 1.02 * least_error(X, W, left, False)


def W_left(X, W, left):
    return np.linalg.lstsq(X[:, left], X @ W, rcond=None)[0].astype(np.float32)


@pytest.mark.parametrize("biased", [False, True])
def test_the_fit_is_that_of_least_squares(biased):
    X, W = inputs(400, 24, mean=3.0), weights(24, 7)
    removed = np.array([1, 4, 5])
    kept = np.delete(np.arange(24), rows_of(removed, 3))
    found = fit(reader(X, W, 3, biased), removed, 0.0)
    Y = X @ W
    left = Y - X[:, kept] @ found.V - found.shift
    assert float((left**2).sum()) == pytest.approx(least_error(X, W, kept, biased), rel=1e-5)
    assert found.error == pytest.approx(np.linalg.norm(left) / np.linalg.norm(Y), rel=1e-4)
    assert found.V.dtype == np.float32
    assert bool(found.shift.any()) == biased


def test_copies_and_dead_inputs_go_first_and_cost_nothing():
    X, W = inputs(300, 16, seed=8), weights(16, 5)
    X[:, 9], X[:, 3] = X[:, 2], 0
    W[3] = 100
    removed = choose([reader(X, W)], 2, 1e-8)
    assert 3 in removed
    assert {2, 9} & set(removed.tolist())
    found = fit(reader(X, W), removed, 1e-8)
    assert found.error < 1e-5


def test_one_of_several_copies_stays():
    X, W = inputs(300, 12, seed=9), weights(12, 5)
    X[:, 1:6] = X[:, :1]
    removed = choose([reader(X, W)], 5, 1e-6)
    assert len(set(removed.tolist()) & set(range(6))) == 5


def test_a_constant_input_goes_for_free_only_where_there_is_a_bias():
    X, W = inputs(300, 8, seed=10), weights(8, 5)
    X[:, 4] = 50
    assert choose([reader(X, W, biased=True)], 1, 1e-6).tolist() == [4]
    assert choose([reader(X, W, biased=False)], 1, 1e-6).tolist() != [4]
    assert fit(reader(X, W, biased=True), np.array([4]), 1e-6).error < 1e-5


def test_all_readers_have_a_say():
    X = inputs(300, 6, seed=11)
    one, two = weights(6, 4, 1), weights(6, 4, 2)
    one[2], two[2] = 0, 1000
    assert choose([reader(X, one)], 1, 0.01).tolist() == [2]
    assert choose([reader(X, one), reader(X, two)], 1, 0.01).tolist() != [2]


def test_without_a_whole_gram_power_decides_and_the_bias_takes_the_mean():
    X, W = inputs(200, 6, mean=3.0), weights(6, 4)
    known = InputStatistics((X**2).sum(axis=0), X.mean(axis=0), len(X))
    power = X.var(axis=0) * (W.astype(np.float64) ** 2).sum(axis=1)
    diagonal = Reader(W, known, 1, biased=True)
    removed = choose([diagonal], 2, 0.01)
    assert removed.tolist() == sorted(np.argsort(power)[:2].tolist())
    found = fit(diagonal, removed, 0.01)
    np.testing.assert_array_equal(found.V, np.delete(W, removed, axis=0))
    np.testing.assert_allclose(found.shift, X.mean(axis=0)[removed] @ W[removed], rtol=1e-6)
    assert np.isnan(found.error)


def test_nothing_to_remove():
    X, W = inputs(50, 4), weights(4, 3)
    assert choose([reader(X, W)], 0, 0.01).tolist() == []
    np.testing.assert_array_equal(fit(reader(X, W), np.arange(0), 0.01).V, W)
