"""Sums over tokens against float64: however large the mean, however the batches are cut, merged or taken up again."""

import copy

import numpy as np
import pytest

from sparse_onnx.errors import DataError
from sparse_onnx.passes.calibration.moments import CrossMoments, Layout, Moments
from sparse_onnx.passes.solvers.correction import centred_gram, centred_power

K = 12
SCALES = np.logspace(-3, 0, K)


def rows_of(case, n=3000):
    rng = np.random.default_rng(4)
    mixed = rng.standard_normal((n, K)) @ rng.standard_normal((K, K))
    rows = {
        "no mean": mixed,
        "mean 10, deviation 1e-3": 10 + 1e-3 * mixed,
        "mean 1000": 1000 + mixed,
        "all scales": SCALES * mixed + np.linspace(-5, 5, K),
        "the first tokens are far away": mixed + np.where(np.arange(n) < 40, 3000, 0)[:, None],
        "drift": mixed + np.linspace(0, 50, n)[:, None],
        "some constant": np.where(np.arange(K) % 3 == 0, np.linspace(-2.7, 4.1, K), mixed),
    }[case]
    return rows.astype(np.float32)


CASES = (
    "no mean",
    "mean 10, deviation 1e-3",
    "mean 1000",
    "all scales",
    "the first tokens are far away",
    "drift",
    "some constant",
)
CUTS = {"at once": [], "batches": [7, 64, 65, 900, 901, 2500], "one by one at first": [1, 2, 3, 4, 5]}


def moments_of(rows, layout=Layout.FULL, cuts=()):
    moments = Moments(rows.shape[1], layout)
    for part in np.split(rows, cuts):
        moments.add(part)
    return moments


def assert_exact(found, rows):
    """To float32 of what varies; what does not is nothing at all."""
    exact = rows.astype(np.float64)
    mean, power = exact.mean(axis=0), (exact**2).sum(axis=0)
    centred = ((exact - mean) ** 2).sum(axis=0)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-9, atol=1e-7 * np.sqrt(centred / len(rows)).max())
    np.testing.assert_allclose(found.diagonal, power, rtol=1e-6)
    varies = centred_power(found.diagonal, found.mean, found.count)
    # The sums themselves are float64, which is all that limits what varies by a millionth of its size.
    np.testing.assert_array_less(np.abs(varies - centred), 3e-6 * centred + 2e-15 * power + 1e-300)
    if isinstance(found.gram, np.ndarray) and found.gram.ndim == 2:
        whole = (exact - mean).T @ (exact - mean)
        scale = np.sqrt(np.outer(centred, centred))
        form = centred_gram(found.gram, found.mean, found.count)
        assert (np.abs(form - whole) <= 3e-6 * scale + 2e-15 * np.sqrt(np.outer(power, power))).all()
        np.testing.assert_allclose(
            found.gram, exact.T @ exact, atol=3e-6 * np.sqrt(np.outer(power, power)).max()
        )


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_float64(case, cuts, layout):
    rows = rows_of(case)
    found = moments_of(rows, layout, CUTS[cuts]).statistics("x")
    assert found.count == len(rows)
    if case == "the first tokens are far away":  # the sums are as exact as they are large
        exact = rows.astype(np.float64)
        centred = ((exact - exact.mean(axis=0)) ** 2).sum(axis=0)
        varies = centred_power(found.diagonal, found.mean, found.count)
        np.testing.assert_allclose(varies, centred, rtol=1e-5)
        np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-6)
        return
    assert_exact(found, rows)


@pytest.mark.parametrize("layout", Layout)
def test_constant_inputs_are_exactly_constant(layout):
    rows = rows_of("some constant")
    for cuts in CUTS.values():
        moments = moments_of(rows, layout, cuts)
        other = moments_of(rows[:77], layout, [5])
        moments.merge(other)
        found = moments.statistics("x")
        power = centred_power(found.diagonal, found.mean, found.count)
        np.testing.assert_array_equal(power == 0, np.arange(K) % 3 == 0)


def test_inputs_that_vary_a_little_are_not_constant():
    """A millionth of their size: ten times the rounding of float32."""
    rng = np.random.default_rng(0)
    rows = (3 + 3e-6 * rng.standard_normal((5000, K))).astype(np.float32)
    found = moments_of(rows, cuts=[100]).statistics("x")
    assert (centred_power(found.diagonal, found.mean, found.count) > 0).all()
    assert_exact(found, rows)


def test_the_last_bit_of_an_activation_is_no_variation():
    one = np.float32(1.7)
    rows = np.where(np.random.default_rng(0).random((4000, K)) < 0.5, one, np.nextafter(one, np.float32(2)))
    found = moments_of(rows.astype(np.float32)).statistics("x")
    assert not centred_power(found.diagonal, found.mean, found.count).any()


@pytest.mark.parametrize("case", CASES)
def test_one_token_and_equal_tokens_do_not_vary(case):
    (token, *_) = rows_of(case)
    for count in (1, 64, 5000):
        found = moments_of(np.repeat(token[None], count, axis=0), cuts=[1, 3]).statistics("x")
        np.testing.assert_array_equal(found.mean, token.astype(np.float64))
        assert not centred_gram(found.gram, found.mean, found.count).any()
        assert (found.diagonal >= 0).all()


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("case", ["mean 10, deviation 1e-3", "mean 1000", "some constant"])
def test_sums_of_parts_add_up(case, layout):
    rows = rows_of(case)
    first, second = moments_of(rows[:500], layout), moments_of(rows[500:], layout, [30])
    first.merge(second)
    assert_exact(first.statistics("x"), rows)
    with pytest.raises(ValueError, match="equal size and layout"):
        first.merge(Moments(K + 1, layout))


@pytest.mark.parametrize("layout", Layout)
def test_a_state_that_is_taken_up_goes_on_to_the_last_bit(layout):
    rows = rows_of("all scales")
    moments = moments_of(rows[:900], layout)
    taken = Moments(K, layout)
    taken.count = moments.count
    for name, array in taken.arrays().items():
        array[...] = copy.deepcopy(moments.arrays()[name])
    for sums in (moments, taken):
        sums.add(rows[900:])
    one, two = (sums.statistics("x") for sums in (moments, taken))
    np.testing.assert_array_equal(one.gram, two.gram)
    np.testing.assert_array_equal(one.mean, two.mean)


def test_blocks_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    rows = (5 + rng.standard_normal((300, 1500))).astype(np.float32)
    whole = moments_of(rows, cuts=[10]).statistics("x").gram
    blocks = moments_of(rows, Layout.BLOCKS, [10]).statistics("x").gram
    assert [len(block) for block in blocks] == [1024, 476]
    np.testing.assert_allclose(blocks[0], whole[:1024, :1024], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(blocks[1], whole[1024:, 1024:], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 700, 2999])
def test_not_finite_is_told_when_the_result_is_asked_for(at, bad):
    rows = rows_of("no mean")
    rows[at, 2] = bad
    moments = moments_of(rows, cuts=[500, 1000])
    with pytest.raises(DataError, match="hold NaN or Inf"):
        moments.statistics("x")


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_products_of_two_sides_are_those_of_float64(case, cuts):
    x = rows_of(case)
    y = (x.astype(np.float64) @ np.random.default_rng(8).standard_normal((K, 5)) + 70).astype(np.float32)
    cross = CrossMoments(K, 5)
    for a, b in zip(np.split(x, CUTS[cuts]), np.split(y, CUTS[cuts]), strict=True):
        cross.add(a, b)
    pull, total = cross.sums()
    a, b = x.astype(np.float64), y.astype(np.float64)
    assert (np.abs(total - b.sum(axis=0)) <= 1e-6 * np.abs(b).sum(axis=0)).all()
    less = pull - len(x) * np.outer(a.mean(axis=0), total / len(x))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt(np.outer((a**2).sum(axis=0), (b**2).sum(axis=0)))
    np.testing.assert_array_less(np.abs(less - a.T @ b), 1e-5 * scale + 1e-12 * np.abs(pull) + 1e-300)


# -- weights


@pytest.mark.parametrize("weight", [2, 3])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("case", ["no mean", "mean 1000", "all scales"])
def test_a_weight_is_so_many_repetitions(case, layout, weight):
    rows = rows_of(case, 900)
    light, heavy = rows[:500], rows[500:]
    found, wanted = Moments(K, layout), Moments(K, layout)
    found.add(light)
    found.add(heavy, weight)
    for part in (light, *[heavy] * weight):
        wanted.add(part)
    a, b = found.statistics("x"), wanted.statistics("x")
    assert a.count == b.count == 500 + 400 * weight
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-6, atol=1e-6 * np.abs(rows).max())
    np.testing.assert_allclose(a.diagonal, b.diagonal, rtol=1e-6)
    if layout is Layout.FULL:
        varied = [centred_gram(s.gram, s.mean, s.count) for s in (a, b)]
        scale = np.sqrt(np.outer(varied[1].diagonal(), varied[1].diagonal()))
        assert (np.abs(varied[0] - varied[1]) <= 1e-5 * scale).all()


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.5])
def test_weighted_means_and_products_against_float64(weight):
    rows = rows_of("mean 10, deviation 1e-3", 700)
    aims = rows[:, :5] * 2 + 1
    moments, pulls = Moments(K), CrossMoments(K, 5)
    x, y = rows.astype(np.float64), aims.astype(np.float64)
    w = np.where(np.arange(700) < 300, weight, 1.0)[:, None]
    for part, own in ((slice(0, 300), weight), (slice(300, 700), 1)):
        moments.add(rows[part], own)
        pulls.add(rows[part], aims[part], own)
    found = moments.statistics("x")
    assert found.count == pytest.approx(w.sum())
    np.testing.assert_allclose(found.mean, (w * x).sum(axis=0) / w.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.gram, x.T @ (w * x), rtol=1e-6)
    products, total = pulls.sums()
    np.testing.assert_allclose(products, x.T @ (w * y), rtol=1e-6)
    np.testing.assert_allclose(total, (w * y).sum(axis=0), rtol=1e-9)
