"""What every solver of weight quantization must satisfy, whatever its method; and oracles for each."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers import QUANTIZERS, SOLVERS, InputStatistics, relative_error
from sparse_onnx.passes.solvers.awq import awq, rescaled
from sparse_onnx.passes.solvers.clipping import whole_grid
from sparse_onnx.passes.solvers.correction import aimed_target, centred_gram, centred_pull
from sparse_onnx.passes.solvers.descent import descend
from sparse_onnx.passes.solvers.gram import damped
from sparse_onnx.passes.solvers.grid import GridOptions, round_to_grid
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys
from sparse_onnx.passes.solvers.quantizer import Rounding, output_errors

ALL = sorted(QUANTIZERS)
GRIDS = [
    GridOptions(bits=4, group_size=16),
    GridOptions(bits=3, group_size=0, symmetric=False),
    GridOptions(bits=2, group_size=32, symmetric=False, scale_type="float16"),
    GridOptions(bits=8, group_size=0),
]


def pruned_like(W, share=0.5):
    return np.where(np.abs(W) >= np.quantile(np.abs(W), share), W, np.float32(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_integers_lie_on_the_grid_and_zeros_stay(layer, name, grid):
    W, statistics = layer(40, 12)
    W = pruned_like(W)
    before = W.copy()
    solver = QUANTIZERS[name](grid=grid)
    quantized = solver.solve(W, statistics)
    np.testing.assert_array_equal(W, before)
    assert quantized.options == grid
    assert (quantized.matrix()[W == 0] == 0).all()
    np.testing.assert_array_equal(quantized.scale.astype(grid.scale_type).astype(np.float32), quantized.scale)
    again = solver.solve(W, statistics)
    assert again.integers.tobytes() == quantized.integers.tobytes()
    assert again.scale.tobytes() == quantized.scale.tobytes()


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(ALL),
    K=st.integers(1, 40),
    N=st.integers(1, 5),
    tokens=st.integers(1, 60),
    grid=st.sampled_from(GRIDS),
    share=st.sampled_from([0.0, 0.7]),
)
def test_any_shape_even_with_fewer_tokens_than_inputs(name, K, N, tokens, grid, share):
    generator = np.random.default_rng(K * 100 + N)
    X = generator.standard_normal((tokens, K))
    W = pruned_like(generator.standard_normal((K, N)).astype(np.float32), share)
    statistics = InputStatistics(X.T @ X)
    matrix = QUANTIZERS[name](grid=grid).solve(W, statistics).matrix()
    assert np.isfinite(matrix).all()
    assert (matrix[W == 0] == 0).all()
    assert np.abs(matrix).max() <= 3 * np.abs(W).max()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_auto_is_never_worse_than_the_others_in_any_output(layer, grid, share):
    for seed in range(3):
        W, statistics = layer(48, 20, seed=seed)
        W = pruned_like(W, share)
        problem = Rounding(W, W, None, statistics.gram)
        auto = output_errors(problem, QUANTIZERS["auto"](grid=grid).solve(W, statistics).matrix())
        for name, options in (("rtn", {}), ("gptq", {"damping": QUANTIZERS["auto"]().damping})):
            other = output_errors(
                problem, QUANTIZERS[name](grid=grid, **options).solve(W, statistics).matrix()
            )
            assert (auto <= other * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (4, 0, False), (3, 16, True), (3, 64, False)]
)
def test_the_methods_rank_as_they_should(layer, bits, group, symmetric):
    W, statistics = layer(128, 64, seed=1)
    grid = GridOptions(bits=bits, group_size=group, symmetric=symmetric)
    error = {
        name: relative_error(W, QUANTIZERS[name](grid=grid).solve(W, statistics).matrix(), statistics.gram)
        for name in ALL
    }
    assert error["gptq"] < 0.8 * error["rtn"]
    assert error["auto"] < 0.85 * error["gptq"]


@pytest.mark.parametrize("name", ["auto", "gptq"])
def test_inputs_that_were_never_seen_are_rounded_to_nearest(layer, name):
    W, statistics = layer(32, 6)
    gram = statistics.gram.copy()
    gram[[3, 8]] = gram[:, [3, 8]] = 0
    quantized = QUANTIZERS[name](grid=GridOptions(bits=4)).solve(W, InputStatistics(gram))
    nearest = round_to_grid(W, quantized.grid)
    np.testing.assert_array_equal(quantized.integers[[3, 8]], nearest.integers[[3, 8]])
    blind = QUANTIZERS[name]().solve(W, InputStatistics(np.zeros((32, 32))))
    np.testing.assert_array_equal(blind.integers, QUANTIZERS["rtn"]().solve(W).integers)


@pytest.mark.parametrize("name", ALL)
def test_a_diagonal_is_the_gram_of_independent_inputs(layer, name):
    W, statistics = layer(40, 8)
    grid = GridOptions(bits=3, group_size=16)
    known = InputStatistics(statistics.diagonal)
    quantized = QUANTIZERS[name](grid=grid).solve(W, known)
    rtn = QUANTIZERS["rtn"](grid=grid).solve(W, known)
    whole = np.diag(statistics.diagonal)
    assert relative_error(W, quantized.matrix(), whole) <= 1.6 * relative_error(W, rtn.matrix(), whole)
    if name == "auto":
        assert relative_error(W, quantized.matrix(), whole) < relative_error(W, rtn.matrix(), whole)


@pytest.mark.parametrize("name", ["auto", "gptq"])
def test_blocks_of_the_gram_may_cut_through_groups(layer, name):
    W, statistics = layer(72, 9)
    cut = [slice(0, 20), slice(20, 50), slice(50, 72)]
    whole = np.zeros((72, 72))
    for part in cut:
        whole[part, part] = statistics.gram[part, part]
    blocks = InputStatistics(tuple(statistics.gram[part, part] for part in cut))
    grid = GridOptions(bits=4, group_size=16)
    quantized = QUANTIZERS[name](grid=grid, damping=0.01).solve(W, blocks)
    at_once = QUANTIZERS[name](grid=grid, damping=0.01).solve(W, InputStatistics(whole))
    ratio = relative_error(W, quantized.matrix(), whole) / relative_error(W, at_once.matrix(), whole)
    assert 0.8 < ratio < 1.25
    rtn = QUANTIZERS["rtn"](grid=grid).solve(W)
    assert relative_error(W, quantized.matrix(), whole) < relative_error(W, rtn.matrix(), whole)


@pytest.mark.parametrize("power", [2.0**-120, 2.0**40, 2.0**120])
@pytest.mark.parametrize("name", ALL)
def test_the_scale_of_the_inputs_does_not_matter(layer, name, power):
    W, statistics = layer(40, 16)
    solver = QUANTIZERS[name](grid=GridOptions(bits=4, group_size=16))
    quantized = solver.solve(W, statistics)
    louder = solver.solve(W, InputStatistics(statistics.gram * power))
    assert np.mean(louder.integers != quantized.integers) < 0.02
    ratio = relative_error(W, louder.matrix(), statistics.gram) / relative_error(
        W, quantized.matrix(), statistics.gram
    )
    assert 0.99 < ratio < 1.01


@pytest.mark.parametrize("power", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("name", ALL)
def test_the_scale_of_the_weights_does_not_matter(layer, name, power):
    W, statistics = layer(40, 16)
    solver = QUANTIZERS[name](grid=GridOptions(bits=4, group_size=16, symmetric=False))
    quantized, other = solver.solve(W, statistics), solver.solve(W * np.float32(power), statistics)
    error = relative_error(W, quantized.matrix(), statistics.gram)
    moved = relative_error(W, other.matrix() / np.float32(power), statistics.gram)
    assert 0.99 < moved / error < 1.01


@pytest.mark.parametrize("name", ALL)
def test_a_target_replaces_the_weight(layer, name):
    W, statistics = layer(32, 8)
    target = W[::-1].copy()
    aimed = QUANTIZERS[name]().solve(W, statistics, target=target)
    np.testing.assert_array_equal(aimed.matrix(), QUANTIZERS[name]().solve(target, statistics).matrix())


@pytest.mark.parametrize("biased", [True, False])
def test_aimed_at_the_dense_output_it_makes_good_what_came_before(biased):
    generator = np.random.default_rng(8)
    dense = generator.standard_normal((1500, 24)) @ generator.standard_normal((24, 48)) + 0.5
    seen = (
        dense + 0.3 * generator.standard_normal(dense.shape) @ generator.standard_normal((48, 48)) / 7 + 0.2
    )
    W = generator.standard_normal((48, 20)).astype(np.float32)
    known = InputStatistics(seen.T @ seen, seen.mean(axis=0), len(seen))
    gram, pull, mean = known.gram, seen.T @ dense @ W, dense.mean(axis=0) @ W
    if biased:
        gram = centred_gram(known.gram, known.mean, known.count)
        pull = centred_pull(pull, known.mean, mean, gram, known.count)
    form, target = aimed_target(W, gram, pull)

    def error(V):
        change = seen @ V - dense @ W
        return np.linalg.norm(change - change.mean(axis=0) if biased else change)

    grid = GridOptions(bits=4, group_size=16)
    plain = QUANTIZERS["auto"](grid=grid).solve(W, InputStatistics(gram)).matrix()
    aimed = QUANTIZERS["auto"](grid=grid, damping=0.0)
    assert error(aimed.solve(W, InputStatistics(form), target=target).matrix()) < 0.95 * error(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": np.zeros(3, np.float32)}, r"weight must be \[K, N\]"),
        ({"W": np.full((4, 2), np.nan, np.float32)}, "NaN or Inf"),
        ({"W": np.full((4, 2), np.inf, np.float32), "target": np.ones((4, 2), np.float32)}, "NaN or Inf"),
        ({"W": np.zeros((5, 2), np.float32)}, "4 input channels, the weight has 5"),
        ({"target": np.zeros((2, 4), np.float32)}, r"target must be \[4, 2\]"),
        ({"statistics": None}, "auto needs calibration data"),
    ],
)
def test_input_that_does_not_fit_is_refused(change, message):
    arguments = {"W": np.ones((4, 2), np.float32), "statistics": InputStatistics(np.eye(4))} | change
    with pytest.raises(UsageError, match=message):
        QUANTIZERS["auto"]().solve(**arguments)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("auto", {"sweeps": -1}),
        ("auto", {"damping": -1.0}),
        ("gptq", {"block": 0}),
        ("gptq", {"ordered": 1}),
        ("hqq", {"norm": 1.0}),
        ("hqq", {"steps": -1}),
        ("hqq", {"strength": 0.0}),
        ("hqq", {"least": 0.0}),
        ("rtn", {"grid": 4}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        QUANTIZERS[name](**options)


def literal_gptq(W, form, grid, order, kept=None):
    """Column by column, as the paper derives it: every step inverts the Gram of the inputs that are left."""
    scale, low, high = (part.astype(np.float64) for part in grid.levels(len(W), kept))
    values, levels = W.astype(np.float64), np.zeros(W.shape)
    left = list(order)
    while left:
        i = left[0]
        inverse = np.linalg.inv(form[np.ix_(left, left)])
        levels[i] = np.clip(np.rint(values[i] / scale[i]), low[i], high[i])
        error = (values[i] - levels[i] * scale[i]) / inverse[0, 0]
        values[left] -= np.outer(inverse[:, 0], error)
        left = left[1:]
    return levels * scale


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_gptq_is_the_literal_recursion(layer, grid, ordered, share):
    W, statistics = layer(70, 24, seed=5)
    W = pruned_like(W, share)
    order = np.argsort(-statistics.diagonal, kind="stable") if ordered else np.arange(70)
    literal = literal_gptq(W, damped(statistics.gram, 0.01), whole_grid(W, grid), order, W != 0)
    for block in (1, 16, 64):
        solver = QUANTIZERS["gptq"](grid=grid, ordered=ordered, block=block)
        matrix = solver.solve(W, statistics).matrix()
        np.testing.assert_allclose(np.linalg.norm(matrix - literal) / np.linalg.norm(literal), 0, atol=1e-5)
    assert not np.allclose(literal, round_to_grid(W, whole_grid(W, grid)).matrix(), atol=1e-3)


def tiny(seed, symmetric=True):
    generator = np.random.default_rng(seed)
    X = generator.standard_normal((12, 4)) @ generator.standard_normal((4, 4))
    W = generator.standard_normal((4, 6)).astype(np.float32)
    grid = whole_grid(W, GridOptions(bits=2, symmetric=symmetric))
    gram = X.T @ X
    return Rounding(W, W, None, gram), grid, [(slice(0, 4), gram.astype(np.float32))]


@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_ends_where_no_move_helps_and_stays_at_the_optimum(symmetric):
    found, reached = 0, 0
    for seed in range(12):
        problem, grid, forms = tiny(seed, symmetric)
        end = descend(problem, round_to_grid(problem.target, grid), forms, sweeps=50, scales=False)
        errors = output_errors(problem, end.matrix())
        _, low, high = grid.levels(4)
        levels = end.integers - grid.of_inputs(4)[1]
        every = np.array(list(itertools.product(range(-3, 4), repeat=4)), np.float32)
        for n in range(6):
            allowed = every[((every >= low[:, n]) & (every <= high[:, n])).all(axis=1)]
            change = problem.target[:, n] - allowed * grid.scale[0, n]
            costs = np.einsum("ck,kl,cl->c", change, problem.gram, change)
            near = np.count_nonzero(allowed != levels[:, n], axis=1) <= 1
            assert errors[n] <= costs[near].min() * (1 + 1e-4)
            best = allowed[np.argmin(costs)]
            stays = grid.at(np.repeat(best[:, None], 6, axis=1) * (np.arange(6) == n))
            again = descend(problem, stays, forms, sweeps=5, scales=False)
            np.testing.assert_array_equal(again.matrix()[:, n], best * grid.scale[0, n])
            reached += errors[n] <= costs.min() * (1 + 1e-4)
            found += 1
    assert reached > found / 2


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_descent_never_goes_up(layer, grid, share):
    W, statistics = layer(72, 16, seed=2)
    W = pruned_like(W, share)
    kept = W != 0
    problem = Rounding(W, W, kept, statistics.gram)
    forms = [(slice(0, 72), statistics.gram.astype(np.float32))]
    now = round_to_grid(W, whole_grid(W, grid))
    start = before = output_errors(problem, now.matrix())
    for _ in range(5):
        now = descend(problem, now, forms, sweeps=1)
        after = output_errors(problem, now.matrix())
        assert (after <= before * (1 + 1e-4)).all()
        assert (now.matrix()[~kept] == 0).all()
        before = after
    assert before.sum() < 0.9 * start.sum()


def test_scales_move_to_their_least_squares(layer):
    W, statistics = layer(48, 10, seed=4)
    grid = GridOptions(bits=2, group_size=0)
    start = round_to_grid(W, whole_grid(W, grid))
    problem = Rounding(W, W, np.zeros(W.shape, bool) | (start.integers != 0), statistics.gram)
    moved = descend(problem, start, [(slice(0, 48), statistics.gram.astype(np.float32))], sweeps=1)
    assert (output_errors(problem, moved.matrix()) <= output_errors(problem, start.matrix())).all()
    for n in range(10):
        levels = start.integers[:, n].astype(np.float64)
        best = levels @ statistics.gram @ W[:, n] / (levels @ statistics.gram @ levels)
        if best > 0:
            np.testing.assert_allclose(moved.scale[0, n], best, rtol=1e-3)


def test_hqq_is_robust_against_outliers_as_far_as_it_may_clip():
    generator = np.random.default_rng(0)
    W = generator.standard_normal((128, 16)).astype(np.float32)
    W[generator.integers(0, 128, 2)] *= 12
    grid = GridOptions(bits=3, group_size=0, symmetric=False)
    whole = QUANTIZERS["rtn"](grid=grid).solve(W)
    for least, gain in ((0.1, 0.85), (0.9, 1.0)):
        quantized = QUANTIZERS["hqq"](grid=grid, least=least).solve(W)
        assert (quantized.scale >= least * whole.scale * (1 - 1e-6)).all()
        change, plain = np.abs(quantized.matrix() - W), np.abs(whole.matrix() - W)
        assert (change**0.7).sum() < gain * (plain**0.7).sum()


def test_awq_helps_loud_inputs_and_never_hurts(layer):
    W, statistics = layer(96, 32, seed=3)
    grid = GridOptions(bits=3, group_size=32)
    found = awq(W, statistics, grid, clip=False)
    rtn = QUANTIZERS["rtn"](grid=grid).solve(W).matrix()
    assert found.exponent > 0
    assert relative_error(W, found.matrix(), statistics.gram) < 0.9 * relative_error(W, rtn, statistics.gram)
    quiet = InputStatistics(np.eye(96))
    found = awq(W, quiet, grid)
    assert found.exponent == 0
    np.testing.assert_array_equal(found.scale, 1)


def test_awq_leaves_inputs_that_were_never_seen(layer):
    W, statistics = layer(32, 8)
    gram = statistics.gram.copy()
    gram[5] = gram[:, 5] = 0
    found = awq(W, InputStatistics(gram), GridOptions(bits=3))
    assert found.scale[5] == 1
    assert (found.scale > 0).all()
    with pytest.raises(UsageError, match="steps"):
        awq(W, statistics, GridOptions(), steps=0)


def test_a_rescaled_layer_is_the_same_layer(layer):
    W, statistics = layer(30, 8)
    scale = np.linspace(0.5, 3, 30).astype(np.float32)
    for gram in (
        statistics.gram,
        statistics.diagonal,
        (statistics.gram[:11, :11], statistics.gram[11:, 11:]),
    ):
        known = InputStatistics(gram, statistics.mean, statistics.count)
        scaled, there = rescaled(W, known, scale)
        np.testing.assert_allclose(scaled / scale[:, None], W, rtol=1e-6)
        np.testing.assert_allclose(there.diagonal * scale.astype(np.float64) ** 2, known.diagonal)
        np.testing.assert_allclose(there.mean * scale, known.mean)
        before = output_errors(Rounding(W, W, None, gram), np.zeros_like(W))
        after = output_errors(Rounding(scaled, scaled, None, there.gram), np.zeros_like(W))
        np.testing.assert_allclose(after, before, rtol=1e-5)


def sparsegpt_joint(W, gram, grid, structure, share, block=128):
    """SparseGPT with rounding in the same loop (Frantar & Alistarh 2023, section 3.5): the reference to beat."""
    factor = np.linalg.cholesky(np.linalg.inv(damped(gram, 0.01))).T
    scale, low, high = whole_grid(W, grid).levels(len(W))
    values, result = W.astype(np.float64), np.zeros(W.shape)
    for first in range(0, len(W), block):
        last = min(first + block, len(W))
        U, part = factor[first:last, first:last], values[first:last]
        score = np.abs(part) / U.diagonal()[:, None]
        kept = score > np.quantile(score, share)
        for i in range(last - first):
            if structure.kind == "n:m" and i % structure.size[1] == 0:
                some = slice(i, i + structure.size[1])
                score = np.abs(part[some]) / U.diagonal()[some, None]
                kept[some] = np.argsort(np.argsort(-score, axis=0), axis=0) < structure.size[0]
            row = first + i
            level = np.clip(np.rint(part[i] / scale[row]), low[row], high[row]) * kept[i]
            result[row] = level * scale[row]
            error = (part[i] - result[row]) / U[i, i]
            part[i:] -= np.outer(U[i, i:], error)
            values[last:] -= np.outer(factor[row, last:], error)
    return result


def joint(W, statistics, structure, share, quantizer):
    """Zeros, then integers on what is kept, which aim at W and not at the pruned weight: as the passes do it."""
    pruned = SOLVERS["auto"]().solve(W, statistics, structure, share)
    return quantizer.solve(pruned, statistics, target=W)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8"])
def test_zeros_and_bits_together_beat_one_loop_over_both(layer, text):
    W, statistics = layer(128, 64, seed=6)
    structure = MaskStructure.parse(text)
    grid = GridOptions(bits=4, group_size=64)
    share = 0.5 if structure.kind == "unstructured" else None
    found = joint(W, statistics, structure, share, QUANTIZERS["auto"](grid=grid))
    matrix = found.matrix()
    assert np.mean(matrix == 0) >= 0.5
    if share is None:
        assert obeys(matrix, structure)
    reference = sparsegpt_joint(W, statistics.gram, grid, structure, 0.5)
    assert np.mean(reference == 0) >= 0.49
    assert relative_error(W, matrix, statistics.gram) < 0.95 * relative_error(W, reference, statistics.gram)
    one_after_the_other = QUANTIZERS["auto"](grid=grid).solve(
        SOLVERS["auto"]().solve(W, statistics, structure, share), statistics
    )
    assert relative_error(W, matrix, statistics.gram) <= 1.01 * relative_error(
        W, one_after_the_other.matrix(), statistics.gram
    )


@pytest.mark.parametrize("text", ["block:4x2", "channel", "1:4"])
def test_any_structure_keeps_its_zeros(layer, text):
    W, statistics = layer(32, 16)
    structure = MaskStructure.parse(text)
    share = None if structure.kind == "n:m" else 0.5
    mask = SOLVERS["auto"]().solve(W, statistics, structure, share) != 0
    found = joint(W, statistics, structure, share, QUANTIZERS["auto"]()).matrix()
    assert not found[~mask].any()
    assert np.mean(found == 0) >= np.mean(~mask)
