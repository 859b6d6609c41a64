"""Sparsity over layers: the mean is exact, limits hold, and each method moves zeros the way it says."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import Weight
from sparse_onnx.passes.prune.allocation import (
    ALLOCATIONS,
    allocate,
    error_curve,
    explicit,
    hill_exponent,
    outlier_share,
    water_fill,
)
from sparse_onnx.passes.solvers import InputStatistics, SparseGPTSolver


def layer(name, W, op_type="MatMul", **attributes):
    """A weight as the graph has it; a Conv's is [N, C / group, window]."""
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(W)))
    x = ir.Value(name=f"{name}.x")
    node = ir.node(op_type, [x, value], attributes, name=f"{name}.node")
    return Weight(value, (node,), op_type == "Conv")


def layers(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [layer(f"w{i}", rng.standard_normal(shape).astype(np.float32)) for i, shape in enumerate(shapes)]


def statistics_of(weight, seed=1):
    rng = np.random.default_rng(seed)
    K = weight.shape[0]
    X = rng.standard_normal((8 * K, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)))
    return InputStatistics(X.T @ X, X.mean(axis=0), len(X))


def mean_of(weights, result):
    sizes = {weight.name: weight.tensor.size for weight in weights}
    return sum(result[name] * size for name, size in sizes.items()) / sum(sizes.values())


@st.composite
def fills(draw):
    n = draw(st.integers(1, 12))
    unit = st.floats(0, 1)
    limits = [sorted((draw(unit), draw(unit))) for _ in range(n)]
    low, high = np.array(limits).T
    start = np.array([draw(st.floats(-3, 3)) for _ in range(n)])
    sizes = np.array([draw(st.integers(1, 10**8)) for _ in range(n)], np.float64)
    rate = np.array([draw(st.floats(0.01, 10)) for _ in range(n)])
    share = sizes / sizes.sum()
    floor, ceiling = float(share @ low), float(share @ high)
    return start, sizes, floor + draw(unit) * (ceiling - floor), low, high, rate


@settings(max_examples=300, deadline=None, derandomize=True)
@given(fills())
def test_water_fill_keeps_the_mean_and_the_limits(fill):
    start, sizes, mean, low, high, rate = fill
    result = water_fill(start, sizes, mean, low, high, rate)
    assert result @ sizes / sizes.sum() == pytest.approx(mean, abs=1e-9)
    assert (result >= low).all()
    assert (result <= high).all()
    free = (result > low + 1e-9) & (result < high - 1e-9)
    shift = (result - start)[free] / rate[free]  # one t for all that no limit binds
    np.testing.assert_allclose(shift, shift[:1].repeat(len(shift)), atol=1e-6)


def test_water_fill_hand_computed():
    start, sizes = np.array([0.9, 0.5, 0.1]), np.ones(3)
    np.testing.assert_allclose(water_fill(start, sizes, 0.6, np.zeros(3), np.ones(3)), [1, 0.6, 0.2])
    np.testing.assert_allclose(water_fill(start, sizes, 0.5, np.zeros(3), np.ones(3)), start)


@pytest.mark.parametrize("mean", [-0.1, 1.1])
def test_water_fill_refuses_a_mean_beyond_the_limits(mean):
    with pytest.raises(ValueError, match="not within the limits"):
        water_fill(np.zeros(2), np.ones(2), mean, np.zeros(2), np.ones(2))


@pytest.mark.parametrize("method", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.7, 0.95, 0.98, 0.99])
def test_every_method_reaches_the_mean_within_its_limits(method, sparsity):
    weights = layers((16, 16), (16, 48), (48, 16), (5, 3), (1, 7), (9, 1))
    result = allocate(method, weights, sparsity, statistics_of)
    assert list(result) == [weight.name for weight in weights]
    assert mean_of(weights, result) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= value <= max(0.98, sparsity) for value in result.values())
    assert all(type(value) is float for value in result.values())
    assert result == allocate(method, weights, sparsity, statistics_of)


@pytest.mark.parametrize("method", ALLOCATIONS)
def test_equal_layers_and_no_layers(method):
    assert allocate(method, [], 0.5, statistics_of) == {}
    (only,) = layers((8, 8))
    assert allocate(method, [only], 0.7, statistics_of) == {"w0": pytest.approx(0.7, abs=1e-12)}
    if method != "depth":
        W = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
        same = [layer(name, W) for name in "abc"]
        assert list(allocate(method, same, 0.7, statistics_of).values()) == pytest.approx([0.7] * 3)


def test_one_name_in_two_branches_has_one_sparsity():
    weights = [*layers((8, 8), (8, 4)), *layers((8, 16))]
    result = allocate("depth", weights, 0.5, statistics_of)
    mean = sum(result[weight.name] * weight.tensor.size for weight in weights) / (64 + 32 + 128)
    assert mean == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "calls"), [("uniform", 0), ("depth", 0), ("alpha", 0), ("owl", 3), ("error", 3)]
)
def test_statistics_are_asked_for_once_each_and_only_where_needed(method, calls):
    asked = []

    def statistics(weight):
        asked.append(weight.name)
        return statistics_of(weight)

    allocate(method, layers((8, 8), (8, 8), (8, 4)), 0.5, statistics)
    assert asked == ["w0", "w1", "w2"][:calls]


@pytest.mark.parametrize("method", ["owl", "error"])
def test_a_weight_without_statistics_stays(method):
    weights = layers((32, 32), (32, 64), (32, 16))
    weights[0] = layer("w0", np.diag(np.arange(32, dtype=np.float32)))
    result = allocate(method, weights, 0.7, lambda w: None if w.name == "w1" else statistics_of(w))
    assert result["w1"] == pytest.approx(0.7, abs=1e-12)
    assert result["w0"] != pytest.approx(0.7, abs=1e-3)
    assert mean_of(weights, result) == pytest.approx(0.7, abs=1e-9)
    nothing = allocate(method, weights, 0.7, lambda _weight: None)
    assert list(nothing.values()) == pytest.approx([0.7] * 3)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity):
    with pytest.raises(UsageError, match="sparsity must be"):
        allocate("uniform", layers((4, 4)), sparsity, statistics_of)
    with pytest.raises(UsageError, match="sparsity must be"):
        explicit(layers((4, 4)), sparsity, {})


def test_unknown_method_names_the_nearest():
    with pytest.raises(UsageError, match="nearest is 'depth'"):
        allocate("dept", layers((4, 4)), 0.5, statistics_of)


def test_depth_falls_linearly():
    result = allocate("depth", layers(*[(8, 8)] * 5), 0.7, statistics_of)
    np.testing.assert_allclose(list(result.values()), 0.7 + np.linspace(0.0875, -0.0875, 5), atol=1e-12)


def test_outlier_share_counts_weights_on_the_scale_of_their_input():
    W = np.ones((10, 10), np.float32)
    W[0, 0] = 100  # the mean is 1.99
    assert outlier_share(W, np.ones(10)) == 0.01
    assert outlier_share(W, np.ones(10), times=100) == 0
    assert outlier_share(np.ones((10, 10), np.float32), np.r_[1e4, np.ones(9)]) == 0.1
    assert outlier_share(np.zeros((3, 3), np.float32), np.ones(3)) == 0


def test_owl_keeps_the_layer_with_outliers_denser_and_stays_in_its_band():
    weights = layers(*[(32, 32)] * 4)
    W = weights[2].matrix().copy()
    W[0] *= 50
    weights[2] = layer("w2", W)
    result = allocate("owl", weights, 0.6, lambda w: InputStatistics(np.ones(w.shape[0])))
    assert result["w2"] == min(result.values())
    assert result["w2"] == pytest.approx(0.52)
    assert max(result.values()) <= 0.68 + 1e-12


def test_hill_exponent_of_a_power_law():
    """Eigenvalues at the quantiles of a Pareto law with exponent α − 1 of its tail."""
    n, alpha = 512, 3.0
    values = ((np.arange(n) + 0.5) / n) ** (-1 / (alpha - 1))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    assert hill_exponent(np.diag(np.sqrt(values)) @ rotation) == pytest.approx(alpha, rel=0.02)
    assert hill_exponent(7 * rotation @ np.diag(np.sqrt(values))) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize("W", [np.eye(6), np.ones((1, 6)), np.zeros((4, 4)), np.ones((5, 3))])
def test_hill_exponent_is_unknown_without_a_tail(W):
    assert np.isnan(hill_exponent(W))


def test_alpha_keeps_the_heavy_tail_denser():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((32, 32)))[0] for _ in range(2))
    rank = np.arange(1, 33)
    weights = [
        layer(f"{power}", (left * rank ** -float(power) @ right).astype(np.float32)) for power in (2, 1, 0.25)
    ]
    result = allocate("alpha", weights, 0.5, statistics_of)
    assert result["2"] < result["1"] < result["0.25"]
    assert result["0.25"] / result["2"] == pytest.approx(1.3 / 0.7)


def test_error_curve_is_that_of_the_solver_on_the_whole_layer():
    """Within 5 %: the solver ranks by more than |w| · sqrt(G_ii), so its zeros lie a little differently."""
    (weight,) = layers((64, 48))
    W, statistics, sparsities = weight.matrix(), statistics_of(weight), np.array([0.4, 0.6, 0.8])
    curve = error_curve(W, statistics, sparsities)
    energy = np.einsum("kn,kn->n", W, statistics.gram @ W)
    for share, found in zip(sparsities, curve, strict=True):
        change = W - SparseGPTSolver().solve(W, statistics, sparsity=float(share))
        error = np.mean(np.einsum("kn,kn->n", change, statistics.gram @ change) / energy)
        assert np.sqrt(found) == pytest.approx(np.sqrt(error), rel=0.05)


def test_error_curve_of_partial_grams():
    (weight,) = layers((12, 30))
    W, diagonal = weight.matrix(), np.linspace(1, 3, 12)
    sparsities = np.array([0.25, 0.5])
    curve = error_curve(W, InputStatistics(diagonal), sparsities)
    score = diagonal[:, None] * W.astype(np.float64) ** 2
    for share, found in zip(sparsities, curve, strict=True):
        gone = score <= np.sort(score, axis=None)[int(share * W.size) - 1]
        assert found == pytest.approx(np.mean((score * gone).sum(axis=0) / score.sum(axis=0)), rel=1e-5)
    whole = statistics_of(weight).gram
    np.testing.assert_array_equal(
        error_curve(W, InputStatistics((whole,)), sparsities),
        error_curve(W, InputStatistics(whole), sparsities),
    )
    blocks = (whole[:4, :4].copy(), whole[4:, 4:].copy())
    together = np.zeros((12, 12))
    together[:4, :4], together[4:, 4:] = blocks
    np.testing.assert_allclose(
        error_curve(W, InputStatistics(blocks), sparsities),
        error_curve(W, InputStatistics(together), sparsities),
        rtol=0.25,
    )


def test_error_curve_ignores_dead_inputs_and_silent_channels():
    (weight,) = layers((16, 20))
    W, gram = weight.matrix().copy(), statistics_of(weight).gram
    gram[3] = gram[:, 3] = 0
    W[:, 5] = 0
    curve = error_curve(W, InputStatistics(gram), np.array([0.3, 0.6]))
    assert (curve > 0).all()
    assert (curve < 1).all()
    W[3] *= 1000
    np.testing.assert_allclose(error_curve(W, InputStatistics(gram), np.array([0.3, 0.6])), curve, rtol=1e-6)
    silent = InputStatistics(np.zeros((16, 16)))
    assert (error_curve(W, silent, np.array([0.3])) == 0).all()


def test_error_spares_what_cannot_be_compressed():
    """One layer with independent inputs, one whose inputs nearly all say the same."""
    weights = layers((48, 48), (48, 48))
    rng = np.random.default_rng(0)
    low_rank = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 48))
    inputs = {"w0": rng.standard_normal((400, 48)), "w1": low_rank + 0.05 * rng.standard_normal((400, 48))}
    result = allocate(
        "error", weights, 0.6, lambda w: InputStatistics(inputs[w.name].T @ inputs[w.name], None, 400)
    )
    assert 0.45 - 1e-12 <= result["w0"] < 0.59
    assert 0.61 < result["w1"] <= 0.75 + 1e-12


def test_error_beats_uniform_by_its_own_measure():
    weights = layers((32, 32), (32, 96), (64, 32))
    weights[0] = layer("w0", weights[0].matrix() * np.linspace(0.01, 3, 32, dtype=np.float32)[:, None] ** 2)
    result = allocate("error", weights, 0.6, statistics_of)

    def whole(shares):
        return sum(
            error_curve(weight.matrix(), statistics_of(weight), np.array([share]))[0]
            for weight, share in zip(weights, shares, strict=True)
        )

    assert whole(result.values()) < 0.99 * whole([0.6] * 3)


def test_the_first_group_stands_for_a_grouped_convolution():
    rng = np.random.default_rng(0)
    filters = rng.standard_normal((8, 2, 3)).astype(np.float32)
    convolution = layer("c", filters, "Conv", group=4)
    other = layers((6, 8), (16, 8))
    first = layer("c", filters[:2], "Conv")
    grouped = allocate("owl", [convolution, *other], 0.5, statistics_of)
    np.testing.assert_allclose(
        [outlier_share(first.matrix(), statistics_of(first).diagonal)],
        [outlier_share(convolution.matrix()[:, :2], statistics_of(convolution).diagonal)],
    )
    changed = filters.copy()
    changed[2:] *= rng.exponential(size=(6, 2, 3)).astype(np.float32) ** 4
    assert allocate("owl", [layer("c", changed, "Conv", group=4), *other], 0.5, statistics_of) == grouped


def test_explicit_shares_the_rest():
    weights = layers((4, 4), (4, 4), (4, 8))
    assert explicit(weights, 0.5, {"w0": 0.9}) == pytest.approx({"w0": 0.9, "w1": 1.1 / 3, "w2": 1.1 / 3})
    assert explicit(weights, 0.5, {}) == pytest.approx(dict.fromkeys(("w0", "w1", "w2"), 0.5))
    by_node = explicit(weights, 0.5, {"w1.node": 0, "re:w[01]": 0.8})
    assert by_node == pytest.approx({"w0": 0.8, "w1": 0.0, "w2": 0.6})
    assert mean_of(weights, by_node) == pytest.approx(0.5, abs=1e-9)
    assert explicit(weights, 0.5, {"re:w[01]": 0.4, "MatMul": 0.6}) == {"w0": 0.4, "w1": 0.4, "w2": 0.6}
    assert explicit(weights[:2], 0.25, {"MatMul": 0.25}) == {"w0": 0.25, "w1": 0.25}
    assert explicit(weights[:2], 0.45, {"w0": 0.9}) == {"w0": 0.9, "w1": 0.0}
    assert explicit(weights, 0.99, {"w0": 0.99}) == pytest.approx(dict.fromkeys(("w0", "w1", "w2"), 0.99))
    assert explicit([], 0.5, {}) == {}


@pytest.mark.parametrize(
    ("given_sparsities", "message"),
    [
        ({"w7": 0.5}, "'w7' matches no weight"),
        ({"re:x.*": 0.5}, "matches no weight"),
        ({"MatMul": 0.5, "w0": 0.5}, "'w0' matches only weights that earlier entries name"),
        ({"w0": 1.0}, "sparsity of 'w0' must be"),
        ({"w0": -0.1}, "sparsity of 'w0' must be"),
        ({"re:(": 0.5}, "not a regular expression"),
        ({"w2": 0.99, "w1": 0.9}, "would need a sparsity of -0.88.*lower"),
        ({"w2": 0.01, "w1": 0.01}, "would need a sparsity of 1.97.*higher"),
        ({"MatMul": 0.6}, "mean of 0.6000000000, but sparsity is 0.5"),
    ],
)
def test_explicit_refuses_what_cannot_be(given_sparsities, message):
    with pytest.raises(UsageError, match=message):
        explicit(layers((4, 4), (4, 4), (4, 8)), 0.5, given_sparsities)
