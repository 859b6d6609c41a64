"""The solvers against what is exact where exact is affordable: all masks, greedy OBS, the literal sweep."""

import itertools

import numpy as np
import pytest

from sparse_onnx.passes.solvers import SOLVERS, InputStatistics, refit, relative_error
from sparse_onnx.passes.solvers.masks import MaskStructure

DAMPING = 0.01


def damped(statistics):
    gram = statistics.gram
    return gram + DAMPING * gram.diagonal().mean() * np.eye(len(gram))


def brute_force(H, W, kept):
    """The best ``kept`` inputs of each column by trying all, with their least squares."""
    best = np.zeros(W.shape)
    for column in range(W.shape[1]):
        target, lowest = W[:, column].astype(float), np.inf
        for chosen in itertools.combinations(range(len(W)), kept):
            rows = list(chosen)
            values = np.linalg.solve(H[np.ix_(rows, rows)], H[rows] @ target)
            change = target.copy()
            change[rows] -= values
            if (error := change @ H @ change) < lowest:
                lowest = error
                best[:, column] = 0
                best[rows, column] = values
    return best


def greedy_obs(H, W, kept):
    """Optimal brain surgeon: remove the weight that costs least, update the rest, downdate the inverse."""
    result = W.astype(float)
    for column in range(W.shape[1]):
        w, inverse = result[:, column], np.linalg.inv(H)
        alive = np.ones(len(w), bool)
        for _ in range(len(w) - kept):
            cost = np.where(alive, w**2 / np.where(alive, inverse.diagonal(), 1), np.inf)
            gone = int(cost.argmin())
            w -= w[gone] / inverse[gone, gone] * inverse[:, gone]
            inverse -= np.outer(inverse[:, gone], inverse[gone]) / inverse[gone, gone]
            alive[gone] = False
            w[~alive] = 0
    return result


@pytest.mark.parametrize(("name", "limit"), [("alps", 1.01), ("auto", 1.01), ("admm", 1.15), ("omp", 1.3)])
def test_within_reach_of_the_best_of_all_masks(layer, name, limit):
    W, statistics = layer(10, 40, seed=1)
    H = damped(statistics)
    best = relative_error(W, brute_force(H, W, 5), H)
    pruned = SOLVERS[name]().solve(W, statistics, sparsity=0.5, scope="row")
    assert best <= relative_error(W, pruned, H) * (1 + 1e-5)
    assert relative_error(W, pruned, H) <= limit * best


@pytest.mark.parametrize("name", ["alps", "auto"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_as_good_as_greedy_obs(layer, name, sparsity):
    W, statistics = layer(96, 24, seed=2)
    H = damped(statistics)
    greedy = greedy_obs(H, W, 96 - round(sparsity * 96))
    pruned = SOLVERS[name]().solve(W, statistics, sparsity=sparsity, scope="row")
    assert relative_error(W, pruned, H) <= 1.01 * relative_error(W, greedy, H)


@pytest.mark.parametrize("structure", [MaskStructure(), MaskStructure("n:m", (2, 4))], ids=str)
def test_sparsegpt_is_the_literal_sweep(layer, structure):
    """Input by input, the exact OBS update of those not yet visited, the inverse downdated each time."""
    W, statistics = layer(96, 20, seed=5)
    pruned = SOLVERS["sparsegpt"](block=32).solve(W, statistics, structure, 0.5)
    inverse, V = np.linalg.inv(damped(statistics)), W.astype(np.float64)
    for first in range(0, 96, 32):
        for row in range(first, first + 32):
            gone = pruned[row] == 0
            ahead = inverse[row:, row] / inverse[row, row]
            V[row:] -= np.outer(ahead, np.where(gone, V[row], 0))
            V[row][gone] = 0
            inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
            inverse[row] = inverse[:, row] = 0
    np.testing.assert_allclose(pruned, V, rtol=0, atol=1e-5 * np.abs(W).max())


def test_sparsegpt_chooses_by_the_obs_cost_at_the_start_of_the_block(layer):
    W, statistics = layer(24, 10, seed=6)
    pruned = SOLVERS["sparsegpt"](block=24).solve(W, statistics, sparsity=0.5)
    factor = np.linalg.cholesky(np.linalg.inv(damped(statistics))).T
    cost = (W / factor.diagonal()[:, None]) ** 2
    expected = np.zeros(W.size, bool)
    expected[np.argsort(cost.ravel(), kind="stable")[: W.size // 2]] = True
    np.testing.assert_array_equal(pruned.ravel() == 0, expected)


def test_auto_beats_alps_at_layer_scope(layer):
    for seed in range(3):
        W, statistics = layer(128, 96, seed=seed)
        errors = {}
        for name in ("alps", "auto"):
            pruned = SOLVERS[name]().solve(W, statistics, sparsity=0.6)
            errors[name] = relative_error(W, pruned, statistics.gram)
        assert errors["auto"] < errors["alps"]


@pytest.mark.parametrize("K", [1, 7, 64, 300])
def test_refit_is_least_squares_on_the_mask(K):
    """Against LAPACK's least squares on the data, whose rows of damping pull each weight to its old value."""
    generator = np.random.default_rng(K)
    X = generator.standard_normal((3 * K, K)) @ (np.eye(K) + 0.3 * generator.standard_normal((K, K)) / K**0.5)
    W = generator.standard_normal((K, 5)).astype(np.float32)
    mask = generator.random(W.shape) < 0.5
    mask[:, 1], mask[:, 2] = False, True
    result = refit(W, InputStatistics(X.T @ X), mask, damping=DAMPING)
    assert not result[~mask].any()
    strength = np.sqrt(DAMPING * np.mean((X**2).sum(axis=0)))
    rows = np.concatenate([X, strength * np.eye(K)])
    for column in range(5):
        kept = mask[:, column]
        expected, *_ = np.linalg.lstsq(rows[:, kept], rows @ W[:, column], rcond=None)
        np.testing.assert_allclose(result[kept, column], expected, rtol=2e-4, atol=2e-5)


def test_refit_keeps_the_mask_of_an_earlier_model_and_never_hurts(layer):
    W, statistics = layer(48, 12)
    wanda = SOLVERS["wanda"]().solve(W, statistics, sparsity=0.5)
    fitted = refit(W, statistics, wanda != 0)
    np.testing.assert_array_equal(fitted == 0, wanda == 0)
    assert relative_error(W, fitted, damped(statistics)) < relative_error(W, wanda, damped(statistics))


def test_refit_of_a_singular_gram_is_finite():
    X = np.random.default_rng(0).standard_normal((3, 8))
    W = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    result = refit(W, InputStatistics(X.T @ X), W > 0, damping=0.0)
    assert np.isfinite(result).all()


def test_refit_with_partial_statistics(layer):
    W, statistics = layer(16, 4)
    mask = np.abs(W) > np.median(np.abs(W))
    np.testing.assert_array_equal(refit(W, InputStatistics(statistics.diagonal), mask), W * mask)
    blocks = (statistics.gram[:10, :10], statistics.gram[10:, 10:])
    whole = np.zeros((16, 16))
    whole[:10, :10], whole[10:, 10:] = blocks
    both = refit(W, InputStatistics(blocks), mask, damping=0.0)
    np.testing.assert_allclose(
        both, refit(W, InputStatistics(whole), mask, damping=0.0), rtol=1e-3, atol=1e-5
    )
